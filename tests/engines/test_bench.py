"""What `iapt-export bench` measures, as numbers, as a table and as a picture."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from engines.bench import measure, plot
from engines.serving.generation import Generation
from engines.serving.session import Session
from tests.bundles import TinyBuild, run

SMALL = ("--prompt-tokens=6", "--new-tokens=5", "--repeat=2", "--quiet")


def test_the_command_measures_tells_and_draws(tiny_build: TinyBuild, tmp_path: Path) -> None:
    kept, drawn = tmp_path / "bench.json", tmp_path / "bench.png"
    outcome = run(
        "bench", tiny_build.bundle, *SMALL, "--rows", "1", "4", "--json", f"--output={kept}", f"--plot={drawn}"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found == json.loads(kept.read_text(encoding="utf-8"))
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert (found["target"], found["cache"], found["installed_tenants"]) == ("onnxruntime", "InPlace", 3)
    assert found["peak_memory_mb"] > 10 and "onnxruntime" in found["versions"]
    one, four = found["figures"]
    assert (one["rows"], one["tenants"], four["rows"], four["tenants"]) == (1, 1, 4, 3)
    for line in found["figures"]:
        assert 0 < line["ttft_p50_ms"] <= line["ttft_max_ms"]
        assert 0 < line["itl_p50_ms"] <= line["itl_p99_ms"] <= line["itl_quantiles_ms"][-1]
        assert len(line["rounds_tokens_per_s"]) == len(line["rounds_decode_tokens_per_s"]) == 2
        assert min(line["rounds_tokens_per_s"]) <= line["tokens_per_s"] <= max(line["rounds_tokens_per_s"])


def test_the_table(tiny_build: TinyBuild) -> None:
    outcome = run("bench", tiny_build.bundle, *SMALL, "--rows=2")
    assert outcome.code == 0, outcome.err
    assert "3 tenants installed" in outcome.out and "tokens/s" in outcome.out and "peak memory" in outcome.out


def test_one_token_has_no_next(tiny_build: TinyBuild) -> None:
    with Session.open(tiny_build.bundle, verify=False) as session:
        figures = measure(session, 2, 3, 1, 1)
    assert figures["itl_p50_ms"] is None and figures["decode_tokens_per_s"] is None and figures["tokens_per_s"] > 0


def test_a_reader_that_is_late_changes_no_figure(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Generation.result
    monkeypatch.setattr(Generation, "result", lambda generation: (time.sleep(1), read(generation))[1])
    with Session.open(tiny_build.bundle, verify=False) as session:
        figures = measure(session, 1, 3, 8, 1)
    assert figures["itl_p50_ms"] > 0 and figures["ttft_max_ms"] < 1000 and figures["itl_quantiles_ms"][-1] < 1000
    assert figures["tokens_per_s"] > 8, "all tokens within the second in which nobody read"


def test_the_plot_marks_p50_and_p99_and_says_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words: list[str] = []

    def look(figure: Figure, *_: object, **__: object) -> None:
        (axes,) = figure.axes
        words.extend(text.get_text() for text in (*axes.texts, *axes.get_legend().get_texts()))

    monkeypatch.setattr(Figure, "savefig", look)
    lines = [{"rows": rows, "itl_quantiles_ms": list(range(101))} for rows in (1, 8)]
    plot({"bundle": "b", "target": "onnxruntime", "dtype": "fp32", "figures": lines}, tmp_path / "b.png")
    assert words == ["p50", "p99", "1 row", "8 rows"]


def test_what_a_plot_needs_is_missed_before_measuring(
    tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    monkeypatch.setattr("engines.bench.measure", lambda *_: pytest.fail("measured"))
    outcome = run("bench", tiny_build.bundle, *SMALL, f"--plot={tmp_path / 'bench.png'}")
    assert outcome.code == 1 and "matplotlib is not installed" in outcome.err.replace(".backend_bases", ""), outcome.err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--prompt-tokens=500",), "the prompt has 500 tokens; this bundle takes at most 96"),
        (("--rows", "0"), "for --rows. Must be > 0."),
        (("--rows", "99"), "99 rows cannot run at once: the bundle takes"),
        (("--output", "nowhere/bench.json"), "there is no folder nowhere; make it first"),
        (("--plot", "bench.doc"), "bench.doc cannot be drawn: its name must end in one of"),
        (("--plot", "nowhere/bench.png"), "there is no folder nowhere; make it first"),
    ],
)
def test_bad_flags(tiny_build: TinyBuild, flags: tuple[str, ...], text: str) -> None:
    outcome = run("bench", tiny_build.bundle, "--quiet", *flags)
    assert outcome.code in (1, 2) and text in outcome.err
