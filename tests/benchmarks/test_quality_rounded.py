"""The comparison of weights that are met in training with those that answer, on made-up scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks import quality
from benchmarks.quality_plan import VARIANTS, runs_of
from benchmarks.quality_records import chosen_rates
from benchmarks.quality_tables import tables
from tests.benchmarks.test_quality import SMALL, fake_records
from trainers.training.evaluate import ClassificationReport


def test_rounded_weights_are_met_in_training_or_in_the_answer(monkeypatch):
    from trainers.training import evaluate_adapter as evaluating
    from trainers.training import train as training

    runs = runs_of("rounded", SMALL, {})
    assert {(run.weights, run.others) for run in runs} == {("fp32", ("int4",)), ("int4", ("fp32",))}
    own = dataclasses.replace(runs[0], others=())
    assert (own.weights, own.key) == ("fp32", runs_of("main", SMALL, {})[2 * len(VARIANTS)].key)
    assert len({run.key for run in runs}) == len(runs) and not {run.key for run in runs} & {
        run.key for run in runs_of("main", SMALL, {})
    }
    seen = []

    def fake(accuracy):
        report = ClassificationReport(("a", "b"), 10, accuracy, 0.5, {"a": 1.0}, ((5, 0), (4, 1)))
        return type("Result", (), {"report": report}) if accuracy == 0.7 else report

    def trained(request, say):
        seen.append(request.config.weights)
        return fake(0.7)

    def evaluated(model, adapter, data, config, say):
        seen.append(config.weights)
        return fake(0.6)

    monkeypatch.setattr(training, "train", trained)
    monkeypatch.setattr(evaluating, "evaluate_adapter", evaluated)
    made = quality.execute(runs[1], "model", {"train": Path("t"), "test": Path("e")}, print)
    assert (seen, made["accuracy"], made["on"]) == (["int4", "fp32"], 0.7, {"int4": 0.7, "fp32": 0.6})
    levels = {"fp32": 0.6, "int4": 0.9}
    records = fake_records(accuracy=lambda run: levels[run.weights])
    for run in runs_of("rounded", SMALL, chosen_rates(SMALL, records)):
        records[run.key]["on"]["int4"] -= 0.1
    header, _, first, *_ = tables(SMALL, records)["rounded reuters-r8"].splitlines()
    assert header.count("trained on") == 4 and header.index("fp32, served in int4") < header.index("trained on int4")
    cells = [f"{score} ± 0.0" for score in ("60.0", "50.0", "90.0", "80.0")]
    assert first == f"| IAPT | {cells[0]} | {cells[1]} | {cells[2]} | {cells[3]} |"
