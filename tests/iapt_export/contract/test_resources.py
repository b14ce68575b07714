"""What a machine has left, as Linux and its containers say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from iapt_export.contract.resources import file_system, free_disk, free_memory


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


def test_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "yet") > 0
    assert file_system(tmp_path / "not" / "yet") == tmp_path.stat().st_dev
