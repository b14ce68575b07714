"""What a machine has left, as Linux and its containers say it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest

from iapt_export.contract.resources import file_system, free_disk, free_memory, give_back_memory


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       24000 kB\nMemAvailable:    9000 kB\n", encoding="ascii")
    return path


def test_free_memory_is_what_the_kernel_says(tmp_path: Path, meminfo: Path) -> None:
    assert free_memory(meminfo, tmp_path) == 9000 * 1024
    assert free_memory(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, meminfo: Path, version: int) -> None:
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    limit, used, field = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / limit).write_text("6000000\n")
    (folder / used).write_text("3000000\n")
    (folder / "memory.stat").write_text(f"anon 5\n{field} 1000000\n")
    assert free_memory(meminfo, tmp_path) == 4_000_000, "cached files count as free"
    (folder / used).write_text("9000000\n")
    assert free_memory(meminfo, tmp_path) == 0
    (folder / limit).write_text("max\n" if version == 2 else f"{2**63}\n")
    assert free_memory(meminfo, tmp_path) == 9000 * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_returns_to_the_system() -> None:
    """glibc keeps what lies below a block that is still held."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size, count = 64 * 1024, 1000  # below glibc's smallest threshold of a mapping of its own
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    held = blocks[::16]
    for block in set(blocks) - set(held):
        libc.free(block)
    kept = resident()
    give_back_memory()
    assert resident() < kept - size * count // 2
    for block in held:
        libc.free(block)


def test_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "yet") > 0
    assert file_system(tmp_path / "not" / "yet") == tmp_path.stat().st_dev
