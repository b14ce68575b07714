"""What this machine has left: memory, within the limits of its container, and disk. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
from pathlib import Path

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Of version 2 and version 1: the limit, what is used, and what of that are cached files nobody needs."""


def free_memory(meminfo: Path = MEMINFO, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that a process may still take without swapping; None where the system does not say.

    Args:
        meminfo: of the Linux kernel.
        cgroups: where control groups are mounted.
    """
    found = []
    with contextlib.suppress(OSError):
        if match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii")):
            found.append(int(match[1]) * 1024)
    for limit, used, stat, field in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
            most = int((cgroups / limit).read_text(encoding="ascii"))
            match = re.search(rf"^{field} (\d+)$", (cgroups / stat).read_text(encoding="ascii"), re.MULTILINE)
            taken = int((cgroups / used).read_text(encoding="ascii")) - (int(match[1]) if match else 0)
            found.append(max(0, most - taken))
    return min(found, default=None)


def give_back_memory() -> None:
    """Let the C library return to the system what has been freed; nothing where it has no such function.

    glibc keeps it: after two sessions over 7 billion weights in int4, one after the other, a process had both.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other libraries; a system without one
        ctypes.CDLL(None).malloc_trim(0)


def free_disk(folder: Path) -> int:
    """Bytes that may still be written to the file system of a folder, which need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def file_system(folder: Path) -> int:
    """Tells file systems apart; of a folder that need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return there.stat().st_dev
