"""Locks die with their process, folders change places at once, and errors name the file that was meant."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from iapt_export.contract import disk as module
from iapt_export.contract.disk import exchange, locked
from iapt_export.contract.errors import IaptError, explain
from iapt_export.contract.manifest import write_atomically

ROOT = Path(module.__file__).parents[2]


def test_two_who_write_one_file_write_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins before the first has renamed its own, and waits for that."""
    path, sync = tmp_path / "file", os.fsync
    second = threading.Thread(target=write_atomically, args=(path, b"2nd"))

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        second.start()
        second.join(0.2)
        assert second.is_alive() and not path.exists()

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(path, b"the first")
    second.join(20)
    assert path.read_bytes() == b"2nd" and [other.name for other in tmp_path.iterdir()] == ["file"]


def test_a_lock_keeps_others_away_and_leaves_no_file(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock, "taken"), pytest.raises(IaptError, match="taken"), locked(lock, "taken"):
        pass
    assert not lock.exists()
    share: Any = {"busy": "taken", "shared": True}
    with locked(lock, **share), locked(lock, **share), pytest.raises(IaptError, match="taken"), locked(lock, "taken"):
        pass
    with locked(lock, "taken"):
        assert lock.exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import pathlib, sys\nfrom iapt_export.contract.disk import locked\n"
        f"with locked(pathlib.Path({str(lock)!r})):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with locked(lock, "taken"):
        other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    with pytest.raises(IaptError, match="taken"), locked(lock, "taken"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(lock, "taken"):
        pass
    assert not lock.exists()


def test_folders_change_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_a_system_without_exchange_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        pass

    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: Bare())
    assert exchange(tmp_path / "a", tmp_path / "b") is False


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.ENAMETOOLONG])
def test_a_failed_write_names_the_file_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_atomically(tmp_path / "out.json", b"data")
    text = explain(caught.value)
    assert text is not None and text.startswith(f"{os.strerror(number)}: {tmp_path / 'out.json'}; ")
    assert "--" not in text and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shares", [True, False], ids=["a file system that shares blocks", "one that does not"])
def test_a_clone_has_the_bytes_and_stays_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    (tmp_path / "one").write_bytes(content := bytes(range(256)) * 99)

    def ioctl(made: int, request: int, given: int) -> int:
        if not shares:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        assert request == 0x40049409
        return os.write(made, os.pread(given, len(content), 0)) * 0

    monkeypatch.setattr(module.fcntl, "ioctl", ioctl)
    (tmp_path / "two").write_bytes(b"longer than it will be" * 9999)
    assert module.clone(tmp_path / "one", tmp_path / "two") is shares
    assert (tmp_path / "two").read_bytes() == content and (tmp_path / "two").stat().st_nlink == 1
    (tmp_path / "two").write_bytes(b"other")
    assert (tmp_path / "one").read_bytes() == content
