"""Kills, mutated inputs, Python beside C++, a hostile request, and a load with tenants that come and go; a tiny model.

    python -m tests.torture --output torture.json     # what docs/security.md shows; about an hour
    python -m tests.torture --short                   # what CI runs: a minute or two

With --output the figures are kept as JSON after every few kills or inputs, and a run that was cut goes on from there.
Exits 1 where anything was lost, half-valid or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.serving.admission import MAX_LOGPROBS
from engines.serving.sampling import Sampling
from engines.serving.session import Request, Session
from iapt_export import BuildRequest, build
from iapt_export.building import layout
from iapt_export.building.stage_cache import content_key
from iapt_export.building.tenant_file import write_tenant_file
from iapt_export.contract.disk import write_atomically
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import METHOD, NEW_TOKENS, RANGES, save_tiny_inputs
from tests.engines.serving.soak import soak
from tests.native import differential
from tests.tiny import tiny_llama
from tests.torture import killed, mutated
from tests.torture.mutated import GROWTH_MIB
from tests.trainers.decoder.fp8_files import save_fp8
from trainers.decoder.backbone import load_backbone
from trainers.training.config import TrainRequest
from trainers.training.train import train

READY = "ready"
"""Stands in a base that is whole, and says of which code."""
BATCH = 500
"""Inputs after which what was found is kept."""
Say = Callable[[dict[str, Any]], None]
ALLOWED_SHIFT = 0.10
"""By which one hostile request may move another tenant's median gap between tokens."""
ALLOWED_MS = 0.5
"""The same where steps take less than 5 ms, as no served model's do: what a row asks for costs calls of NumPy."""


def main() -> None:
    """Run what is asked for."""
    if os.environ.get("OMP_NUM_THREADS") != "1":  # a forked child would wait for threads that it does not have
        again = [sys.executable, "-m", "tests.torture", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "OMP_NUM_THREADS": "1"})
    asked = _asked()
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, Any] = {}
    if asked.output and asked.output.is_file():
        found = json.loads(asked.output.read_text(encoding="utf-8"))

    def keep(name: str, result: dict[str, Any]) -> None:
        found[name] = result
        if asked.output:
            write_atomically(asked.output, (json.dumps(found, indent=2) + "\n").encode())

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        base, work = asked.base or Path(folder) / "base", Path(folder) / "work"
        # a check in CI does not judge by timings: of those of a tiny model's steps, few rounds say little
        parts = asked.only or [name for name in PARTS if not (asked.short and name == "hostile")]
        if not (base / READY).is_file() or ("kills" in parts and (base / READY).read_text("utf-8") != _code()):
            _apart(prepare_base, base)
        for name in parts:
            before, began = found.get(name, {}), time.monotonic()
            work.mkdir()
            result = _apart(PARTS[name], asked, base, work, before, said=functools.partial(keep, name))
            keep(name, {**result, "seconds": before.get("seconds", 0) + round(time.monotonic() - began)})
            shutil.rmtree(work)
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    faults = [fault for name in PARTS if name in found for fault in found[name]["faults"]]
    print("\n".join([f"{len(faults)} faults", *faults[:50]]))
    sys.exit(bool(faults))


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a minute or two instead of an hour")
    parser.add_argument("--kills", type=int, default=1000, help="shared by the commands that are killed")
    parser.add_argument("--kill-seconds", type=float, default=3600, help="at most so long for each command")
    parser.add_argument("--inputs", type=int, default=100_000, help="mutated inputs, shared by all readers")
    parser.add_argument("--differences", type=int, default=10_000, help="mutated inputs for Python and C++ alike")
    parser.add_argument("--rounds", type=int, default=60, help="of each hostile request")
    parser.add_argument("--hostile-bundle", type=Path, metavar="BUNDLE", help="of two tenants or more; else a tiny one")
    parser.add_argument("--load-seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(PARTS), action="append")
    parser.add_argument("--base", type=Path, help="folder for the bundles that this works on: made once, and kept")
    parser.add_argument("--output", type=Path, help="JSON file for the figures; where it is there, they are added to")
    asked = parser.parse_args()
    if asked.short:
        asked.kills, asked.kill_seconds, asked.inputs = 60, 8, 2_000
        asked.differences, asked.rounds, asked.load_seconds = 500, 4, 6
    return asked


def _code() -> str:
    """What the finished stages of a base depend on beside its inputs: others would be made anew in every run."""
    return content_key(layout.versions() | {"code": layout.code_sha256(layout.BUNDLE_ROOMS)})


def prepare_base(base: Path) -> None:
    """A tiny model with adapters, the bundles and the cache that builds of them leave, and finished trainings."""
    for path in base.iterdir() if base.is_dir() else ():
        if path.name != "cache":  # its stages are known by all that they depend on
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    model, adapters = save_tiny_inputs(base)
    save_fp8(base, tiny_llama())

    def made(name: str, *tenants: str, prove: bool = False) -> None:
        places = {"model": str(model), "output": base / name, "cache": base / "cache"}
        ranges = {**RANGES, "tenants": "1:3:16"} if prove else RANGES  # room for those that come and go
        build(
            BuildRequest(
                adapters=[adapters[t] for t in tenants], prove=prove, new_tokens=NEW_TOKENS, **places, **ranges
            )
        )

    made("proven", *adapters, prove=True)
    made("old", "alpha")
    made("new", "alpha", "beta")
    write_tenant_file(str(adapters["beta"]), base / "old", base / "beta.safetensors", lambda: load_backbone(str(model)))
    lines = [{"instruction": "joy?", "input": f"film {i}", "output": "yes" if i % 2 else "no"} for i in range(20)]
    (base / "joy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, seed in (("trained-old", 1), ("trained", 0)):
        config = dataclasses.replace(killed.TRAINING, seed=seed)
        train(TrainRequest(str(model), base / "joy.jsonl", base / name, METHOD, config), say=lambda _: None)
    (base / READY).write_text(_code(), encoding="utf-8")


def kills(asked: Any, base: Path, work: Path, before: dict[str, Any], say: Say) -> dict[str, Any]:
    """Every command killed before its file operations and at random moments."""
    rows = dict(before.get("of", {}))

    def told() -> dict[str, Any]:
        faults = [fault for row in rows.values() for fault in row["faults"]]
        return {"kills": sum(row["kills"] for row in rows.values()), "of": rows, "faults": faults}

    for scenario in killed.scenarios(base):
        tally = killed.Tally(**rows.get(scenario.name, {"name": scenario.name}))

        def keep(tally: killed.Tally) -> None:
            rows[tally.name] = dataclasses.asdict(tally)
            say(told())

        folder, most, seconds = work / scenario.name, round(asked.kills * scenario.share), asked.kill_seconds
        killed.torment(scenario, folder, seconds, most, asked.seed, tally=tally, keep=keep)
        print(f"  {tally}", flush=True)
    return told()


def inputs(asked: Any, base: Path, work: Path, before: dict[str, Any], say: Say) -> dict[str, Any]:
    """Mutated files for every reader, and bundles with changed bytes."""
    rows = {row["name"]: mutated.Findings(**row) for row in before.get("readers", ())}

    def told() -> dict[str, Any]:
        faults = [fault for row in rows.values() for fault in (*row.raw, *(() if asked.short else row.slow))]
        faults += [f"{r.name}: memory grew by {r.growth_mib} MiB" for r in rows.values() if r.growth_mib > GROWTH_MIB]
        faults += [f"{row.name}: {row.wrong} accepted" for row in rows.values() if row.wrong]
        readers = [dataclasses.asdict(row) for row in rows.values()]
        return {"inputs": sum(row.inputs for row in rows.values()), "readers": readers, "faults": faults}

    engine = dataclasses.asdict(mutated.ENGINE)
    known = mutated.readers(base / "proven", base / "alpha", base / "model", base / "fp8", engine)
    whole = sum(reader.share for reader in known)
    for reader in known:
        found = rows.setdefault(reader.name, mutated.Findings(reader.name))
        wanted = round(asked.inputs * reader.share / whole)
        while found.inputs < wanted:
            count = min(BATCH, wanted - found.inputs)
            mutated.torment(reader, work, count, asked.seed + found.inputs, found)
            say(told())
        print(f"  {found}", flush=True)
    return told()


def languages(asked: Any, base: Path, work: Path, before: dict[str, Any], say: Say) -> dict[str, Any]:
    """The same mutated manifests and safetensors files for Python and for C++, see `tests.native.differential`."""
    seeds = differential.seeds_of(base / "proven")
    found = {"inputs": 0, "accepted": 0, "faults": [], **before}
    if not differential.is_built():
        return {**found, "faults": ["C++ was not compared: its readers are not built; run make cpp first"]}
    while found["inputs"] < asked.differences:
        count = min(BATCH, asked.differences - found["inputs"])
        told = differential.judged(list(differential.mutations(seeds, count, asked.seed + found["inputs"])))
        found["faults"] += [
            f"{kind} {data[:60]!r}...: Python {str(python)[:60]}, C++ {str(cpp)[:60]}"
            for kind, data, python, cpp in told
            if python != cpp
        ]
        found["accepted"] += sum(python is not None for _, _, python, _ in told)
        found["inputs"] += count
        say(found)
    return found


def hostile(asked: Any, base: Path, work: Path, before: dict[str, Any], say: Say) -> dict[str, Any]:
    """The median gap between a tenant's tokens beside an ordinary request, and beside hostile ones.

    A round has them all in a changing order; each is compared with the ordinary one of its round, so that a busy
    machine disturbs both alike. The ordinary one is measured twice: how far the two are apart is the noise. A tiny
    model's step takes half a millisecond, so that anything moves it by a tenth; --hostile-bundle measures a real one's.
    """
    bundle = asked.hostile_bundle or base / "proven"
    ranges = BundleManifest.load(bundle).ranges
    mine_tenant, other = sorted(tenant.name for tenant in BundleManifest.load(bundle).tenants)[:2]
    stops = tuple("x" * 255 + chr(97 + number) for number in range(16))
    ordinary = Request(other, tokens=(5,) * 16, max_new_tokens=90, ignore_eos=True)
    cases = {
        "ordinary": ordinary,
        "ordinary again": ordinary,
        "longest prompt": dataclasses.replace(ordinary, tokens=(5,) * min(ranges.sequence.max, ranges.past.max - 100)),
        "many stop texts": dataclasses.replace(ordinary, stop=stops),
        "many stop ids": dataclasses.replace(ordinary, stop_token_ids=(7,) * 64),
        "most log-probabilities": dataclasses.replace(ordinary, logprobs=MAX_LOGPROBS),
        "all of sampling": dataclasses.replace(
            ordinary, sampling=Sampling(1.0, 0.5, frequency_penalty=0.5, repetition_penalty=1.1)
        ),
    }
    gaps: dict[str, list[float]] = {name: [] for name in cases}
    source = random.Random(asked.seed)
    with Session.open(bundle) as session:
        for _ in range(asked.rounds):
            for name in source.sample(list(cases), len(cases)):
                beside = session.submit(cases[name], 1)
                mine = session.submit(Request(mine_tenant, tokens=(9,) * 16, max_new_tokens=80, ignore_eos=True))
                times = [time.perf_counter() for _ in mine]
                beside.result()
                steps = [after - before for before, after in itertools.pairwise(times)]
                gaps[name].append(statistics.median(steps) * 1e3)
    usual = gaps.pop("ordinary")
    moved = {name: [mine / own - 1 for mine, own in zip(gaps[name], usual, strict=True)] for name in gaps}
    shifts = {name: round(statistics.median(values), 3) for name, values in moved.items()}
    gap = statistics.median(usual)
    allowed = max(ALLOWED_SHIFT, ALLOWED_MS / gap)
    faults = [f"{name} moves the median gap by {shift:.0%}" for name, shift in shifts.items() if shift > allowed]
    return {"rounds": asked.rounds, "gap_ms": round(gap, 3), "shifts": shifts, "faults": faults}


def load(asked: Any, base: Path, work: Path, before: dict[str, Any], say: Say) -> dict[str, Any]:
    """Twelve clients while tenants come and go; see `tests.engines.serving.soak`."""
    for state in soak(base / "proven", asked.load_seconds):
        last = state
    record = last.record()
    memory = [mib for _, mib in record["memory_mib"]]
    growth = round(memory[-1] - memory[len(memory) // 4], 1) if len(memory) > 3 else 0.0
    faults = [f"{len(record[name])} {name}, the first: {record[name][0]}" for name in ("wrong", "lost") if record[name]]
    faults += [f"memory grew by {growth} MiB"] if growth > GROWTH_MIB else []
    faults += [] if record["answered"] and (record["removed"] or asked.load_seconds < 30) else ["nobody came and went"]
    kept = {name: record[name] for name in ("answered", "removed", "add_ms")}
    return {**kept, "growth_mib": growth, "load_seconds": asked.load_seconds, "faults": faults}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "kills": kills,
    "inputs": inputs,
    "languages": languages,
    "hostile": hostile,
    "load": load,
}


def _apart(work: Callable[..., Any], *arguments: Any, said: Say | None = None) -> Any:
    """Run in a forked process of its own: this one stays without threads, and can be forked again.

    Args:
        work: returns what this returns; where ``said`` is given, its last argument hands on what it found so far.
        arguments: the others.
        said: takes that.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        hand_on = [lambda found: sender.send((False, found))] if said else []
        sender.send((True, work(*arguments, *hand_on)))

    process = context.Process(target=run)
    process.start()
    sender.close()
    result = None
    with contextlib.suppress(EOFError):
        while not (answer := receiver.recv())[0]:
            said(answer[1]) if said else None
        result = answer[1]
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} ended with {process.exitcode}")
    return result


if __name__ == "__main__":
    main()
