"""The folder that a build writes: what may be replaced is decided before the work, and it is never absent.

    .NAME.lock       held by the build; whoever dies lets go of it
    .NAME.building   the new bundle, until it is whole; then the two change places
    .NAME.old        the old bundle, only where the file system cannot let two folders change places

All stand beside the bundle, and the next build of it removes what a killed one left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iapt_export.contract.disk import exchange, locked, sync, sync_folder
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import MANIFEST_FILE, OUTSIDE_MANIFEST
from iapt_export.contract.places import bundle_around, is_bundle
from iapt_export.contract.schema import read_object

LONGEST_ADDITION = len("-failed-report")
"""Bytes by which the names beside a bundle are longer than its own."""


def check_output(output: Path, cache: Path | None = None) -> None:
    """Refuse, before any work, an output that cannot be written or would cost somebody their files.

    Args:
        output: as the user gave it; a link is followed, so that it stays and its bundle is replaced.
        cache: where stages are kept.

    Raises:
        IaptError: why not, and what to give instead.
    """
    if output.is_symlink() and not output.exists():
        raise IaptError(f"--output {output} is a link to {output.readlink()}, which does not exist; remove the link")
    real = output.resolve()
    if (above := next(path for path in real.parents if path.exists())) and not above.is_dir():
        raise IaptError(f"--output {output} cannot be made, because {above} is a file; give another --output")
    if Path.cwd().is_relative_to(real):
        raise IaptError(
            f"--output {output} is the folder in which this command runs, or one around it, and the bundle's folder "
            "is replaced as a whole; give a new name, such as --output bundle"
        )
    if real.is_mount():
        raise IaptError(
            f"--output {output} is a mount point, which cannot be replaced as a whole; give a folder in it, such as "
            f"--output {output / 'bundle'}"
        )
    if len(os.fsencode(real.name)) + LONGEST_ADDITION > os.pathconf(above, "PC_NAME_MAX"):
        raise IaptError(f"--output {output}: the folder's name is too long; give a shorter one")
    if around := bundle_around(real.parent):
        raise IaptError(
            f"--output {output} is inside the bundle {around}, which it would damage; give another --output"
        )
    if cache is not None and cache.resolve().is_relative_to(real):
        raise IaptError(f"--cache {cache} is inside --output {output}, which is replaced as a whole; give another")
    if real.exists():
        _check_replaceable(output)


def _check_replaceable(output: Path) -> None:
    """Refuse to replace anything but an empty folder, or a bundle with nothing else in it."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if not is_bundle(output):
        raise IaptError(f"--output {output} exists and is not a bundle; nothing was changed. Give another --output")
    files = read_object(output / MANIFEST_FILE, "move it away").get("files")
    own = {*(files if isinstance(files, dict) else ()), *OUTSIDE_MANIFEST}
    foreign = sorted(
        path.relative_to(output).as_posix()
        for path in output.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(output).as_posix() not in own
    )
    if foreign:
        raise IaptError(
            f"--output {output} holds files that are not the bundle's: {', '.join(foreign[:5])}; nothing was changed. "
            "Move them away, or give another --output"
        )


@contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """Hold the place of a bundle for one build: put back what a killed build moved aside, then let nobody else in.

    Args:
        output: as `check_output` took it.

    Yields:
        Where it lies, without links.

    Raises:
        IaptError: another build writes there.
    """
    real = output.resolve()
    missing = [path for path in real.parents if not path.exists()]
    real.parent.mkdir(parents=True, exist_ok=True)
    try:
        busy = f"another build is writing {output}; wait until it is done, or give another --output"
        with locked(_beside(real, "lock"), busy):
            aside = _beside(real, "old")
            if aside.exists() and not real.exists():
                os.replace(aside, real)
            shutil.rmtree(aside, ignore_errors=True)
            yield real
    finally:
        for folder in missing:  # of a build that failed, nothing stays
            if not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside ``final``, whose lock the caller holds; it is gone when the context closes.

    What a killed run left there is removed first.
    """
    temporary = _beside(final, "building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(built: Path, output: Path) -> None:
    """Put a finished bundle into its place, whose lock the caller holds; one that stood there is removed afterwards.

    What came to stand there since `check_output` is looked at once more, and left alone as it would have been then.

    A kill at any moment leaves the old bundle or the new one. Where the file system cannot let two folders change
    places, a kill between two renames leaves none, and the next build of it puts the old one back.
    """
    if output.is_symlink():
        raise IaptError(f"--output {output} has become a link during the build; nothing was changed. Remove it")
    if output.exists():
        _check_replaceable(output)
    sync(built)
    if not output.is_dir() or not any(output.iterdir()):
        os.replace(built, output)
    elif not exchange(built, output):
        _replace_in_two_steps(built, output)
    sync_folder(output.parent)


def _replace_in_two_steps(built: Path, output: Path) -> None:
    old = _beside(output, "old")
    os.replace(output, old)
    try:
        os.replace(built, output)
    except BaseException:  # an interrupt too: what stood there must stand there again
        os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(final: Path, what: str) -> Path:
    return final.with_name(f".{final.name}.{what}")
