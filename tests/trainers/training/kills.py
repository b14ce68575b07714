"""What a kill before each file operation of a run would leave on disk, taken from one run that is not killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

Disk = dict[str, bytes | None]
"""Relative path to a file's bytes, or to None for a folder."""
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def read_disk(root: Path) -> Disk:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def write_disk(disk: Disk, root: Path) -> None:
    for name, data in sorted(disk.items()):
        if data is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)


class _Watch:
    """An audit hook, which Python never removes again; it does nothing while there is no root."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self.states: list[Disk] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None or (event != "open" and event not in CHANGES):
            return
        root, self.root = self.root, None  # reading the disk is no event
        try:
            if event != "open":
                self._keep(read_disk(root))
            elif isinstance(arguments[0], str | Path) and arguments[2] & WRITING:
                self._keep(disk := read_disk(root))
                if Path(arguments[0]).is_relative_to(root):
                    self._keep({**disk, str(Path(arguments[0]).relative_to(root)): b"torn"})
        finally:
            self.root = root

    def _keep(self, disk: Disk) -> None:
        if disk not in self.states:
            self.states.append(disk)


_watch = _Watch()


@contextmanager
def states_of_kills(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Disk]]:
    """Collect each distinct state of ``root`` before an operation inside the context, and with each file half-written.

    torch.save opens its files out of Python's sight, so it is made to report them.
    """
    if not _watch.states:
        sys.addaudithook(_watch)
    save = torch.save

    def told(value: Any, path: str) -> None:
        sys.audit("open", path, "wb", os.O_WRONLY)
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", told)
        _watch.root, _watch.states = root, []
        try:
            yield _watch.states
        finally:
            _watch.root = None
