"""How many cores this process may use: its affinity, and in a container its quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_cores(cgroups: Path = CGROUPS) -> int:
    """Cores that the scheduler may put this process on, and no more than its control group's quota rounded up.

    Args:
        cgroups: where control groups are mounted; version 2's ``cpu.max`` or version 1's ``cpu.cfs_*`` are read.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroups)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroups: Path) -> float | None:
    """Processor seconds per second; None without a limit. A container sees its own group at the mount."""
    try:
        if (cgroups / "cpu.max").is_file():
            limit, period = (cgroups / "cpu.max").read_text(encoding="ascii").split()
        else:
            limit = (cgroups / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (cgroups / "cpu/cpu.cfs_period_us").read_text(encoding="ascii").strip()
        return float(limit) / float(period) if limit not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
