"""Serve the same tokens with this project and with its peers, in alternating runs, and compare.

    python -m benchmarks.serving all --genai fp32=DIR --genai int4=DIR --genai-python PYTHON --optimum DIR \
        --optimum-python PYTHON --gguf q4_0=FILE --gguf q4_1=FILE --gguf q8_0=FILE --gguf-python PYTHON \
        --openvino-python PYTHON

does it all; its parts are

    prepare   the bundles, once
    run       every case, round after round
    trace     continuous against static batches, on requests of mixed lengths and arrivals
    drafts    steps that verify drafted tokens against steps of one token, answers compared
    cost      what whole answers cost with IAPT's and with LoRA's tenants, for many lengths
    soak      half an hour in which tenants come and go: right answers, no request lost, flat memory
    report    the tables and plots of docs/benchmarks.md from the records

``run`` measures every case once a round, in a process of its own, because processes of one case differ by up to a
tenth; slow seconds of the machine fall on all of them, and ratios are medians over rounds. The genai folders come from
``python -m onnxruntime_genai.models.builder -i MODEL -o DIR -p fp32 -e cpu`` (and ``-p int4``), optimum's from
``optimum-cli export onnx -m MODEL --task text-generation-with-past DIR``, and the GGUF files from
``python -m benchmarks.gguf_types``.
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
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.cost import PREFIX, compare_costs, draw_costs
from benchmarks.drafts import compare_drafts
from benchmarks.pages import MODEL, RESULTS, ROOT, append_record, brief, read_records, write_tables
from benchmarks.serving_bundles import BUNDLES, SEVEN, make_bundle
from benchmarks.serving_load import compare_batching
from benchmarks.serving_peers import Job
from benchmarks.serving_tables import draw, draw_accuracy, of, tables
from engines.native import add_kernels
from tests.engines.serving.soak import soak
from trainers.decoder.backbone import load_backbone

QUANTISED = RESULTS / "quantised.json"
WORKER = ROOT / "benchmarks" / "serving_peers.py"
SIZES: dict[str, Any] = {"tokens": 128, "steps": 24, "threads": 2}
TIMEOUT_S = 600


def cases(arguments: argparse.Namespace, rows: int) -> Iterator[tuple[str, Job, str]]:
    """Name, job and interpreter of everything that the arguments ask for and this machine has."""
    sizes = {**SIZES, "rows": rows}
    yield "base", Job("base", "", **sizes), sys.executable
    for name, plan in BUNDLES.items():
        if not plan.drafts and not name.startswith(PREFIX) and (arguments.prepared / name / "manifest.json").is_file():
            tenants = 0 if plan.merged else plan.tenants
            yield name, Job("session", str(arguments.prepared / name), tenants=tenants, **sizes), sys.executable
    for dtype, folder in arguments.genai:
        yield f"genai-{dtype}", Job("genai", folder, **sizes), arguments.genai_python
    for dtype, path in arguments.gguf:
        yield f"llama-{dtype}", Job("llama", path, **sizes), arguments.gguf_python
        if arguments.openvino_python:
            yield f"openvino-{dtype}", Job("openvino", path, **sizes), arguments.openvino_python
    yield "transformers", Job("transformers", arguments.model, **sizes), sys.executable
    for name, rank, modules in (("peft-qv", 8, ("q_proj", "v_proj")), ("peft-all", 16, SEVEN)):
        yield name, Job("peft", arguments.model, tenants=8, rank=rank, modules=modules, **sizes), sys.executable
    if arguments.optimum:
        yield "optimum", Job("optimum", arguments.optimum, **sizes), arguments.optimum_python


def measure(job: Job, python: str) -> dict[str, Any]:
    """A job in a process of its own: its figures, or what went wrong."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
    # -P: beside the worker stands http.py, which is not the one that its packages import
    command = [python, "-P", str(WORKER), json.dumps(dataclasses.asdict(job))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {TIMEOUT_S} seconds"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return {name: brief(value) for name, value in json.loads(done.stdout).items()}


def prepare(arguments: argparse.Namespace) -> int:
    """Make the bundles that are not there."""
    backbone = load_backbone(arguments.model)
    for name in arguments.only or BUNDLES:
        if not (arguments.prepared / name).exists():
            make_bundle(BUNDLES[name], backbone, arguments.prepared / name)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Measure round after round, with one row and with eight."""
    for number in range(arguments.rounds):
        for rows in (1, 8):
            chosen = [case for case in cases(arguments, rows) if not arguments.only or case[0] in arguments.only]
            if not chosen:
                sys.exit("nothing to measure; run prepare first, or name peers")
            found = {name: measure(job, python) for name, job, python in chosen[:: (1, -1)[number % 2]]}
            _save(arguments, "round", {"rows": rows, **SIZES, "cases": found})
            print(f"round {number + 1} of {arguments.rounds}, {rows} row{'s' * (rows > 1)}", flush=True)
    return 0


def trace(arguments: argparse.Namespace) -> int:
    """Measure continuous against static batches, round after round."""
    for record in compare_batching(arguments.prepared / "iapt-8", arguments.rounds, arguments.requests):
        print(f"trace: {json.dumps(record)}", flush=True)
        _save(arguments, "trace", record)
    return 0


def run_drafts(arguments: argparse.Namespace) -> int:
    """Measure drafts on the bundles that are made for them; fails where an answer differs."""
    for name, plan in BUNDLES.items():
        if plan.drafts and (arguments.prepared / name / "manifest.json").is_file():
            for record in compare_drafts(arguments.prepared / name, plan.drafts, SIZES["threads"], arguments.rounds):
                print(f"drafts: {plan.dtype} {json.dumps(record)}", flush=True)
                _save(arguments, "drafts", {"dtype": plan.dtype, **record})
    return 0


def run_cost(arguments: argparse.Namespace) -> int:
    """Measure whole answers, round after round."""
    bundles = {name.removeprefix(PREFIX): arguments.prepared / name for name in BUNDLES if name.startswith(PREFIX)}
    if missing := [path for path in bundles.values() if not path.is_dir()]:
        sys.exit(f"{', '.join(map(str, missing))} not there; run prepare first")
    for record in compare_costs(bundles, arguments.rounds, SIZES["threads"]):
        print(f"cost: {json.dumps(record)}", flush=True)
        _save(arguments, "cost", record)
    return 0


def run_soak(arguments: argparse.Namespace) -> int:
    """Serve while tenants come and go; fails where an answer is wrong or lost."""
    for state in soak(arguments.prepared / "iapt-8", 60 * arguments.minutes):
        print(f"soak: {state.answered} answered, (s, MiB): {state.memory_mib[-1:]}", flush=True)
    _save(arguments, "soak", {"minutes": arguments.minutes, **state.record()})
    return 1 if state.wrong or state.lost else 0


def report(arguments: argparse.Namespace) -> int:
    """Put tables and plots in their places."""
    records = read_records(arguments.results)
    if not any(record["kind"] == "round" for record in records):
        sys.exit(f"{arguments.results} holds no rounds; use run first")
    write_tables(arguments.page, tables(records))
    images = arguments.page.parent / "images"
    draw(records, images)
    if costs := of(records, "cost"):
        draw_costs(costs, images / "cost.png")
    if QUANTISED.is_file():
        draw_accuracy(records, json.loads(QUANTISED.read_text(encoding="utf-8")), images / "accuracy.png")
    return 0


def measure_all(arguments: argparse.Namespace) -> int:
    """Everything, one after another."""
    return max(action(arguments) for action in (prepare, run, trace, run_drafts, run_cost, run_soak, report))


def _save(arguments: argparse.Namespace, kind: str, record: dict[str, Any]) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    processors = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    about = {
        "kind": kind,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "load": round(os.getloadavg()[0], 2),
        "cores": len(os.sched_getaffinity(0)),
        "processor": [*processors, platform.machine()][0],
        "rational": add_kernels(onnxruntime.SessionOptions()),
    }
    append_record(arguments.results, {**about, **record})


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not Path(folder).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH of something that exists")
    return name, folder


def main(words: list[str] | None = None) -> int:
    """Measure or report; returns the exit code."""
    actions = {
        "all": measure_all,
        "prepare": prepare,
        "run": run,
        "trace": trace,
        "drafts": run_drafts,
        "cost": run_cost,
        "soak": run_soak,
        "report": report,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=actions)
    parser.add_argument("--model", default=str(MODEL), help="folder of the backbone (default: %(default)s)")
    parser.add_argument("--prepared", type=Path, default=ROOT / ".cache" / "serving", help="folder of the bundles")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="prepare and run these alone")
    parser.add_argument("--genai", action="append", type=_named, default=[], metavar="DTYPE=DIR")
    parser.add_argument("--genai-python", default=sys.executable, metavar="PYTHON", help="where genai is installed")
    parser.add_argument("--gguf", action="append", type=_named, default=[], metavar="TYPE=FILE")
    parser.add_argument("--gguf-python", default=sys.executable, metavar="PYTHON", help="where xllamacpp is installed")
    parser.add_argument("--openvino-python", metavar="PYTHON", help="where openvino-genai is; it takes the GGUF files")
    parser.add_argument("--optimum", metavar="DIR", help="a model that optimum-onnx exported")
    parser.add_argument("--optimum-python", default=sys.executable, metavar="PYTHON", help="where optimum is installed")
    parser.add_argument("--rounds", type=int, default=9, help="of run, trace, drafts and cost (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="of trace (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of soak (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.jsonl", help="file of the records")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page to write into")
    arguments = parser.parse_args(words)
    return actions[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
