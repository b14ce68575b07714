"""Finished stages of a build, kept by content: an interrupted build goes on, a repeated one takes seconds.

A stage is a folder named after the hash of everything that went into it. It is written under a
temporary name and renamed when complete, so a folder that bears its name is whole; its files' hashes
are checked again before every use, so that an altered file is rebuilt and not shipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import MANIFEST_FILE, file_sha256, write_atomically

STAGE_FILE = "stage.json"
CACHE_VARIABLE = "IAPT_EXPORT_CACHE"


def default_cache() -> Path:
    """``$IAPT_EXPORT_CACHE``, or ``iapt-export`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "iapt-export"


def content_key(fields: dict[str, Any]) -> str:
    """Sixteen hex digits over a JSON-serialisable description."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def run_stage(cache: Path, name: str, inputs: dict[str, Any], make: Callable[[Path], None]) -> tuple[Path, bool]:
    """Make a stage's files, or find them made.

    Args:
        cache: where stages are kept.
        name: the stage's name.
        inputs: everything that determines its result.
        make: writes the files into the empty folder that it is given.

    Returns:
        The stage's folder, and whether it was found made.
    """
    folder = cache / f"{name}-{content_key(inputs)}"
    if _is_whole(folder):
        return folder, True
    shutil.rmtree(folder, ignore_errors=True)
    with temporary_folder(folder) as temporary:
        make(temporary)
        hashes = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        write_atomically(temporary / STAGE_FILE, json.dumps({"inputs": inputs, "files": hashes}, indent=2).encode())
        try:
            os.replace(temporary, folder)
        except OSError:
            if not _is_whole(folder):  # else another build finished the same stage meanwhile, and its files serve
                raise
    return folder, False


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside ``final`` that is gone when the context closes, unless it was renamed away.

    Leftovers of killed runs are removed first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".{final.name}.building-*"):
        if not _is_alive(leftover.name.rsplit("-", 1)[1]):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.parent / f".{final.name}.building-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path) -> None:
    """Refuse to replace anything but a bundle; put back one that a killed build had moved aside.

    Raises:
        IaptError: something else stands there.
    """
    for aside in output.parent.glob(f".{output.name}.old-*"):
        if _is_alive(aside.name.rsplit("-", 1)[1]):
            continue
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, output)
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not _is_bundle(output):
        raise IaptError(f"--output {output} exists and is not a bundle; nothing was changed. Give another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether a manifest of ours stands there; web pages and other tools have files of that name too."""
    try:
        fields = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"schema_version", "build_key", "tenants"} <= set(fields)


def publish(built: Path, output: Path) -> None:
    """Rename a finished bundle into place; one that stood there goes only when the new one stands."""
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(built, output)
    except BaseException:  # an interrupt too: what stood there must stand there again
        if old.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def place(source: Path, folder: Path) -> None:
    """Copy a file into a folder.

    A hard link would save the disk a copy, but onnx refuses external data with more than one, and a bundle whose
    file is changed in place would change the stage behind it.
    """
    shutil.copyfile(source, folder / source.name)


def _is_whole(folder: Path) -> bool:
    try:
        hashes = dict(json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all((folder / name).is_file() and file_sha256(folder / name) == digest for name, digest in hashes.items())


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (OSError, ValueError):
        return False
    return True
