"""What keeps files whole: locks that die with their process, folders that change places at once, flushing.

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iapt_export.contract.errors import IaptError

try:
    import fcntl
except ImportError:  # Windows; only what builds and trains takes locks
    fcntl = None  # type: ignore[assignment]

Stamp = tuple[int, int, int]
"""A file's number, size and time of change."""
_CLONE = 0x40049409
"""``FICLONE`` of Linux: a file that shares another's blocks until one of them is written (btrfs, XFS)."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)


@contextmanager
def locked(path: Path, busy: str | None = None, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock file while the context is open; the kernel lets go of it when the process dies, however it dies.

    Unlike a process id in a file it also holds between containers that share a folder.

    Args:
        path: the file, made where it is missing; the last who holds it removes it.
        busy: what to refuse with while another holds it; None waits for that.
        shared: hold it together with others that share it.

    Raises:
        IaptError: another process or thread holds it, or the file system has no locks.
    """
    if fcntl is None:
        raise IaptError("this system has no locks of files (flock), which builds and trainings need; run them on Linux")
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if busy is None else fcntl.LOCK_NB)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind)
            if _is_still(path, descriptor):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise IaptError(str(busy)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise IaptError(f"the file system of {path.parent} has no locks (flock); choose another") from error
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has removed it meanwhile: the lock that counts is another file
    try:
        yield
    finally:
        with contextlib.suppress(BlockingIOError):  # others share it still
            if shared:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def exchange(some: Path, other: Path) -> bool:
    """Let two folders change places in one step, so that both names lead to something at every moment.

    Returns:
        Whether this system and file system can do that; else nothing was changed.

    Raises:
        OSError: anything else that hinders it.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # macOS and Windows have none
        return False
    if rename(_AT_FDCWD, os.fsencode(some), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(some), None, str(other))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it into place.

    Of several who write one file at once each waits for the one before. The name is always the same, so that the next
    who writes the file takes away what a killed one left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _only_writer(temporary):
            try:
                with temporary.open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary name, which is ours


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Nobody else who asks here writes that file; where there are no locks, others may."""
    if fcntl is None:  # Windows, which renames no file that is open
        yield
        return
    while True:
        with path.open("ab") as stream:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_still(path, stream.fileno()):
                yield
                return


def stamp_of(path: Path) -> Stamp | None:
    """What tells a file from one that stood or will stand there; None where there is no such file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return (state.st_ino, state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else None


def sync(folder: Path) -> None:
    """Flush a folder's files to disk, so that a rename cannot reach it before they do."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush what a folder lists, as after a rename in it; nothing on Windows, which opens no folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clone(source: Path, target: Path) -> bool:
    """Copy a file, without taking its bytes a second time where the file system can share them.

    A hard link would do so anywhere, but onnx refuses external data that has more than one, and a copy that is changed
    in place would change the original.

    Returns:
        Whether the two share their bytes.
    """
    with source.open("rb") as given, target.open("wb") as made:
        try:
            if fcntl is not None:
                fcntl.ioctl(made.fileno(), _CLONE, given.fileno())
                return True
        except OSError:  # no such file system, or two of them
            pass
        shutil.copyfileobj(given, made, 2**22)
    return False
