"""What an earlier run left at the output and beside it: what is kept, what is gone on from, what is only reported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.schema import read_object
from trainers.adapters.adapter import CONFIG_FILE, EXAMPLES_FILE, WEIGHTS_FILE, Adapter
from trainers.adapters.directory import load_adapter
from trainers.training.card import CARD_FILE, CURVE_FILE, REPORT_FILE
from trainers.training.config import TrainRequest
from trainers.training.evaluate import Report, report_from_dict
from trainers.training.work import (
    FINISHED,
    RECORD_FILE,
    differences,
    foreign_files,
    is_unfinished,
    publish,
    read_record,
    work_folder,
)

OUR_FILES = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, CURVE_FILE, REPORT_FILE, EXAMPLES_FILE, RECORD_FILE}
"""All that an adapter directory holds; a folder with anything else in it is never replaced."""


@dataclass
class TrainResult:
    """What `train` did."""

    output: Path
    """The adapter directory."""
    steps: int
    """Optimiser steps of the whole run."""
    history: list[tuple[int, float]]
    """(step, mean training loss since the step before)."""
    report: Report | None
    """The adapter on the evaluation data; None on all but the first process."""
    baseline: Report | None
    """The plain backbone on the same data."""
    seconds: float
    """Wall-clock time of the fit, that of the runs it went on from included."""

    @property
    def adapter(self) -> Adapter:
        """The trained adapter, read from its directory."""
        return load_adapter(self.output)


def find_finished(request: TrainRequest, record: dict[str, Any], say: Callable[[str], None]) -> TrainResult | None:
    """What an earlier run finished and this one only has to report; None where there is something to train.

    Raises:
        IaptError: what stands at the output, or beside it, is not to be replaced.
    """
    output, config = Path(request.output), request.config
    _check_output(output)
    work, stands = work_folder(output), (output / CONFIG_FILE).is_file()
    if unfinished := is_unfinished(work):
        if not config.resume:
            raise IaptError(
                f"{work} holds checkpoints of an unfinished run; give --resume to go on with it, or delete the folder "
                "to start anew"
            )
        if (there := read_record(work).get("settings")) and (told := differences(there, record)):
            raise IaptError(
                f"{work} was written by a run with other settings: {told}; resume with the same settings, or delete "
                "the folder and start anew"
            )
    elif config.resume and stands and not differences(read_record(output).get("settings") or {}, record):
        if int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(work, ignore_errors=True)  # what a run that was killed at its very end had still to remove
        say(f"{output} is finished and stays as it is; --overwrite without --resume trains it again")
        return _read_result(output)
    if stands and not config.overwrite:
        there = read_record(output).get("settings")
        told = differences(there, record) if config.resume and there else ""
        raise IaptError(
            f"{output} holds a finished adapter{f' of other settings ({told})' if told else ''}, and training writes "
            "a new one; give --overwrite to replace it when the new one is done, or another --output"
        )
    if unfinished and (work / FINISHED).is_dir():
        if int(os.environ.get("RANK", "0")) == 0:
            publish(work, output)
        say(f"the run was finished and is not repeated; moved its adapter to {output}")
        return _read_result(output)
    return None


def _read_result(output: Path) -> TrainResult:
    """What the run that wrote an adapter returned, but for its time."""
    remedy = "give --overwrite without --resume to train the adapter again"
    try:
        record, scores = read_record(output), read_object(output / REPORT_FILE, remedy)
        history = [(step, loss) for step, loss in record["history"]]
        report, baseline = (report_from_dict(scores[name]) for name in ("adapter", "baseline"))
        return TrainResult(output, record["steps"], history, report, baseline, 0.0)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise IaptError(f"what {output} says of its own run cannot be read ({error!r}); {remedy}") from error


def _check_output(output: Path) -> None:
    """Refuse to replace what is not ours."""
    if output.exists():
        names = {path.name for path in output.iterdir()} if output.is_dir() else set()
        strangers = sorted(names - OUR_FILES)
        if not output.is_dir() or strangers or (names and CONFIG_FILE not in names):
            what = f"it holds {', '.join(strangers[:5])}" if strangers else "it is no adapter directory"
            raise IaptError(f"{output} exists and is not replaced, because {what}; choose another output")
    work = work_folder(output)
    if strangers := foreign_files(work):
        raise IaptError(
            f"{work} is where training would keep its checkpoints until it removes the folder, and it holds "
            f"{', '.join(strangers[:5])}; move that away or choose another output"
        )
