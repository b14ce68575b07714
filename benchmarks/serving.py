"""Serve the same tokens with this project and with its peers, in alternating runs, and compare.

    python -m benchmarks.serving all --genai fp32=DIR --genai int4=DIR --genai-python PYTHON --optimum DIR \
        --optimum-python PYTHON

does it all; its parts are

    prepare   the bundles, once
    run       every case, round after round
    trace     continuous against static batches, on requests of mixed lengths and arrivals
    soak      half an hour in which tenants come and go: right answers, no request lost, flat memory
    report    docs/benchmarks.md from the records

``run`` measures every case once a round, in a process of its own, so that slow seconds of the machine fall on all of
them; ratios are medians over rounds. The genai folders come from its own model builder and the same
weights: ``python -m onnxruntime_genai.models.builder -i MODEL -o DIR -p fp32 -e cpu`` (and ``-p int4``); optimum's from
``optimum-cli export onnx -m MODEL --task text-generation-with-past DIR``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.serving_bundles import BUNDLES, SEVEN, make_bundle
from benchmarks.serving_load import compare_batching, soak
from benchmarks.serving_peers import Job
from engines.native import add_kernels
from iapt_export.building.stage_cache import content_key
from trainers.decoder.backbone import load_backbone

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
PREPARED = ROOT / ".cache" / "serving"
RESULTS = ROOT / "benchmarks" / "results" / "serving"
WORKER = ROOT / "benchmarks" / "serving_peers.py"
ROWS = (1, 8)
TOKENS = 128
STEPS = 24
TIMEOUT_S = 600


@dataclass(frozen=True)
class Case:
    """One line of the tables."""

    name: str
    job: Job
    python: str
    """The interpreter of the peer's environment."""


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Everything that the arguments ask for and this machine has."""
    for rows in ROWS:
        sizes: dict[str, Any] = {"rows": rows, "tokens": TOKENS, "steps": arguments.steps, "threads": arguments.threads}
        yield Case("base", Job("base", "", **sizes), sys.executable)
        for name, plan in BUNDLES.items():
            if (arguments.prepared / name / "manifest.json").is_file():
                tenants = 0 if plan.merged else plan.tenants
                yield Case(
                    name, Job("session", str(arguments.prepared / name), tenants=tenants, **sizes), sys.executable
                )
        for dtype, folder in arguments.genai:
            yield Case(f"genai-{dtype}", Job("genai", folder, **sizes), arguments.genai_python)
        yield Case("transformers", Job("transformers", arguments.model, **sizes), sys.executable)
        for name, rank, modules in (("peft-qv", 8, ("q_proj", "v_proj")), ("peft-all", 16, SEVEN)):
            lora: dict[str, Any] = {"tenants": 8, "rank": rank, "modules": modules}
            yield Case(name, Job("peft", arguments.model, **lora, **sizes), sys.executable)
        if arguments.optimum:
            yield Case("optimum", Job("optimum", arguments.optimum, **sizes), arguments.optimum_python)


class Worker:
    """A case in a process of its own, which loads when it is first asked to measure."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        threads = str(case.job.threads)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [case.python, str(WORKER), json.dumps(dataclasses.asdict(case.job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def measure(self) -> dict[str, Any]:
        """One measurement, or what went wrong."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Timer(TIMEOUT_S, self.process.kill)
        late.start()
        try:
            print(file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            late.cancel()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        return {"error": (self.errors.read().strip().splitlines() or [f"exit code {self.process.returncode}"])[-1]}

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            assert file is not None
            with contextlib.suppress(OSError):  # a line that nobody read
                file.close()


def prepare(arguments: argparse.Namespace) -> int:
    """Make the bundles that are not there."""
    backbone = load_backbone(arguments.model)
    for name in arguments.only or BUNDLES:
        if not (arguments.prepared / name).exists():
            make_bundle(BUNDLES[name], backbone, arguments.prepared / name)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Measure round after round, each with one row and with eight; each is a file.

    Every measurement has a process of its own, because processes of one case differ, by up to a tenth in a step.
    """
    chosen = [case for case in cases(arguments) if not arguments.only or case.name in arguments.only]
    if not chosen:
        sys.exit("nothing to measure; run prepare first, or name peers")
    for number in range(arguments.rounds):
        for rows in ROWS:
            ordered = [case for case in chosen if case.job.rows == rows][:: 1 if number % 2 == 0 else -1]
            _save(arguments.results, "round", {"measured": [_entry(case) for case in ordered]})
            print(f"round {number + 1} of {arguments.rounds}, {rows} row{'s' * (rows > 1)}", flush=True)
    return 0


def _entry(case: Case) -> dict[str, Any]:
    """A case's second measurement, as it stands in the record; the first loads and warms up."""
    with contextlib.closing(Worker(case)) as worker:
        worker.measure()
        job = {**dataclasses.asdict(case.job), "model": Path(case.job.model).name}
        return {"name": case.name, "job": job, **worker.measure()}


def trace(arguments: argparse.Namespace) -> int:
    """Measure continuous against static batches; each round is a file."""
    for record in compare_batching(arguments.prepared / "iapt-8", arguments.rounds, arguments.requests):
        print(f"trace: {json.dumps(record)}", flush=True)
        _save(arguments.results, "trace", record)
    return 0


def run_soak(arguments: argparse.Namespace) -> int:
    """Serve while tenants come and go; fails where an answer is wrong or lost."""
    for state in soak(arguments.prepared / "iapt-8", 60 * arguments.minutes):
        seconds, mib = state.memory_mib[-1] if state.memory_mib else (0.0, 0.0)
        print(f"soak: {seconds:.0f} s, {state.answered} answered, {mib:.0f} MiB", flush=True)
    _save(arguments.results, "soak", {"minutes": arguments.minutes, **state.to_dict()})
    return 1 if state.wrong or state.lost else 0


def measure_all(arguments: argparse.Namespace) -> int:
    """Prepare, run, trace, soak, report."""
    return max(action(arguments) for action in (prepare, run, trace, run_soak, report))


def _save(folder: Path, kind: str, record: dict[str, Any]) -> None:
    record = {
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "rational": add_kernels(onnxruntime.SessionOptions()),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        **record,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{content_key(record)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def report(arguments: argparse.Namespace) -> int:
    """Write the tables and plots."""
    from benchmarks.serving_report import Records, write_report

    records = Records.read(arguments.results)
    if not records.rounds:
        sys.exit(f"{arguments.results} holds no rounds; use run first")
    write_report(records, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR of a folder that exists")
    return name, folder


FLAGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("prepare run", "--model", {"default": str(MODEL), "help": "folder of the backbone (default: %(default)s)"}),
    ("prepare run trace soak", "--prepared", {"type": Path, "default": PREPARED, "help": "folder of the bundles"}),
    ("prepare run", "--only", {"nargs": "+", "default": [], "metavar": "CASE", "help": "these alone"}),
    ("run", "--genai", {"action": "append", "type": _named, "default": [], "metavar": "DTYPE=DIR"}),
    ("run", "--genai-python", {"default": sys.executable, "metavar": "PYTHON", "help": "where genai is installed"}),
    ("run", "--optimum", {"metavar": "DIR", "help": "a model that optimum-onnx exported"}),
    ("run", "--optimum-python", {"default": sys.executable, "metavar": "PYTHON", "help": "where optimum is installed"}),
    ("run trace", "--rounds", {"type": int, "default": 9, "help": "default: %(default)s"}),
    ("run", "--steps", {"type": int, "default": STEPS, "help": "decode steps (default: %(default)s)"}),
    ("run", "--threads", {"type": int, "default": 2, "help": "default: %(default)s"}),
    ("trace", "--requests", {"type": int, "default": 64, "help": "default: %(default)s"}),
    ("soak", "--minutes", {"type": float, "default": 30.0, "help": "default: %(default)s"}),
    ("run trace soak report", "--results", {"type": Path, "default": RESULTS, "help": "folder of the records"}),
    ("report", "--output", {"type": Path, "default": ROOT / "docs" / "benchmarks.md", "help": "file to write"}),
)
"""The commands that need a flag, the flag, and its settings."""


def main(words: list[str] | None = None) -> int:
    """Measure or report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    actions = {"all": measure_all, "prepare": prepare, "run": run, "trace": trace, "soak": run_soak, "report": report}
    for name, action in actions.items():
        command = commands.add_parser(name, help=str(action.__doc__))
        command.set_defaults(action=action)
        for needed_by, flag, fields in FLAGS:
            if name == "all" or name in needed_by.split():
                command.add_argument(flag, **fields)
    arguments = parser.parse_args(words)
    return int(arguments.action(arguments))


if __name__ == "__main__":
    sys.exit(main())
