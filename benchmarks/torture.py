"""Kills, mutated inputs, a hostile request and a load with tenants that come and go, on a tiny model.

    python -m benchmarks.torture                    # what docs/security.md shows; about half an hour
    python -m benchmarks.torture --short            # what CI runs: a minute

The figures are printed and, with --output, written as JSON. Exits 1 where anything was lost, half-valid or wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import torture_inputs, torture_kills
from engines.serving.session import Request, Session
from engines.tensorrt.engine_info import EngineInfo, EngineTensor, ProfileShape
from iapt_export import BuildRequest, build
from iapt_export.building.tenant_file import write_tenant_file
from tests.bundles import METHOD, NEW_TOKENS, RANGES, save_tiny_inputs
from tests.engines.serving.soak import soak
from trainers.decoder.backbone import load_backbone
from trainers.training.config import TrainRequest
from trainers.training.train import train

ENGINE = EngineInfo(
    target="tensorrt-rtx",
    runtime_version="1.7.1.116",
    compute_capability="8.9",
    source_sha256="0" * 64,
    sha256="1" * 64,
    size_bytes=64,
    seconds=1.5,
    inputs=[EngineTensor("input_ids", "int64", [-1, -1])],
    outputs=[EngineTensor("logits", "fp16", [-1, 1, 320])],
    profiles=[{"input_ids": ProfileShape([1, 1], [2, 16], [8, 96])}],
)
ALLOWED_SHIFT = 0.10
"""By which one hostile request may move another tenant's median gap between tokens."""


def main() -> None:
    """Run what is asked for."""
    if os.environ.get("OMP_NUM_THREADS") != "1":  # a forked child would wait for threads that it does not have
        again = [sys.executable, "-m", "benchmarks.torture", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "OMP_NUM_THREADS": "1"})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a minute instead of half an hour")
    parser.add_argument("--kills", type=int, default=1000, help="at most so many for each command")
    parser.add_argument("--kill-seconds", type=float, default=180, help="at most so long for each command")
    parser.add_argument("--inputs", type=int, default=100_000, help="mutated inputs, shared by all readers")
    parser.add_argument("--load-seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "inputs", "hostile", "load"), action="append")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    if asked.short:
        asked.kills, asked.kill_seconds, asked.inputs, asked.load_seconds = 12, 10, 2_000, 6
    os.environ["HF_HUB_OFFLINE"] = "1"
    parts: dict[str, Callable[[Any, Path, Path], dict[str, Any]]] = {
        "kills": kills,
        "inputs": inputs,
        "hostile": hostile,
        "load": load,
    }
    found: dict[str, Any] = {"command": " ".join(["python -m benchmarks.torture", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        base, work = Path(folder) / "base", Path(folder) / "work"
        _apart(prepare_base, base, asked.only)
        for name in asked.only or parts:
            began = time.monotonic()
            work.mkdir()
            found[name] = {**_apart(parts[name], asked, base, work), "seconds": round(time.monotonic() - began)}
            shutil.rmtree(work)
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    faults = [fault for name in parts if name in found for fault in found[name]["faults"]]
    print("\n".join([f"{len(faults)} faults", *faults[:50]]))
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(faults))


def prepare_base(base: Path, only: list[str] | None) -> None:
    """A tiny model with adapters, the bundles and the cache that builds of them leave, and finished trainings."""
    model, adapters = save_tiny_inputs(base)

    def made(name: str, *tenants: str, prove: bool = False) -> None:
        places = {"model": str(model), "output": base / name, "cache": base / "cache"}
        build(
            BuildRequest(
                adapters=[adapters[t] for t in tenants], prove=prove, new_tokens=NEW_TOKENS, **places, **RANGES
            )
        )

    if not only or set(only) != {"kills"}:
        made("proven", *adapters, prove=True)
    if only and "kills" not in only:
        return
    made("old", "alpha")
    made("new", "alpha", "beta")
    (base / "cache" / ".lock").unlink(missing_ok=True)
    write_tenant_file(str(adapters["beta"]), base / "old", base / "beta.safetensors", load_backbone(str(model)))
    lines = [{"instruction": "joy?", "input": f"film {i}", "output": "yes" if i % 2 else "no"} for i in range(20)]
    (base / "joy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, seed in (("trained-old", 1), ("trained", 0)):
        config = dataclasses.replace(torture_kills.TRAINING, seed=seed)
        train(TrainRequest(str(model), base / "joy.jsonl", base / name, METHOD, config), say=lambda _: None)


def kills(asked: Any, base: Path, work: Path) -> dict[str, Any]:
    """Every command killed before its file operations and at random moments."""
    tallies = []
    for scenario in torture_kills.scenarios(base):
        tallies.append(
            torture_kills.torment(scenario, work / scenario.name, asked.kill_seconds, asked.kills, asked.seed)
        )
        print(f"  {tallies[-1]}", flush=True)
    faults = [fault for tally in tallies for fault in tally.faults or ()]
    rows = {t.name: {"operations": t.operations, "kills": t.kills, "before": t.at_operations} for t in tallies}
    return {"kills": sum(tally.kills for tally in tallies), "of": rows, "faults": faults}


def inputs(asked: Any, base: Path, work: Path) -> dict[str, Any]:
    """Mutated files for every reader, and bundles with changed bytes."""
    known = torture_inputs.readers(base / "proven", base / "alpha", dataclasses.asdict(ENGINE))
    whole = sum(reader.share for reader in known) + 0.2
    rows = []
    for reader in known:
        rows.append(torture_inputs.torment(reader, work, int(asked.inputs * reader.share / whole), asked.seed))
        print(f"  {torture_inputs.told(rows[-1])}", flush=True)
    altered = torture_inputs.altered_bundles(base / "proven", work, int(asked.inputs * 0.2 / whole), asked.seed)
    faults = [fault for row in (*rows, altered) for fault in (*row.raw, *row.slow)]
    faults += [f"{row.name}: memory grew by {row.growth_mib} MiB" for row in rows if row.growth_mib > 64]
    faults += [f"{altered.accepted} altered bundles were accepted"] if altered.accepted else []
    told = [torture_inputs.told(row) for row in (*rows, altered)]
    return {"inputs": sum(row["inputs"] for row in told), "readers": told, "faults": faults}


def hostile(asked: Any, base: Path, work: Path) -> dict[str, Any]:
    """The median gap between a tenant's tokens beside an ordinary request, and beside hostile ones.

    Rounds alternate, and medians of rounds are compared, so that a busy machine disturbs both alike.
    """
    stops = tuple("x" * 255 + chr(97 + number) for number in range(16))
    ordinary = Request("beta", tokens=(5,) * 16, max_new_tokens=90, ignore_eos=True)
    cases = {
        "ordinary": ordinary,
        "longest prompt": Request("beta", tokens=(5,) * 64, max_new_tokens=90, ignore_eos=True),
        "many stop texts": Request("beta", tokens=(5,) * 16, max_new_tokens=90, ignore_eos=True, stop=stops),
        "many stop ids": Request(
            "beta", tokens=(5,) * 16, max_new_tokens=90, ignore_eos=True, stop_token_ids=(7,) * 64
        ),
    }
    gaps: dict[str, list[float]] = {name: [] for name in cases}
    with Session.open(base / "proven") as session:
        for _ in range(5 if asked.short else 40):
            for name, other in cases.items():
                beside = session.submit(other, 1)
                mine = session.submit(Request("alpha", tokens=(9,) * 16, max_new_tokens=80, ignore_eos=True))
                times = [time.perf_counter() for _ in mine]
                beside.result()
                steps = [after - before for before, after in itertools.pairwise(times)]
                gaps[name].append(statistics.median(steps) * 1e3)
    usual = statistics.median(gaps["ordinary"])
    shifts = {name: round(statistics.median(values) / usual - 1, 3) for name, values in gaps.items()}
    limit = 0.5 if asked.short else ALLOWED_SHIFT  # five rounds on a busy machine say little
    faults = [f"{name} moves the median gap by {shift:.0%}" for name, shift in shifts.items() if shift > limit]
    return {"gap_ms": round(usual, 3), "shifts": shifts, "faults": faults}


def load(asked: Any, base: Path, work: Path) -> dict[str, Any]:
    """Twelve clients while tenants come and go; see `tests.engines.serving.soak`."""
    for state in soak(base / "proven", asked.load_seconds):
        last = state
    record = last.record()
    memory = [mib for _, mib in record["memory_mib"]]
    growth = round(memory[-1] - memory[len(memory) // 4], 1) if len(memory) > 3 else 0.0
    faults = [f"{len(record[name])} answers {name}" for name in ("wrong", "lost") if record[name]]
    faults += [f"memory grew by {growth} MiB"] if growth > 64 else []
    kept = {name: record[name] for name in ("answered", "removed", "add_ms")}
    return {**kept, "growth_mib": growth, "load_seconds": asked.load_seconds, "faults": faults}


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a forked process of its own: this one stays without threads, and can be forked again."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, *arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} ended with {process.exitcode}")
    return result


def _send(sender: Any, work: Callable[..., Any], *arguments: Any) -> None:
    sender.send(work(*arguments))


if __name__ == "__main__":
    main()
