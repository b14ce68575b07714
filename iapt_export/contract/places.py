"""Bundles as places on a disk: whether a folder is one, and what must not be written into one."""

from __future__ import annotations

from pathlib import Path

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import MANIFEST_FILE
from iapt_export.contract.schema import parse_json


def is_bundle(folder: Path) -> bool:
    """Whether a manifest of ours stands there; web pages and other tools have files of that name too."""
    try:
        fields = parse_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"schema_version", "build_key", "tenants"} <= set(fields)


def bundle_around(path: Path) -> Path | None:
    """The bundle in which a path lies, the path itself included; None where it lies in none."""
    real = path.resolve()
    return next((folder for folder in (real, *real.parents) if is_bundle(folder)), None)


def check_outside_bundles(path: Path | None, what: str) -> None:
    """Refuse to write into a bundle, whose manifest names every file in it.

    Args:
        path: a file or folder that is to be written; None is none.
        what: what to call it, such as ``--report``.

    Raises:
        IaptError: it lies in a bundle.
    """
    if path is not None and (around := bundle_around(path)):
        raise IaptError(f"{what} {path} is inside the bundle {around}, which it would damage; write it elsewhere")
