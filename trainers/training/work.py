"""``OUTPUT.training``: what a run keeps until its adapter stands at OUTPUT, so that a killed run can go on.

    run.json         which run this is: its settings and the hashes of its data
    checkpoint-N/    whole; written in unfinished/ and renamed
    unfinished/      what is being written or removed; nothing to another run
    finished/        the whole adapter, all scores included, which only has to be moved to OUTPUT
    replaced/        the adapter that stood at OUTPUT before

Every step leaves one of these states, so a kill at any point loses no more than the steps since a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iapt_export.contract.disk import locked, sync, sync_folder
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import file_sha256, write_atomically
from iapt_export.contract.schema import parse_json
from trainers.adapters.directory import load_adapter
from trainers.methods.configs import method_name
from trainers.training.config import TrainRequest

RECORD_FILE = "run.json"
SCHEMA_VERSION = 1
STATE_FILE = "trainer_state.json"
SECONDS_FILE = "seconds.txt"
STATE_PARTS = ("optimizer", "scheduler", "rng_state")
"""How the names of the Trainer's other files begin; their ends depend on how the processes share the work."""
CHECKPOINT = "checkpoint-"
UNFINISHED, FINISHED, REPLACED = "unfinished", "finished", "replaced"
MODEL_FILES = "model_files"
HASHED = {"data": "data file", "eval_file": "eval_file", MODEL_FILES: "model in the same place"}
"""What a record has the hash of, in words."""
TRACKED = "runs"
"""Where the Trainer lets TensorBoard write."""
WITHOUT_EFFECT = {
    "resume",
    "overwrite",
    "report_to",
    "data_note",
    "baseline",
    "example_prompts",
    "eval_batch_size",
    "trust_remote_code",
    "eval_file",
    "base_model_name",
}
"""Settings that another run may change and go on all the same; those of files and names are recorded otherwise."""


def work_folder(output: Path) -> Path:
    """``OUTPUT.training``."""
    return output.with_name(output.name + ".training")


def only_run(output: Path) -> AbstractContextManager[None]:
    """Keep every other run away from ``OUTPUT`` and ``OUTPUT.training`` while the context is open.

    The processes of one run are started together, and the first of them answers for all.

    Raises:
        IaptError: another run writes there.
    """
    if int(os.environ.get("RANK", "0")):
        return nullcontext()
    output.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another run is training {output}; wait until it is done, or choose another output"
    return locked(output.with_name(f".{output.name}.training.lock"), busy)


def record_of(request: TrainRequest) -> dict[str, Any]:
    """What decides a run's result: equal records, of the same version of this project, mean equal adapters."""
    config = request.config
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    files = {"data": request.data, "eval_file": config.eval_file}
    hashes = {name: file_sha256(Path(path)) for name, path in files.items() if path and Path(path).is_file()}
    settings["quantise"] = config.rounding.quantise if config.rounding else ""
    if not settings["quantise"]:
        del settings["quantise"]  # as earlier versions wrote it
    model = config.base_model_name or request.model
    record = {"model": model, "method": method_name(request.method), **asdict(request.method), **settings, **hashes}
    if of_model := _model_files(Path(request.model)):
        record[MODEL_FILES] = hashlib.sha256("".join(map(file_sha256, of_model)).encode()).hexdigest()
    return dict(json.loads(json.dumps(record)))


def _model_files(path: Path) -> list[Path]:
    """What a local backbone is read from; nothing of one of the hub, which its revision tells."""
    if path.is_file():
        return [path]
    return sorted(each for each in path.glob("*") if each.suffix in (".safetensors", ".gguf", ".json"))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run or of a finished adapter; empty where none can be read."""
    try:
        record = parse_json((folder / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, settings: dict[str, Any], **outcome: Any) -> None:
    """Write ``run.json``: what `record_of` found, and what came out where the run is finished."""
    fields = {"schema_version": SCHEMA_VERSION, "settings": settings, **outcome}
    write_atomically(folder / RECORD_FILE, (json.dumps(fields, indent=2) + "\n").encode())


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The settings in which two runs differ, in words; empty where they agree."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if MODEL_FILES not in there and MODEL_FILES in names:  # of a version that did not look at them
        names.remove(MODEL_FILES)
    hashed = HASHED.keys() & set(names)
    told = [f"another {HASHED[name]}" for name in sorted(hashed)]
    told += [f"{name} {there.get(name)!r} there, {here.get(name)!r} here" for name in names if name not in hashed]
    return ", ".join(told)


def checkpoints(work: Path) -> list[Path]:
    """The checkpoints that bear their name, whole or damaged, the newest first."""
    found = [path for path in work.glob(CHECKPOINT + "*") if re.fullmatch(CHECKPOINT + "[0-9]+", path.name)]
    return sorted(found, key=_step, reverse=True)


def foreign_files(work: Path) -> list[str]:
    """What no run of ours or of an experiment tracker has put there, by name."""
    if not work.exists():
        return []
    own = {RECORD_FILE, RECORD_FILE + ".tmp", UNFINISHED, FINISHED, REPLACED, TRACKED}
    own |= {checkpoint.name for checkpoint in checkpoints(work)}
    return sorted({path.name for path in work.iterdir()} - own) if work.is_dir() else [work.name]


def is_unfinished(work: Path) -> bool:
    """Whether something lies there that another run can go on from."""
    return (work / FINISHED).is_dir() or bool(checkpoints(work))


def newest_whole(work: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that can be read; damaged ones are named."""
    for checkpoint in checkpoints(work):
        if (problem := _damage(checkpoint)) is None:
            return checkpoint
        say(f"{checkpoint} is damaged and passed over: {problem}")
    return None


def write_seconds(checkpoint: Path, seconds: float) -> None:
    """Keep, in a checkpoint that is being written, how long the training up to it took."""
    (checkpoint / SECONDS_FILE).write_text(f"{seconds:.3f}\n", encoding="utf-8")


def read_seconds(checkpoint: Path) -> float:
    """What `write_seconds` wrote; 0 where an older version wrote nothing."""
    try:
        return float((checkpoint / SECONDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def begin(work: Path, record: dict[str, Any], start: Path | None) -> None:
    """Make the folder ready for a run from ``start``: without what a killed run had under its hands."""
    for checkpoint in checkpoints(work):
        if start is None or _step(checkpoint) > _step(start):
            shutil.rmtree(checkpoint)
    shutil.rmtree(work / UNFINISHED, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    write_record(work, record)


def place_checkpoint(written: Path, keep: int) -> None:
    """Rename a written checkpoint to its place, and remove all but the newest ``keep``."""
    aside, work = written.parent, written.parent.parent
    final = work / written.name
    sync(written)
    os.replace(written, final)
    sync_folder(work)
    for old in checkpoints(work)[keep:]:
        os.replace(old, aside / old.name)
    shutil.rmtree(aside)


def publish(work: Path, output: Path) -> None:
    """Move the finished adapter to its place and remove the rest; can be called again after a kill at any point.

    The checkpoints go first: while there is one, and no finished adapter, the run counts as unfinished.
    """
    for folder in (work / TRACKED).glob("*"):  # TensorBoard's, a folder a start
        kept_logs = output.with_name(output.name + ".runs")
        kept_logs.mkdir(exist_ok=True)
        os.replace(folder, kept_logs / folder.name)
    for checkpoint in checkpoints(work):
        shutil.rmtree(checkpoint)
    if output.exists():
        shutil.rmtree(work / REPLACED, ignore_errors=True)
        os.replace(output, work / REPLACED)
    os.replace(work / FINISHED, output)
    sync_folder(output.parent)
    shutil.rmtree(work)


def kept(work: Path, output: Path, settings: dict[str, Any]) -> str:
    """What an interrupted run leaves, and how to go on."""
    same = "the same command with --resume"
    if (work / FINISHED).is_dir():
        return f"the finished adapter is kept in {work / FINISHED}, and {same} moves it to {output}"
    if found := checkpoints(work):
        return f"{found[0]} is kept, and {same} goes on from there"
    if read_record(output).get("settings") == settings:
        return f"{output} is finished"
    return f"no checkpoint was written yet (see --save-steps), so {same} starts at the first step"


def _damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None where it is whole."""
    try:
        load_adapter(checkpoint)
    except (IaptError, OSError) as error:
        return str(error)
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))  # the Trainer's, which may hold NaN
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} cannot be read: {error}"
    names = {path.name for path in checkpoint.iterdir()}
    if missing := [part for part in STATE_PARTS if not any(name.startswith(part) for name in names)]:
        return f"what it held of {', '.join(missing)} is missing"
    # torch.save writes zip archives, whose table of contents comes last
    torn = [name for name in names if name.endswith((".pt", ".pth")) and not zipfile.is_zipfile(checkpoint / name)]
    return f"{', '.join(sorted(torn))} cannot be read" if torn else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))
