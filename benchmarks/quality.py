"""How good is IAPT beside its siblings: ``python benchmarks/quality.py run``, then ``... report``.

``run`` trains every method at a matched parameter budget on the same data and seeds, then IAPT's ablations. Each
finished run leaves a record in ``benchmarks/results/quality`` and is not done again, so an interrupted plan goes on
where it stopped. ``report`` writes ``docs/results.md`` and its plots from the records alone.

    python benchmarks/quality.py run --seeds 1         # --budget small, everything once: hours on 2 cores
    python benchmarks/quality.py run                   # the same with a second seed; what is done stays done
    python benchmarks/quality.py run --budget full     # for a GPU, which is used where there is one
    python benchmarks/quality.py run --only rates main --seeds 1
    python benchmarks/quality.py report
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.quality_plan import BUDGETS, PHASES, Budget, Run, all_runs, runs_of, variants  # noqa: E402
from benchmarks.quality_records import (  # noqa: E402
    Record,
    chosen_rates,
    machine,
    make_record,
    make_splits,
    read_records,
    record_path,
    write_json,
)

MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
RESULTS = ROOT / "benchmarks" / "results" / "quality"
SPLITS = ROOT / ".cache" / "quality"
PLAN_FILE = "plan.json"
FIRST_GUESS_S = 150.0
"""Seconds of a run before the first one was measured."""
Say = Callable[[str], None]


def execute(run: Run, model: str, splits: Mapping[str, Path], say: Say) -> dict[str, Any]:
    """Train and evaluate, or evaluate the plain backbone: the outcome of one run, see `make_record`.

    A training that breaks down, as a too large learning rate makes it, is an outcome too.
    """
    from iapt_export.contract.errors import IaptError
    from trainers.training.config import TrainRequest
    from trainers.training.data import find_labels, read_examples
    from trainers.training.train import evaluate_adapter, train

    start = time.monotonic()
    config = run.train_config
    if run.config is None:
        labels = find_labels(read_examples(splits["train"]), config.task)
        report = evaluate_adapter(model, None, splits[run.split], config, labels=labels, say=say)
        return {"report": report.to_dict(), "seconds": {"total": time.monotonic() - start}}
    config = dataclasses.replace(config, eval_file=str(splits[run.split]))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = train(TrainRequest(model, splits["train"], Path(scratch) / "adapter", run.config, config), say=say)
        except IaptError as error:
            if "loss" not in str(error):  # anything but a training that diverged is ours to fix, not to record
                raise
            return {"error": str(error), "seconds": {"total": time.monotonic() - start}}
    assert result.report is not None
    seconds = {"fit": result.seconds, "total": time.monotonic() - start}
    return {"report": result.report.to_dict(), "history": result.history, "steps": result.steps, "seconds": seconds}


def expected_seconds(run: Run, records: Iterable[Record]) -> float:
    """A run's duration by the nearest relatives done on this machine: same task and method, same task, or any."""
    settings, here = run.settings, machine()
    relatives: dict[tuple[bool, bool], list[float]] = {}
    for record in records:
        other = record["settings"]
        is_alike = (other["method"] is None) == (settings["method"] is None) and "report" in record
        if is_alike and record["machine"] == here and _num_steps(other) == _num_steps(settings):
            nearness = other["task"] == settings["task"], other["method"] == settings["method"]
            relatives.setdefault(nearness, []).append(record["seconds"]["total"])
    if not relatives:
        return FIRST_GUESS_S if run.config is not None else FIRST_GUESS_S / 5
    nearest = relatives[max(relatives)]
    return sum(nearest) / len(nearest)


def _num_steps(settings: Mapping[str, Any]) -> int:
    """Optimiser steps; 0 for the plain backbone."""
    return int(settings["train"]["max_steps"]) if settings["method"] else 0


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def run_phase(phase: str, budget: Budget, arguments: argparse.Namespace, splits: dict[str, Any]) -> None:
    """Do a phase's missing runs."""
    records = read_records(arguments.results)
    chosen = chosen_rates(budget, records)
    missing = [variant.label for variant in variants(budget) if variant.label not in chosen]
    if phase not in ("baseline", "rates") and missing:
        sys.exit(f"no learning rate was chosen yet for {', '.join(missing)}; run the phase 'rates' first")
    runs = runs_of(phase, budget, chosen)
    for number, run in enumerate(runs, start=1):
        if run.key in records:
            continue
        started = time.monotonic()
        print(f"{phase} {number}/{len(runs)}  {run.title}", flush=True)
        say: Say = (lambda line: print(f"    {line}", flush=True)) if arguments.verbose else lambda line: None
        outcome = execute(run, arguments.model, splits[run.task], say)
        records[run.key] = make_record(run, outcome)
        write_json(record_path(arguments.results, run), records[run.key])
        left = [
            other
            for other in all_runs(budget, chosen_rates(budget, records))
            if other.phase in arguments.only and other.key not in records
        ]
        seconds = sum(expected_seconds(other, records.values()) for other in left)
        print(f"    {told(outcome)}, {time.monotonic() - started:.0f} s; about {duration(seconds)} left", flush=True)


def told(outcome: Mapping[str, Any]) -> str:
    """An outcome in a few words."""
    if "error" in outcome:
        return f"diverged ({outcome['error']})"
    report = outcome["report"]
    return f"accuracy {report['accuracy']:.3f}" if "accuracy" in report else f"loss {report['loss']:.4f} per token"


def run_plan(arguments: argparse.Namespace) -> int:
    """Do all chosen phases."""
    from prepare_data import prepare

    budget = budget_of(arguments)
    runs = all_runs(budget, {})
    splits = {
        task: make_splits(*prepare(task), arguments.splits / budget.name, budget)
        for task in dict.fromkeys(run.task for run in runs)
    }
    chosen = {name: getattr(arguments, name) for name in ("budget", "seeds", "steps")}
    write_json(arguments.results / PLAN_FILE, chosen)
    print(f"{len(runs)} runs in all, {budget.steps} steps each, on {machine()}")
    try:
        for phase in PHASES:
            if phase in arguments.only:
                run_phase(phase, budget, arguments, splits)
    except KeyboardInterrupt:
        print("\nstopped; finished runs are kept, the same command goes on with the rest")
        return 130
    return 0


def write_results(arguments: argparse.Namespace) -> int:
    """Write the report of the last run's plan."""
    from benchmarks.quality_report import write_report

    path = arguments.results / PLAN_FILE
    if not path.is_file():
        sys.exit(f"{path} does not exist; run the plan first")
    for name, value in json.loads(path.read_text(encoding="utf-8")).items():
        setattr(arguments, name, value)
    write_report(budget_of(arguments), read_records(arguments.results), arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def budget_of(arguments: argparse.Namespace) -> Budget:
    """The named budget with what the command line changes."""
    given = {name: value for name in ("seeds", "steps") if (value := getattr(arguments, name)) is not None}
    return dataclasses.replace(BUDGETS[arguments.budget], **given)


def main(words: list[str] | None = None) -> int:
    """Run or report; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate what has no record yet")
    run.add_argument("--budget", choices=BUDGETS, default="small", help="default: %(default)s")
    run.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), metavar="PHASE", help=", ".join(PHASES))
    run.add_argument("--seeds", type=int, help="seeds per run of main, generation and ablations")
    run.add_argument("--steps", type=int, help="optimiser steps per run")
    run.add_argument("--model", default=str(MODEL), help="folder of the converted backbone")
    run.add_argument("--splits", type=Path, default=SPLITS, help="folder for the data's splits")
    run.add_argument("--verbose", action="store_true", help="show the trainer's own lines")
    report = commands.add_parser("report", help="write docs/results.md and its plots from the records")
    report.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md", help="file to write")
    for command in (run, report):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    arguments = parser.parse_args(words)
    return run_plan(arguments) if arguments.command == "run" else write_results(arguments)


if __name__ == "__main__":
    sys.exit(main())
