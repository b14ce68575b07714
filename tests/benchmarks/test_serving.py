"""The serving benchmark's own arithmetic and its worker; not the timings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.pages import append_record, read_records
from benchmarks.serving import cases, main
from benchmarks.serving_bundles import BundlePlan, make_bundle
from benchmarks.serving_load import compare_batching, make_trace
from benchmarks.serving_peers import PEERS, Job
from benchmarks.serving_peers import measure as work
from benchmarks.serving_tables import (
    GOALS,
    TITLES,
    Goal,
    goal_rows,
    memory,
    ratios,
    tables,
    tenant_cost,
    typical,
)
from benchmarks.serving_tables import cases as serving_cases
from tests.engines.serving.soak import Soak, soak, spread
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import IAPTConfig

JOB: dict[str, Any] = {"peer": "session", "model": "m", "rows": 8, "tokens": 128, "steps": 4, "threads": 2}


def case(decode: float, **changed: float) -> dict[str, Any]:
    return {
        "prefill_ms": 100.0,
        "decode_ms": decode,
        "peak_mib": 500.0,
        "weights_mib": 0.0,
        "cache_mib": 0.0,
        **changed,
    }


def a_round(**found: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "round", "rows": 8, "cases": {name.replace("_", "-"): figures for name, figures in found.items()}}


ROUNDS = [a_round(iapt_8=case(10.0 * factor), lora_all=case(15.0 * factor)) for factor in (1, 2, 4)]
LORA = Goal("decode", "", "iapt-8", "lora-all")


def test_a_steps_figure_is_the_median_of_rounds() -> None:
    assert typical(ROUNDS, "iapt-8", 8)["decode_ms"] == 20.0
    assert typical(ROUNDS, "iapt-8", 1) == {} and typical(ROUNDS, "plain", 8) == {}


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios(ROUNDS, LORA, 8) == pytest.approx([1.5] * 3)
    uneven = [a_round(iapt_8=case(80.0)), *ROUNDS[:2]]
    assert ratios(uneven, LORA, 8) == pytest.approx([1.5] * 2), "a round without one of the two does not count"
    assert ratios(uneven[:1], LORA, 8) == []
    failed = a_round(iapt_8=case(80.0), lora_all={"error": "no"})
    assert ratios([failed], LORA, 8) == [] and serving_cases([failed], "lora-all", 8) == [{}]


def test_memory_is_counted_beyond_the_runtime() -> None:
    own, base = case(1.0, weights_mib=350.0, cache_mib=50.0), case(1.0, peak_mib=60.0)
    assert memory([a_round(plain=own, base=base)], 8) == pytest.approx([440 / 400])
    assert memory([a_round(plain=own, base=base)], 1) == memory([a_round(plain=own)], 8) == []
    few, many = (case(1.0, peak_mib=500.0 + 2 * n, weights_mib=1.0 * n) for n in (8, 64))
    assert tenant_cost([a_round(iapt_8=few, iapt_64=many)]) == pytest.approx([2.0])
    assert tenant_cost([a_round(iapt_8=few)]) == []


@pytest.fixture
def records() -> list[dict[str, Any]]:
    broken = a_round(iapt_8=case(10.0), lora_all=case(12.0), peft_all={"error": "ImportError: no peft"})
    kinds = (("continuous", 30.0), ("static", 20.0), ("whole", 15.0))
    batches = {kind: {"tokens_per_s": speed, "first_token_s": 1.0, "answer_s": 2.0} for kind, speed in kinds}
    memory = [(n, 100.0 + n) for n in range(10)]
    state = Soak(None, {}, answered=9, memory_mib=memory, idle_add_ms=[0.4, 9.0, 0.3])  # type: ignore[arg-type]
    state.add_ms = [*range(20, 70), *range(60, 110)]
    soaked = {"kind": "soak", "minutes": 1.0, **state.record()}
    rounds = [{"without": 10.0, "with": 15.0}, {"without": 10.0, "with": 30.0}, {"without": 20.0, "with": 30.0}]
    drafts = {"kind": "drafts", "dtype": "fp32", "rows": 8, "tasks": "copying", "rounds": rounds}
    drafted = [{**drafts, "drafted": 4, "accepted": 1}, {**drafts, "drafted": 0, "accepted": 0, "rows": 1}]
    return [*ROUNDS, broken, *drafted, {"kind": "trace", "requests": 3, "batches": batches}, soaked]


def test_the_tables_say_what_was_met_missed_and_not_measured(records: list[dict[str, Any]]) -> None:
    rows = {(what, rows): rest for what, rows, *rest in goal_rows(records)}
    large = "against LoRA of seven projections, same session"
    assert rows[f"decode: {large}", "8"] == ["at least 1.30", "1.50 (1.20 to 1.50)", "met"]
    assert rows[f"prefill: {large}", "8"] == ["at least 1.10", "1.00 (1.00 to 1.00)", "missed"]
    assert rows["decode: against genai, int4", "8"] == ["at least 1.30", "not measured", ""]
    assert rows["peak memory beyond the runtime's, over weights and cache", "8"] == ["at most 1.05", "not measured", ""]
    batches = {what.rpartition(" ")[2]: rest for (what, _), rest in rows.items() if what.startswith("throughput")}
    assert batches["finished"] == ["at least 1.70", "1.50 (1.50 to 1.50)", "missed"]
    assert batches["genai"] == ["at least 1.70", "2.00 (2.00 to 2.00)", "met"]
    flat = ["none lost, none wrong, flat memory", "0 lost, 0 wrong, +6 MiB", "met"]
    assert rows["soak of 1 minutes", "8"] == flat
    idle = ["at most 50 ms", "0.4 ms (9 in the 99th percentile, 9 at most)", "met"]
    assert rows["a tenant added to an idle session: median", "8"] == idle
    late = ["at most 50 ms", "64.5 ms (108 in the 99th percentile, 109 at most)", "missed"]
    assert rows["a tenant added during the soak: median", "8"] == late
    cases = tables(records)["cases"]
    assert f"| {TITLES['iapt-8']} | 8 | 100 | 15.0 | 533 | 500 |" in cases
    assert f"| {TITLES['peft-all']} | 8 | ImportError: no peft |" in cases
    assert f"| {TITLES['optimum']} | 8 | not measured |" in cases
    drafts = tables(records)["drafts"]
    assert "| fp32, answers that copy | 8 | 10 | 30 | 1.50 (1.50 to 3.00) | 25 % |" in drafts
    assert drafts.endswith("| none drafted |")


def test_one_lost_or_wrong_answer_is_a_miss(records: list[dict[str, Any]]) -> None:
    for change in ({"lost": ["no"]}, {"wrong": [{}]}, {"memory_mib": [(n, 10.0 * n) for n in range(10)]}):
        rows = {row[0]: row[-1] for row in goal_rows([*records[:-1], {**records[-1], **change}])}
        assert rows["soak of 1 minutes"] == "missed"


def test_a_report_fills_the_pages_tables(records: list[dict[str, Any]], tmp_path: Path) -> None:
    for record in records:
        append_record(tmp_path / "r.jsonl", record)
    page = tmp_path / "benchmarks.md"
    page.write_text("".join(f"<!-- table {name} -->\n<!-- end -->\nWe think.\n" for name in tables(records)))
    assert main(["report", "--results", str(tmp_path / "r.jsonl"), "--page", str(page)]) == 0
    text = page.read_text()
    made = tables(records)
    assert all(content in text for content in made.values()) and text.count("We think.") == len(made)
    for name in ("serving", "soak", "accuracy"):
        assert (tmp_path / "images" / f"{name}.png").stat().st_size > 1000


def test_every_goal_is_about_cases_that_are_measured() -> None:
    assert {name for goal in GOALS for name in (goal.own, goal.other)} <= set(TITLES)


def test_cases_are_the_bundles_that_stand_there_and_the_peers_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "iapt-8").mkdir()
    (tmp_path / "iapt-8" / "manifest.json").write_text("{}")
    fields = {"prepared": tmp_path, "genai": [("int4", "g")], "genai_python": "python", "model": "m"}
    fields |= {"gguf": [("q8_0", "f")], "gguf_python": "third", "openvino_python": "fourth"}
    arguments = argparse.Namespace(**fields, optimum="o", optimum_python="other")
    found = {name: (job, python) for name, job, python in cases(arguments, 8)}
    assert list(found) == [
        "base",
        "iapt-8",
        "genai-int4",
        "llama-q8_0",
        "openvino-q8_0",
        "transformers",
        "peft-qv",
        "peft-all",
        "optimum",
    ]
    assert {job.rows for job, _ in found.values()} == {8}
    assert (
        found["optimum"][1] == "other" and found["llama-q8_0"][1] == "third" and found["openvino-q8_0"][1] == "fourth"
    )
    assert found["iapt-8"][0].tenants == 8
    assert set(found) - {"base"} <= set(TITLES)


def test_a_peer_imports_no_file_that_stands_beside_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``benchmarks/http.py`` stood in for Python's own."""
    (tmp_path / "http.py").write_text("raise SystemExit('not this one')", encoding="utf-8")
    (tmp_path / "worker.py").write_text("import http.client, json\nprint(json.dumps({'decode_ms': 1.5}))")
    monkeypatch.setattr(serving, "WORKER", tmp_path / "worker.py")
    assert serving.measure(Job(**JOB), sys.executable) == {"decode_ms": 1.5}


def test_a_failing_peer_leaves_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = (
        "peer 'nobody' is not known; use one of session, base, genai, transformers, peft, optimum, llama, openvino"
    )
    assert serving.measure(Job(**{**JOB, "peer": "nobody"}), sys.executable) == {"error": problem}
    monkeypatch.setattr(serving, "TIMEOUT_S", 0.01)
    late = {"error": "no answer in 0.01 seconds"}
    assert serving.measure(Job(**{**JOB, "peer": "base"}), sys.executable) == late


def tiny_model(tmp_path: Path) -> Path:
    config = tiny_llama(num_hidden_layers=1, vocab_size=40000, max_position_embeddings=1024)
    return save_tiny_backbone(tmp_path / "model", config)


@pytest.mark.parametrize("peer", ["transformers", "peft"])
def test_a_peer_of_pytorch_is_measured(peer: str, tmp_path: Path) -> None:
    folder = save_tiny_backbone(
        tmp_path / "model", tiny_llama(num_hidden_layers=1, vocab_size=40000, max_position_embeddings=1024)
    )
    job = Job(peer, str(folder), rows=2, tokens=5, steps=4, threads=1, tenants=2, rank=2, modules=("q_proj",))
    prefill, decode = PEERS[peer](job)
    made = work(job, prefill, decode)
    assert made["prefill_ms"] > 0 and made["decode_ms"] > 0 and set(made) == {"prefill_ms", "decode_ms", "peak_mib"}


@pytest.mark.slow
def test_a_tiny_bundle_is_made_measured_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_backbone(
        tmp_path / "model", tiny_llama(num_hidden_layers=1, vocab_size=40000, max_position_embeddings=1024)
    )
    bundle = tmp_path / "prepared" / "iapt-8"
    make_bundle(BundlePlan(IAPTConfig(bottleneck=8), tenants=8), load_backbone(str(folder)), bundle)
    job = Job("session", str(bundle), rows=2, tokens=5, steps=4, threads=1, tenants=8)
    made = work(job, *PEERS["session"](job))
    assert made["prefill_ms"] > 0 and made["decode_ms"] > 0 and made["peak_mib"] > 10
    monkeypatch.setattr(serving, "SIZES", {"tokens": 128, "steps": 3, "threads": 1})
    results = tmp_path / "results.jsonl"
    words = ["run", "--prepared", tmp_path / "prepared", "--results", results, "--rounds", "1", "--only", "iapt-8"]
    assert main([str(word) for word in words]) == 0
    found = read_records(results)
    assert [(record["rows"], list(record["cases"])) for record in found] == [(1, ["iapt-8"]), (8, ["iapt-8"])]
    figures = found[0]["cases"]["iapt-8"]
    assert figures["weights_mib"] > figures["cache_mib"] > 0 and figures["decode_ms"] > 0
    assert str(tmp_path) not in results.read_text(), "records name no machine's folders"
    (batching,) = compare_batching(bundle, rounds=1, count=3)
    assert batching["requests"] == 3 and all(v > 0 for kind in batching["batches"].values() for v in kind.values())
    *_, state = soak(bundle, 2.0, clients=2, length=3)
    assert state.answered > 0 and len(state.add_ms) > 1 and len(state.idle_add_ms) > 1
    assert not state.wrong and not state.lost
    assert state.record()["add_ms"] == spread(state.add_ms)


def test_a_trace_is_the_same_for_all_who_play_it() -> None:
    one, other = (make_trace(["a", "b"], 100, 20) for _ in range(2))
    assert one == other and [request.tenant for _, request in one] == ["a", "b"] * 10
    assert sorted(seconds for seconds, _ in one) == [seconds for seconds, _ in one]
    assert all(16 <= len(each.tokens) <= 128 and 4 <= each.max_new_tokens <= 256 for _, each in one)


def test_nothing_to_measure_or_to_report_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing to measure; run prepare first"):
        main(["run", "--prepared", str(tmp_path), "--only", "iapt-8", "--results", str(tmp_path / "r.jsonl")])
    with pytest.raises(SystemExit, match="holds no rounds; use run first"):
        main(["report", "--results", str(tmp_path / "r.jsonl")])
