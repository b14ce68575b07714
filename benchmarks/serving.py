"""Serve the same tokens with this project and with its peers, in alternating runs, and compare.

    python -m benchmarks.serving prepare            # the bundles, once (minutes)
    python -m benchmarks.serving run --genai fp32=DIR --genai int4=DIR --genai-python PYTHON
    python -m benchmarks.serving report             # docs/benchmarks.md from the records

``run`` measures every case once a round, each in a process of its own, so that slow minutes of the machine fall on all
of them; ratios are medians over rounds. The genai folders come from its own model builder and the same weights:
``python -m onnxruntime_genai.models.builder -i MODEL -o DIR -p fp32 -e cpu`` (and ``-p int4``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving_bundles import BUNDLES, SEVEN, make_bundle
from benchmarks.serving_peers import Job
from iapt_export.stages import content_key
from trainers.backbone import load_backbone

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
PREPARED = ROOT / ".cache" / "serving"
RESULTS = ROOT / "benchmarks" / "results" / "serving"
WORKER = ROOT / "benchmarks" / "serving_peers.py"
ROWS = (1, 8)
TOKENS = 128
STEPS = 32
TIMEOUT_S = 900


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


def measure(case: Case) -> dict[str, Any]:
    """Run one case in a process of its own; its figures, or what went wrong."""
    threads = str(case.job.threads)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    command = [case.python, str(WORKER), json.dumps(dataclasses.asdict(case.job))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def prepare(arguments: argparse.Namespace) -> int:
    """Make the bundles that are not there."""
    backbone = load_backbone(arguments.model)
    for name in arguments.only or BUNDLES:
        if not (arguments.prepared / name).exists():
            make_bundle(BUNDLES[name], backbone, arguments.prepared / name)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Measure round after round; each round is a file."""
    chosen = [case for case in cases(arguments) if not arguments.only or case.name in arguments.only]
    if not chosen:
        sys.exit("nothing to measure; run prepare first, or name peers")
    arguments.results.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.rounds):
        order = chosen if number % 2 == 0 else chosen[::-1]
        found = []
        for case in order:
            figures = measure(case)
            shown = figures.get("error") or f"prefill {figures['prefill_ms']:.0f} ms"
            print(f"round {number + 1}: {case.name}, {case.job.rows} rows: {shown}", flush=True)
            job = {**dataclasses.asdict(case.job), "model": Path(case.job.model).name}
            found.append({"name": case.name, "job": job, **figures})
        record = {
            "load": os.getloadavg()[0],
            "cores": len(os.sched_getaffinity(0)),
            "processor": _processor(),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "measured": found,
        }
        path = arguments.results / f"round-{content_key(record)}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write the tables and plots."""
    from benchmarks.serving_report import read_rounds, write_report

    rounds = read_rounds(arguments.results)
    if not rounds:
        sys.exit(f"{arguments.results} holds no rounds; use run first")
    write_report(rounds, arguments.output)
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


def main(words: list[str] | None = None) -> int:
    """Prepare, run or report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action in (("prepare", prepare), ("run", run)):
        command = commands.add_parser(name, help=str(action.__doc__))
        command.set_defaults(action=action)
        command.add_argument("--model", default=str(MODEL), help="folder of the backbone (default: %(default)s)")
        command.add_argument("--prepared", type=Path, default=PREPARED, help="folder of the bundles")
        command.add_argument("--only", nargs="+", default=[], metavar="CASE", help="these alone")
    command.add_argument("--genai", action="append", type=_named, default=[], metavar="DTYPE=DIR")
    command.add_argument("--genai-python", default=sys.executable, metavar="PYTHON", help="where genai is installed")
    command.add_argument("--optimum", metavar="DIR", help="a model that optimum-onnx exported")
    command.add_argument("--optimum-python", default=sys.executable, metavar="PYTHON")
    command.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    command.add_argument("--steps", type=int, default=STEPS, help="decode steps (default: %(default)s)")
    command.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    written = commands.add_parser("report", help=str(report.__doc__))
    written.set_defaults(action=report)
    written.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md", help="file to write")
    for command in (commands.choices["run"], written):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    arguments = parser.parse_args(words)
    return int(arguments.action(arguments))


if __name__ == "__main__":
    sys.exit(main())
