"""Kills: a command is killed before one of its file operations, or at any moment, and then run again.

Each run is a forked child of a process that has imported everything, so that a kill costs no start of PyTorch.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from iapt_export import BuildRequest, build
from iapt_export.building.stage_cache import STAGE_FILE, prune, run_stage, stages
from iapt_export.building.tenant_file import write_tenant_file
from iapt_export.contract.integrity import verify_files
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import METHOD, NEW_TOKENS, RANGES
from trainers.decoder.backbone import load_backbone
from trainers.training.config import TrainConfig, TrainRequest
from trainers.training.train import train

OPERATIONS = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.utime", "os.truncate"),
    *("fcntl.flock", "ctypes.dlsym"),  # the last stands for the exchange of two folders
}
"""Audit events before which a run is killed; opening a file to write is one, too."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TRAINING = TrainConfig(
    max_steps=2, save_steps=1, batch_size=2, max_eval_examples=2, baseline=False, overwrite=True, warmup_steps=1
)


@dataclass(frozen=True)
class Scenario:
    """A command, and what must hold after it was killed."""

    name: str
    prepare: Callable[[Path], None]
    """Fill an empty folder with what stands there before."""
    run: Callable[[Path, bool], None]
    """The command in that folder; True where it is run again after a kill."""
    problems: Callable[[Path], list[str]]
    """What is lost or half-valid now."""
    result: Callable[[Path], Any]
    """What a finished run left; equal after a kill and a second run."""
    share: float
    """Of all kills: enough of a thousand for every file operation and as many random moments; cheap ones get more."""


def scenarios(base: Path) -> list[Scenario]:
    """Those of ``base``, which `prepare_base` filled."""
    first, both = [base / "alpha"], [base / "alpha", base / "beta"]

    def request(folder: Path, adapters: list[Path]) -> BuildRequest:
        places = {"model": str(base / "model"), "output": folder / "out" / "bundle", "cache": folder / "cache"}
        return BuildRequest(adapters=adapters, prove=False, new_tokens=NEW_TOKENS, **places, **RANGES)

    def warm(folder: Path) -> None:
        shutil.copytree(base / "cache", folder / "cache")

    def standing(folder: Path) -> None:
        warm(folder)
        shutil.copytree(base / "old", folder / "out" / "bundle")

    known = {name: (base / name / "manifest.json").read_bytes() for name in ("old", "new")}

    def bundle_problems(folder: Path, allowed: tuple[str, ...], absent: bool) -> list[str]:
        bundle = folder / "out" / "bundle"
        if not bundle.exists():
            return [] if absent else ["the bundle is absent"]
        verify_files(bundle, BundleManifest.load(bundle))
        is_known = (bundle / "manifest.json").read_bytes() in [known[name] for name in allowed]
        return [] if is_known else ["the bundle is neither the old nor the new one"]

    def bundle_result(folder: Path) -> Any:
        verify_files(folder / "out" / "bundle", BundleManifest.load(folder / "out" / "bundle"))
        left = sorted(path.name for path in (folder / "out").iterdir())
        return left, (folder / "out" / "bundle" / "manifest.json").read_bytes()

    return [
        Scenario(
            "build",
            warm,
            lambda folder, _: build(request(folder, first)) and None,
            lambda folder: bundle_problems(folder, ("old",), absent=True),
            bundle_result,
            0.12,
        ),
        Scenario(
            "overwrite",
            standing,
            lambda folder, _: build(request(folder, both)) and None,
            lambda folder: bundle_problems(folder, ("old", "new"), absent=False),
            bundle_result,
            0.16,
        ),
        _tenant(base),
        _train(base),
        Scenario("cache", lambda _: None, _use_cache, _cache_problems, _cache_result, 0.38),
    ]


def _tenant(base: Path) -> Scenario:
    def run(folder: Path, _: bool) -> None:
        write_tenant_file(
            str(base / "beta"), base / "old", folder / "t.safetensors", lambda: load_backbone(str(base / "model"))
        )

    def problems(folder: Path) -> list[str]:
        data = (folder / "t.safetensors").read_bytes()
        return [] if data in (b"old", (base / "beta.safetensors").read_bytes()) else ["the file is half-written"]

    def result(folder: Path) -> Any:
        return sorted(path.name for path in folder.iterdir()), (folder / "t.safetensors").read_bytes()

    return Scenario("tenant", lambda folder: _write(folder / "t.safetensors", b"old"), run, problems, result, 0.2)


def _train(base: Path) -> Scenario:
    def run(folder: Path, again: bool) -> None:
        config = replace(TRAINING, resume=again)
        request = TrainRequest(str(base / "model"), base / "joy.jsonl", folder / "a", METHOD, config)
        train(request, say=lambda _: None)

    def result(folder: Path) -> Any:
        weights = (folder / "a" / "adapter_model.safetensors").read_bytes()
        return sorted(path.name for path in folder.iterdir()), weights

    def problems(folder: Path) -> list[str]:
        places = [folder / "a", folder / "a.training" / "replaced", folder / "a.training" / "finished"]
        found = [(place / "adapter_model.safetensors") for place in places]
        known = [(base / name / "adapter_model.safetensors").read_bytes() for name in ("trained", "trained-old")]
        return [] if any(path.is_file() and path.read_bytes() in known for path in found) else ["no adapter is left"]

    return Scenario("train", lambda folder: _copy(base / "trained-old", folder / "a"), run, problems, result, 0.14)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _use_cache(folder: Path, _: bool) -> None:
    for number in range(4):
        run_stage(folder / "cache", "graphs", {"number": number}, _make_stage)
    prune(folder / "cache", 2_000_000)
    run_stage(folder / "cache", "graphs", {"number": 4}, _make_stage)


def _make_stage(folder: Path) -> None:
    for name in ("weights.data", "serve.onnx", "passes.json"):
        (folder / name).write_bytes(os.urandom(300_000))


def _cache_problems(folder: Path) -> list[str]:
    """Stages without a record are not used; those with one must be whole, or be found damaged by `run_stage`."""
    made: list[Path] = []
    for number in range(5):
        run_stage(folder / "cache", "graphs", {"number": number}, made.append)  # makes empty stages where it must
    return [f"stage {stage.name} has no record" for stage in stages(folder / "cache") if stage.used == 0]


def _cache_result(folder: Path) -> Any:
    names = sorted(path.name for path in (folder / "cache").iterdir())
    return len(names), all((folder / "cache" / name / STAGE_FILE).is_file() for name in names)


@dataclass
class Tally:
    """What kills of one scenario came to."""

    name: str
    operations: int = 0
    """File operations of an undisturbed run."""
    kills: int = 0
    at_operations: int = 0
    """Kills before a file operation; the others came at random moments."""
    tried: int = 0
    """Kills, and random moments that came too late."""
    reruns: int = 0
    """Second runs; what they do with a disk that another kill left alike, to the byte, is known already."""
    faults: list[str] = field(default_factory=list)


def torment(
    scenario: Scenario,
    work: Path,
    seconds: float,
    most: int,
    seed: int = 0,
    *,
    tally: Tally | None = None,
    keep: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Kill a scenario before its file operations, and at random moments, until time or count is used up.

    Args:
        scenario: what is killed.
        work: a folder that is made.
        seconds: after which no other kill begins.
        most: kills.
        seed: of their order.
        tally: what an earlier run of the same seed came to; it is gone on from, and changed.
        keep: called after every few kills.
    """
    gc.collect()
    gc.freeze()  # or a child's own collection touches, and copies, all memory that it shares with this process
    tally = tally or Tally(scenario.name)
    wanted, tally.operations, length = _undisturbed(scenario, work)
    end, known = time.monotonic() + seconds, set[str]()
    for point in itertools.islice(_points(tally.operations, random.Random(seed)), tally.tried, None):
        if time.monotonic() > end or tally.kills >= most:
            break
        fault = _one_kill(scenario, work / "killed", point, length)
        if fault == "" and (disk := _disk(work / "killed")) not in known:
            fault = _rerun(scenario, work / "killed", wanted)
            tally.reruns += 1
            known |= set() if fault else {disk}
        shutil.rmtree(work / "killed", ignore_errors=True)
        tally.tried += 1
        if fault == "was not killed":
            continue
        tally.kills += 1
        tally.at_operations += isinstance(point, int)
        if fault:
            tally.faults.append(f"{scenario.name} at {point}: {fault}")
        if tally.kills % 10 == 0:
            keep(tally)
    gc.unfreeze()
    keep(tally)
    return tally


def _points(count: int, source: random.Random) -> Iterator[int | float]:
    """Every operation in a mixed order, with a random share of the run's length between each two; then shares alone."""
    for operation in source.sample(range(1, count + 1), count):
        yield operation
        yield source.random()
    while True:
        yield source.random()


def _undisturbed(scenario: Scenario, work: Path) -> tuple[Any, int, float]:
    """What a run leaves, how many operations it has, and how long it takes."""
    folder = work / "undisturbed"
    folder.mkdir(parents=True)
    scenario.prepare(folder)
    began = time.monotonic()
    status = _forked(scenario, folder, again=False, count_to=work / "count")
    assert status == 0, f"{scenario.name} fails undisturbed: see {work / 'log'}"
    length, wanted = time.monotonic() - began, scenario.result(folder)
    shutil.rmtree(folder)
    return wanted, int((work / "count").read_text()), length


def _one_kill(scenario: Scenario, folder: Path, point: int | float, length: float) -> str:
    """What is wrong after a kill; empty where nothing is."""
    folder.mkdir(parents=True)
    scenario.prepare(folder)
    if isinstance(point, int):
        status = _forked(scenario, folder, again=False, kill_at=point)
    else:
        status = _forked(scenario, folder, again=False, kill_after=point * length)
    if status == 0:
        return "was not killed"  # a random moment behind its end
    if status != -signal.SIGKILL:
        return f"ended with {status} before it was killed"
    return "" if scenario.name == "cache" else _told(lambda: "; ".join(scenario.problems(folder)))


def _rerun(scenario: Scenario, folder: Path, wanted: Any) -> str:
    """What is wrong after a second run; empty where nothing is."""
    if _forked(scenario, folder, again=True) != 0:
        return f"the second run fails: {(folder.parent / 'log').read_text()[-500:]}"
    if scenario.name == "cache":
        return _told(lambda: "; ".join(scenario.problems(folder)))
    return _told(lambda: "" if scenario.result(folder) == wanted else "the second run left something else")


def _told(look: Callable[[], str]) -> str:
    """What a check says, or raises."""
    try:
        return look()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _disk(folder: Path) -> str:
    """A hash over all names and bytes below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b"folder"
        digest.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _forked(
    scenario: Scenario,
    folder: Path,
    *,
    again: bool,
    kill_at: int = 0,
    kill_after: float | None = None,
    count_to: Path | None = None,
) -> int:
    """Run in a child: its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            seen = _count_operations(kill_at)
            scenario.run(folder, again)
            if count_to is not None:
                count_to.write_text(str(seen[0]))
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _count_operations(kill_at: int) -> list[int]:
    """Count this process's file operations from now on, and end it before the given one."""
    seen = [0]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS or (event == "open" and arguments[2] is not None and arguments[2] & WRITING):
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return seen
