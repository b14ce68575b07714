"""The serving benchmark's own arithmetic and its worker; not the timings."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.serving import Case, Worker, cases, main
from benchmarks.serving_bundles import BundlePlan, make_bundle
from benchmarks.serving_load import Soak, compare_batching, make_trace, soak
from benchmarks.serving_peers import PEERS, Job
from benchmarks.serving_peers import measure as work
from benchmarks.serving_report import (
    BY_HAND,
    GOALS,
    TITLES,
    Goal,
    Records,
    failures,
    figures_of,
    lines_of,
    memory,
    ratios,
    tenant_cost,
    typical,
    write_report,
)
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import IAPTConfig

JOB: dict[str, Any] = {"peer": "session", "model": "m", "rows": 8, "tokens": 128, "steps": 4, "threads": 2}


def entry(name: str, decode: float, prefill: float = 100.0, **changed: Any) -> dict[str, Any]:
    job = {**JOB, **changed}
    return {"name": name, "job": job, "prefill_ms": prefill, "decode_ms": [decode, decode, 9e9], "peak_mib": 500.0}


def a_round(factor: float, *entries: dict[str, Any]) -> dict[str, Any]:
    scaled = [{**e, "decode_ms": [factor * ms for ms in e.get("decode_ms", [])]} for e in entries]
    machine = {"load": 0.1, "cores": 2, "processor": "P", "rational": "native kernel"}
    return {**machine, "time": f"2026-01-0{factor:.0f}", "measured": scaled}


ROUNDS = [a_round(factor, entry("iapt-8", 10.0), entry("lora-all", 15.0)) for factor in (1, 2, 4)]
LORA = Goal("", "decode", "iapt-8", "lora-all", 8, 1.3)


def test_a_steps_figure_is_the_median_of_a_round_and_of_rounds() -> None:
    found = figures_of(ROUNDS[0])["iapt-8", 8]
    assert found == {"prefill": 100.0, "decode": 10.0, "peak": 500.0, "needed": 0.0, "weights": 0.0}
    assert typical(ROUNDS)["iapt-8", 8]["decode"] == 20.0


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios(ROUNDS, LORA) == pytest.approx([1.5] * 3)
    uneven = [*ROUNDS[:2], a_round(8, entry("iapt-8", 10.0))]
    assert ratios(uneven, LORA) == pytest.approx([1.5] * 2), "a round without one of the two does not count"
    assert ratios([a_round(1, entry("iapt-8", 10.0))], LORA) == []


def test_memory_is_counted_beyond_the_runtime() -> None:
    own = {**entry("plain", 1.0), "weights_mib": 350.0, "cache_mib": 50.0}
    base = {**entry("base", 1.0), "peak_mib": 60.0}
    figures = typical([a_round(1, own, base)])
    assert memory(figures, "plain", 8) == pytest.approx(440 / 400)
    assert memory(figures, "plain", 1) is None and memory(typical([a_round(1, own)]), "plain", 8) is None
    few, many = ({**entry(f"iapt-{n}", 1.0), "peak_mib": 500.0 + 2 * n, "weights_mib": 1.0 * n} for n in (8, 64))
    assert tenant_cost(typical([a_round(1, few, many)])) == pytest.approx(2.0)
    assert tenant_cost(typical([a_round(1, few)])) is None


def test_the_page_says_what_was_met_missed_and_not_measured(tmp_path: Path) -> None:
    broken = {"name": "peft-all", "job": JOB, "error": "ImportError: no peft"}
    rounds = [*ROUNDS, a_round(3, entry("iapt-8", 10.0), entry("lora-all", 12.0), broken)]
    trace = {"requests": 3, "time": "1"}
    for kind, speed in (("continuous", 30.0), ("static", 20.0), ("whole", 15.0)):
        trace[kind] = {"tokens_per_s": speed, "first_token_s": 1.0, "answer_s": 2.0}  # type: ignore[assignment]
    memory = [(n, 100.0 + n) for n in range(10)]
    found = Soak(answered=9, memory_mib=memory, idle_add_ms=[0.4, 9.0, 0.3], add_ms=[*range(20, 70), *range(60, 110)])
    soaked = {"minutes": 1.0, **found.to_dict()}
    records = Records(rounds, [trace], [soaked])
    page = "\n".join(lines_of(records))
    assert (
        "decode: against LoRA of seven projections, same session | 8 | at least 1.30 | 1.50 (1.20 to 1.50) | met"
        in page
    )
    assert (
        "prefill: against LoRA of seven projections, same session | 8 | at least 1.10 | 1.00 (1.00 to 1.00) | missed"
        in page
    )
    assert "against genai, int4 | 8 | at least 0.95 |  | not measured" in page
    assert (
        "over static ones that rows leave when they are finished | 8 | at least 1.7 | 1.50 (1.50 to 1.50) | missed"
        in page
    )
    assert "as in `generate` of transformers and genai | 8 | at least 1.7 | 2.00 (2.00 to 2.00) | met" in page
    assert "0 lost, 0 wrong, +6 MiB | met" in page
    assert "Form of `ai.iapt::Rational`: native kernel." in page
    assert "50 ms | 0.4 ms in the median (9 in the 99th percentile, 9 at most) | met" in page
    assert "50 ms | 64 ms in the median (108 in the 99th percentile, 109 at most) | missed" in page
    assert failures(rounds) == [f"{TITLES['peft-all']}, 8 rows: ImportError: no peft"]
    assert failures(rounds)[0] in page
    path = tmp_path / "benchmarks.md"
    write_report(records, path)
    assert path.read_text() == page + "\n"
    path.write_text(f"old\n\n{BY_HAND}\n\nWe think.\n")
    write_report(records, path)
    assert path.read_text() == f"{page}\n\n{BY_HAND}\n\nWe think.\n"
    for name in ("serving", "soak"):
        assert (tmp_path / "images" / f"{name}.png").stat().st_size > 1000


def test_every_goal_is_about_cases_that_are_measured() -> None:
    assert {name for goal in GOALS for name in (goal.own, goal.other)} <= set(TITLES)


def arguments(tmp_path: Path, **changed: Any) -> argparse.Namespace:
    fields = {"prepared": tmp_path, "genai": [], "genai_python": "python", "model": "m", "optimum": None}
    return argparse.Namespace(**{**fields, "steps": 4, "threads": 2, **changed})


def test_cases_are_the_bundles_that_stand_there_and_the_peers_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "iapt-8").mkdir()
    (tmp_path / "iapt-8" / "manifest.json").write_text("{}")
    found = list(cases(arguments(tmp_path, genai=[("int4", "g")], optimum="o", optimum_python="other")))
    names = ["base", "iapt-8", "genai-int4", "transformers", "peft-qv", "peft-all", "optimum"]
    assert [case.name for case in found] == names * 2
    assert [case.job.rows for case in found] == [1] * 7 + [8] * 7
    assert {case.name: case.python for case in found}["optimum"] == "other"
    assert set(names) - {"base"} <= set(TITLES)


def asked(case: Case) -> dict[str, Any]:
    with contextlib.closing(Worker(case)) as worker:
        return worker.measure()


def test_a_failing_peer_leaves_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("x", Job(**{**JOB, "peer": "nobody"}), sys.executable)
    assert asked(case) == {
        "error": "peer 'nobody' is not known; use one of session, base, genai, transformers, peft, optimum"
    }
    monkeypatch.setattr(serving, "TIMEOUT_S", 0.01)
    assert asked(Case("x", Job(**{**JOB, "peer": "base"}), sys.executable)) == {"error": "exit code -9"}


def test_a_tiny_bundle_is_made_measured_and_reported(tmp_path: Path) -> None:
    folder = save_tiny_backbone(
        tmp_path / "model", tiny_llama(num_hidden_layers=1, vocab_size=40000, max_position_embeddings=1024)
    )
    backbone = load_backbone(str(folder))
    make_bundle(BundlePlan(IAPTConfig(bottleneck=8), tenants=8), backbone, tmp_path / "prepared" / "iapt-8")
    job = Job("session", str(tmp_path / "prepared" / "iapt-8"), rows=2, tokens=5, steps=4, threads=1, tenants=8)
    made = work(job, *PEERS["session"](job))
    assert made["prefill_ms"] > 0 and len(made["decode_ms"]) == 3 and made["peak_mib"] > 10
    words = ["run", "--prepared", tmp_path / "prepared", "--results", tmp_path / "results", "--rounds", "1"]
    assert main([str(word) for word in [*words, "--steps", "2", "--only", "iapt-8"]]) == 0
    records = [path.read_text() for path in (tmp_path / "results").glob("round-*.json")]
    measured = [each for record in records for each in json.loads(record)["measured"]]
    found = sorted((each["name"], each["job"]["rows"], each.get("error")) for each in measured)
    assert found == [("iapt-8", 1, None), ("iapt-8", 8, None)]
    assert not any(str(tmp_path) in record for record in records), "records name no machine's folders"
    assert measured[0]["weights_mib"] > measured[0]["cache_mib"] > 0
    (batching,) = compare_batching(tmp_path / "prepared" / "iapt-8", rounds=1, count=3)
    assert batching["requests"] == 3 and all(
        v > 0 for kind in ("continuous", "static", "whole") for v in batching[kind].values()
    )
    *_, state = soak(tmp_path / "prepared" / "iapt-8", 2.0, clients=2, length=3)
    assert (
        state.answered > 0
        and len(state.add_ms) > 1
        and len(state.idle_add_ms) > 1
        and not state.wrong
        and not state.lost
    )
    assert main(["run", "--only", "base", "--results", str(tmp_path / "other"), "--rounds", "1"]) == 0
    output = tmp_path / "docs" / "benchmarks.md"
    assert main(["report", "--results", str(tmp_path / "results"), "--output", str(output)]) == 0
    assert "ours, 8 IAPT tenants | 8 |" in output.read_text()


def test_a_trace_is_the_same_for_all_who_play_it() -> None:
    one, other = (make_trace(["a", "b"], 100, 20) for _ in range(2))
    assert one == other and [arrival.request.tenant for arrival in one] == ["a", "b"] * 10
    assert sorted(arrival.seconds for arrival in one) == [arrival.seconds for arrival in one]
    assert all(16 <= len(a.request.tokens) <= 128 and 4 <= a.request.max_new_tokens <= 256 for a in one)


def test_nothing_to_measure_or_to_report_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing to measure; run prepare first"):
        main(["run", "--prepared", str(tmp_path), "--only", "iapt-8", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no rounds; use run first"):
        main(["report", "--results", str(tmp_path)])
