"""How good is IAPT beside its siblings: ``python benchmarks/quality.py run``, then ``... report``.

``run`` trains every method at a matched parameter budget on the same data and seeds, then IAPT's ablations. Each
finished run adds a line to ``benchmarks/results/quality.jsonl`` and is not done again, so an interrupted plan goes on
where it stopped. ``report`` puts the tables and plots of ``docs/results.md`` in their places, from the records alone.

    python benchmarks/quality.py run --seeds 1         # --budget small, everything once: hours on 2 cores
    python benchmarks/quality.py run                   # the same with a second seed; what is done stays done
    python benchmarks/quality.py run --budget full     # for a GPU, which is used where there is one
    python benchmarks/quality.py run --only rates main --seeds 1
    python benchmarks/quality.py run --only rounded    # trained on fp32 and on int4, evaluated on both
    python benchmarks/quality.py run --only formats second-rates second --second-model gemma-3-270m-q4_k_m.gguf
    python benchmarks/quality.py report
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.pages import MODEL, RESULTS, append_record, read_records  # noqa: E402
from benchmarks.quality_plan import (  # noqa: E402
    BUDGETS,
    GEMMA,
    MAX_CHARACTERS,
    ON_SECOND,
    PHASES,
    SECOND,
    TASKS,
    VARIANTS,
    Budget,
    Run,
    runs_of,
)
from benchmarks.quality_records import chosen_rates, score  # noqa: E402
from benchmarks.quality_tables import draw, tables  # noqa: E402


def execute(run: Run, model: str, splits: Mapping[str, Path], say: Callable[[str], None]) -> dict[str, Any]:
    """Train and evaluate, or evaluate the plain backbone: what the record says of the outcome.

    Where it is evaluated on other weights too, ``on`` has the score on each. A training that breaks down, as a too
    large learning rate makes it, is an outcome too.
    """
    from trainers.training.config import TrainRequest
    from trainers.training.data import find_labels
    from trainers.training.evaluate_adapter import evaluate_adapter
    from trainers.training.loop import DivergedError
    from trainers.training.records import read_examples
    from trainers.training.train import train

    config = run.train_config
    if run.config is None:
        labels = find_labels(read_examples(splits["train"]), config.task)
        return figures(evaluate_adapter(model, None, splits[run.split], config, labels=labels, say=say))
    config = dataclasses.replace(config, eval_file=str(splits[run.split]))
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        try:
            result = train(TrainRequest(model, splits["train"], adapter, run.config, config), say=say)
        except DivergedError as error:
            return {"error": str(error)}
        reports = {run.weights: figures(result.report)}
        for weights in run.others:
            other = dataclasses.replace(config, weights=weights)
            reports[weights] = figures(evaluate_adapter(model, adapter, splits[run.split], other, say=say))
    on = {"on": {weights: score(report) for weights, report in reports.items()}} if run.others else {}
    return {**reports[run.weights], **on}


def figures(report: Any) -> dict[str, Any]:
    """What a record keeps of an evaluation; the share of the label that is given most often shows a stuck training."""
    from trainers.training.evaluate import GenerationReport

    if isinstance(report, GenerationReport):
        return {"count": report.count, "loss": report.loss}
    given = [sum(column) for column in zip(*report.confusion, strict=True)]
    shares = {"accuracy": report.accuracy, "majority_accuracy": report.majority_accuracy}
    shares["top_label_share"] = max(given) / report.count
    return {"count": report.count, **shares}


def machine() -> str:
    """The device that trains, in a few words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def run_phase(phase: str, budget: Budget, arguments: argparse.Namespace, splits: Mapping[bool, Any]) -> None:
    """Do a phase's missing runs."""
    done = {record["key"]: record for record in read_records(arguments.results)}
    chosen = chosen_rates(budget, done)
    first, compared = ("second-rates", SECOND) if phase == "second" else ("rates", VARIANTS)
    missing = [variant.label for variant in compared if variant.label not in chosen]
    if phase not in ("baseline", "rates", "formats", "second-rates") and missing:
        sys.exit(f"no learning rate was chosen yet for {', '.join(missing)}; run the phase '{first}' first")
    left = [run for run in runs_of(phase, budget, chosen) if run.key not in done]
    for number, run in enumerate(left, start=1):
        print(f"{phase} {number}/{len(left)}  {run.task.name} · {run.label} · rate {run.learning_rate:.2g}", flush=True)
        start = time.monotonic()
        model = arguments.second_model if phase in ON_SECOND else arguments.model
        own = splits[run.backbone.prompt_format == "chat"][run.task.name]
        outcome = execute(run, model, own, print if arguments.verbose else lambda line: None)
        about = {
            "seconds": round(time.monotonic() - start, 1),
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        append_record(arguments.results, {**run.summary, **outcome, **about})
        print(f"    {outcome.get('error', score(outcome))}, {about['seconds']:.0f} s", flush=True)


def run_plan(arguments: argparse.Namespace) -> int:
    """Do all chosen phases."""
    from prepare_data import make_splits, prepare

    budget = budget_of(arguments)
    folder = arguments.splits / budget.name
    splits = {
        chat: {
            task.name: make_splits(
                *prepare(task.name), folder / ("chat" if chat else "text"), budget.rows, MAX_CHARACTERS, chat=chat
            )
            for task in TASKS
        }
        for chat in (True, False)
    }
    try:
        for phase in PHASES:
            if phase in arguments.only and phase in ON_SECOND and not arguments.second_model:
                print(f"{phase} is left out; it needs --second-model, {GEMMA.name}'s GGUF file or folder")
            elif phase in arguments.only:
                run_phase(phase, budget, arguments, splits)
    except KeyboardInterrupt:
        print("\nstopped; finished runs are kept, the same command goes on with the rest")
        return 130
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Put tables and plots in their places."""
    from benchmarks.pages import write_tables

    budget, records = budget_of(arguments), {record["key"]: record for record in read_records(arguments.results)}
    wanted = {run.key for phase in PHASES for run in runs_of(phase, budget, chosen_rates(budget, records))}
    hours = sum(records[key]["seconds"] for key in wanted & records.keys()) / 3600
    print(f"{len(wanted & records.keys())} of {len(wanted)} runs are done, in {hours:.1f} hours")
    write_tables(arguments.page, tables(budget, records))
    draw(budget, records, arguments.page.parent / "images")
    return 0


def budget_of(arguments: argparse.Namespace) -> Budget:
    """The named budget with what the command line changes."""
    given = {name: value for name in ("seeds", "steps") if (value := getattr(arguments, name)) is not None}
    return dataclasses.replace(BUDGETS[arguments.budget], **given)


def main(words: list[str] | None = None) -> int:
    """Run or report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate what has no record yet")
    page = commands.add_parser("report", help="write the tables and plots of docs/results.md from the records")
    for command in (run, page):
        command.add_argument("--budget", choices=BUDGETS, default="small", help="default: %(default)s")
        command.add_argument("--seeds", type=int, help="seeds of each run of main and ablations")
        command.add_argument("--steps", type=int, help="optimiser steps of each run")
        command.add_argument("--results", type=Path, default=RESULTS / "quality.jsonl", help="file of the records")
    run.add_argument("--only", nargs="+", choices=PHASES, default=PHASES, metavar="PHASE", help=", ".join(PHASES))
    run.add_argument("--model", default=str(MODEL), help="folder of the converted backbone")
    run.add_argument("--second-model", metavar="MODEL", help=f"{GEMMA.name}, for the phases on a second backbone")
    run.add_argument("--splits", type=Path, default=ROOT / ".cache" / "quality", help="folder for the data's splits")
    run.add_argument("--verbose", action="store_true", help="show the trainer's own lines")
    page.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="page to write into")
    arguments = parser.parse_args(words)
    return run_plan(arguments) if arguments.command == "run" else report(arguments)


if __name__ == "__main__":
    sys.exit(main())
