"""Finished stages of a build, kept by content: an interrupted build goes on, a repeated one takes seconds.

A stage is a folder named after the hash of everything that went into it. It is written under a
temporary name and renamed when complete, so a folder that bears its name is whole; its files' hashes
are checked again before every use, so that an altered file is rebuilt and not shipped.

    .lock               shared by the builds that use the cache; held alone by `prune`
    .STAGE.lock         held while a stage is made, so that two builds do not make it twice
    .STAGE.building     the stage, until it is whole
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.building.output import temporary_folder
from iapt_export.contract.disk import clone, locked
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import file_sha256, write_atomically
from iapt_export.contract.schema import parse_json

STAGE_FILE = "stage.json"
CACHE_VARIABLE = "IAPT_EXPORT_CACHE"
CACHE_LOCK = ".lock"
STAGE_NAME = re.compile(r"[a-z0-9_.-]+-[0-9a-f]{16}", re.IGNORECASE)
LEFTOVER = re.compile(r"\..+-[0-9a-f]{16}\.(lock|building(-[0-9]+)?)")
"""Also as older versions called them."""


@dataclass(frozen=True)
class Stage:
    """A stage that is kept."""

    name: str
    size_bytes: int
    used: float
    """When a build used it last, in seconds since 1970."""


def default_cache() -> Path:
    """``$IAPT_EXPORT_CACHE``, or ``iapt-export`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "iapt-export"


def content_key(fields: dict[str, Any]) -> str:
    """Sixteen hex digits over a JSON-serialisable description."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """Keep `prune` away from a cache while the context is open; any number of builds may use it at once."""
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / CACHE_LOCK, shared=True):
        yield


def run_stage(cache: Path, name: str, inputs: dict[str, Any], make: Callable[[Path], None]) -> tuple[Path, bool]:
    """Make a stage's files, or find them made; waits while another build makes the same.

    Args:
        cache: where stages are kept.
        name: the stage's name.
        inputs: everything that determines its result.
        make: writes the files into the empty folder that it is given.

    Returns:
        The stage's folder, and whether it was found made.
    """
    folder = cache / f"{name}-{content_key(inputs)}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f".{folder.name}.lock"):
        if _is_whole(folder):
            os.utime(folder / STAGE_FILE)
            return folder, True
        shutil.rmtree(folder, ignore_errors=True)
        with temporary_folder(folder) as temporary:
            started = time.monotonic()
            try:
                make(temporary)
            except OSError as error:
                error.filename = error.filename or str(folder)  # not every library says which file it was
                raise
            seconds = round(time.monotonic() - started, 3)
            hashes = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
            record = {"inputs": inputs, "files": hashes, "seconds": seconds}
            write_atomically(temporary / STAGE_FILE, json.dumps(record, indent=2).encode())
            os.replace(temporary, folder)
    return folder, False


def stages(cache: Path) -> list[Stage]:
    """What a cache keeps, the stage that was used last first; empty where there is no cache."""
    found = []
    for folder in cache.iterdir() if cache.is_dir() else ():
        if STAGE_NAME.fullmatch(folder.name) and folder.is_dir():
            record = folder / STAGE_FILE
            used = record.stat().st_mtime if record.is_file() else 0.0
            found.append(Stage(folder.name, _size(folder), used))
    return sorted(found, key=lambda stage: (-stage.used, stage.name))


def prune(cache: Path, max_bytes: int) -> list[Stage]:
    """Remove what killed builds left, and the stages that were not used for longest, until the rest fits.

    Args:
        cache: where stages are kept; files of others in it stay.
        max_bytes: what may stay.

    Returns:
        The stages that were removed.

    Raises:
        IaptError: there is no such folder, or a build is using it.
    """
    if not cache.is_dir():
        raise IaptError(f"there is no cache at {cache}; nothing to prune")
    with locked(cache / CACHE_LOCK, f"a build is using the cache {cache}; prune it when that is done"):
        for path in list(cache.iterdir()):
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        removed, left = [], 0
        for stage in stages(cache):
            left += stage.size_bytes
            if left > max_bytes or stage.used == 0:
                shutil.rmtree(cache / stage.name)
                removed.append(stage)
                left -= stage.size_bytes
    return removed


def table(cache: Path, kept: list[Stage]) -> Any:
    """The stages as a rich table."""
    from rich.table import Table

    total = sum(stage.size_bytes for stage in kept)
    result = Table(title=f"{cache}: {len(kept)} stages, {total / 1e6:,.1f} MB", box=None, title_justify="left")
    for name in ("stage", "MB", "last used"):
        result.add_column(name, justify="right" if name == "MB" else "left", overflow="fold")
    for stage in kept:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(stage.used)) if stage.used else "never finished"
        result.add_row(stage.name, f"{stage.size_bytes / 1e6:,.1f}", used)
    return result


def place(source: Path, folder: Path) -> None:
    """Copy a file into a folder; see `iapt_export.contract.disk.clone`."""
    clone(source, folder / source.name)


def made_stage(cache: Path, name: str, inputs: dict[str, Any]) -> Path | None:
    """The folder of a stage that is made, unless a file of it is damaged, which only `run_stage` looks for."""
    folder = cache / f"{name}-{content_key(inputs)}"
    return folder if (folder / STAGE_FILE).is_file() else None


def bytes_per_second(cache: Path, name: str) -> float | None:
    """How quickly stages of a name were made here, the last of them; None where there was none."""
    rates = {}
    for stage in stages(cache):
        if stage.name[: -len("-0123456789abcdef")] == name and (cache / stage.name / STAGE_FILE).is_file():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
                seconds = float(parse_json((cache / stage.name / STAGE_FILE).read_bytes())["seconds"])
                rates[stage.used] = stage.size_bytes / seconds
    return rates[max(rates)] if rates else None


def stage_files(folder: Path) -> set[str]:
    """The names of a finished stage's own files."""
    return set(_hashes(folder))


def _hashes(folder: Path) -> dict[str, str]:
    return dict(parse_json((folder / STAGE_FILE).read_bytes())["files"])


def _is_whole(folder: Path) -> bool:
    try:
        hashes = _hashes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    there = {path.name for path in folder.iterdir()} - {STAGE_FILE}
    return there == set(hashes) and all(file_sha256(folder / name) == digest for name, digest in hashes.items())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
