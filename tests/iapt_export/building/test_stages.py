"""Finished stages are kept and shared, interrupted ones leave nothing, old ones are pruned."""

from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from iapt_export.building import stage_cache as module
from iapt_export.building.stage_cache import (
    STAGE_FILE,
    content_key,
    default_cache,
    in_use,
    place,
    prune,
    run_stage,
    stages,
)
from iapt_export.contract.errors import IaptError

INPUTS = {"model": "abc", "opset": 23}
FULL = OSError(errno.ENOSPC, "No space left on device")


class Maker:
    """Writes two files, counts its calls, and stops in the middle when told to."""

    def __init__(self, stop: BaseException | None = None) -> None:
        self.calls = 0
        self.stop = stop

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "first").write_bytes(b"one")
        if self.stop is not None:
            raise self.stop
        (folder / "second").write_bytes(b"two")


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    make = Maker()
    folder, found = run_stage(tmp_path, "graphs", INPUTS, make)
    assert (found, make.calls) == (False, 1)
    assert {path.name for path in folder.iterdir()} == {"first", "second", STAGE_FILE}
    assert run_stage(tmp_path, "graphs", dict(reversed(INPUTS.items())), make) == (folder, True)
    assert make.calls == 1
    assert folder.name == f"graphs-{content_key(INPUTS)}"
    assert json.loads((folder / STAGE_FILE).read_text())["inputs"] == INPUTS


@pytest.mark.parametrize("change", ["list", "folder"])
def test_a_stage_has_the_files_that_it_lists_and_no_others(tmp_path: Path, change: str) -> None:
    make = Maker()
    folder, _ = run_stage(tmp_path, "graphs", INPUTS, make)
    record = json.loads((folder / STAGE_FILE).read_text())
    if change == "list":
        del record["files"]["second"]
        (folder / STAGE_FILE).write_text(json.dumps(record))
    else:
        (folder / "third").write_bytes(b"three")
    assert run_stage(tmp_path, "graphs", INPUTS, make) == (folder, False)
    assert make.calls == 2 and {path.name for path in folder.iterdir()} == {"first", "second", STAGE_FILE}


def test_other_inputs_and_other_names_are_other_stages(tmp_path: Path) -> None:
    make = Maker()
    folders = {
        run_stage(tmp_path, "graphs", INPUTS, make)[0],
        run_stage(tmp_path, "graphs", {**INPUTS, "opset": 20}, make)[0],
        run_stage(tmp_path, "engine", INPUTS, make)[0],
    }
    assert (len(folders), make.calls) == (3, 3)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), FULL, IaptError("bad"), SystemExit(1)], ids=repr)
def test_an_interrupted_stage_leaves_nothing(tmp_path: Path, stop: BaseException) -> None:
    with pytest.raises(type(stop)):
        run_stage(tmp_path, "graphs", INPUTS, Maker(stop))
    assert list(tmp_path.iterdir()) == []
    make = Maker()
    assert (run_stage(tmp_path, "graphs", INPUTS, make)[1], make.calls) == (False, 1)


def test_a_stage_whose_record_cannot_be_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(module, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left"):
        run_stage(tmp_path, "graphs", INPUTS, Maker())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "second").write_bytes(b"tWo"),
        lambda folder: (folder / "second").write_bytes(b"tw"),
        lambda folder: (folder / "second").unlink(),
        lambda folder: (folder / STAGE_FILE).unlink(),
        lambda folder: (folder / STAGE_FILE).write_text("{"),
        lambda folder: (folder / STAGE_FILE).write_text("[]"),
        lambda folder: (folder / STAGE_FILE).write_text('{"files": 3}'),
        lambda folder: (folder / STAGE_FILE).write_text("{}"),
        lambda folder: (folder / STAGE_FILE).write_bytes(b"\xff"),
    ],
    ids=["altered", "truncated", "missing", "no record", "no JSON", "a list", "no mapping", "no files", "no text"],
)
def test_a_damaged_stage_is_made_again(tmp_path: Path, damage: Any) -> None:
    folder, _ = run_stage(tmp_path, "graphs", INPUTS, Maker())
    damage(folder)
    make = Maker()
    assert run_stage(tmp_path, "graphs", INPUTS, make) == (folder, False)
    assert (make.calls, (folder / "second").read_bytes()) == (1, b"two")
    assert run_stage(tmp_path, "graphs", INPUTS, make)[1]


def test_a_stage_that_another_build_makes_is_waited_for_and_not_made_twice(tmp_path: Path) -> None:
    first, second, begun, go_on = Maker(), Maker(), threading.Event(), threading.Event()

    def make_slowly(folder: Path) -> None:
        begun.set()
        assert go_on.wait(10)
        first(folder)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run_stage, tmp_path, "graphs", INPUTS, make_slowly)
        assert begun.wait(10)
        other = pool.submit(run_stage, tmp_path, "graphs", INPUTS, second)
        go_on.set()
        assert (one.result()[1], other.result()[1]) == (False, True)
        assert one.result()[0] == other.result()[0]
    assert (first.calls, second.calls) == (1, 0)
    assert [path.name for path in tmp_path.iterdir()] == [one.result()[0].name]


def test_a_placed_file_is_nobody_elses(tmp_path: Path) -> None:
    """onnx refuses external data with hard links, and a change to a bundle must not reach the stage behind it."""
    source = tmp_path / "weights.data"
    source.write_bytes(b"weights")
    (tmp_path / "bundle").mkdir()
    place(source, tmp_path / "bundle")
    placed = tmp_path / "bundle/weights.data"
    assert (placed.read_bytes(), placed.stat().st_nlink, placed.samefile(source)) == (b"weights", 1, False)


def test_where_stages_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("IAPT_EXPORT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "iapt-export"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache() == Path.home() / ".cache" / "iapt-export"
    monkeypatch.setenv("IAPT_EXPORT_CACHE", str(tmp_path / "named"))
    assert default_cache() == tmp_path / "named"


def three_stages(cache: Path) -> list[Path]:
    """Of six bytes and their records, used one, two and three days after 1970."""
    folders = [run_stage(cache, "graphs", {"number": number}, Maker())[0] for number in range(3)]
    for day, folder in enumerate(folders, 1):
        os.utime(folder / STAGE_FILE, (day * 86400, day * 86400))
    return folders


def test_what_a_cache_keeps_is_told_by_its_last_use(tmp_path: Path) -> None:
    assert stages(tmp_path / "none") == []
    folders = three_stages(tmp_path)
    (tmp_path / "notes").mkdir()
    found = stages(tmp_path)
    assert [stage.name for stage in found] == [folder.name for folder in reversed(folders)]
    assert [stage.used for stage in found] == [259200, 172800, 86400]
    assert found[0].size_bytes == 6 + (folders[2] / STAGE_FILE).stat().st_size
    run_stage(tmp_path, "graphs", {"number": 0}, Maker())
    assert stages(tmp_path)[0].name == folders[0].name, "finding a stage is a use of it"


def test_pruning_keeps_what_was_used_last(tmp_path: Path) -> None:
    folders = three_stages(tmp_path)
    size = sum(stage.size_bytes for stage in stages(tmp_path))
    assert prune(tmp_path, size) == []
    assert [stage.name for stage in prune(tmp_path, size - 1)] == [folders[0].name]
    assert [folder.is_dir() for folder in folders] == [False, True, True]
    assert len(prune(tmp_path, 0)) == 2
    assert list(tmp_path.iterdir()) == []


def test_pruning_removes_what_killed_builds_left_and_nothing_of_others(tmp_path: Path) -> None:
    (stage, *_) = three_stages(tmp_path)
    for name in (f".{stage.name}.building", f".{stage.name}.building-77", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    (tmp_path / f".{stage.name}.lock").touch()
    (stage / STAGE_FILE).unlink()  # as a kill while it was removed
    assert [left.name for left in prune(tmp_path, 10**9)] == [stage.name]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted(["notes", *(left.name for left in stages(tmp_path))]) and len(kept) == 3


def test_a_cache_in_use_is_not_pruned(tmp_path: Path) -> None:
    folders = three_stages(tmp_path)
    with in_use(tmp_path), in_use(tmp_path), pytest.raises(IaptError) as caught:
        prune(tmp_path, 0)
    assert str(caught.value) == f"a build is using the cache {tmp_path}; prune it when that is done"
    assert all(folder.is_dir() for folder in folders)
    assert len(prune(tmp_path, 0)) == 3
    with pytest.raises(IaptError, match="there is no cache at"):
        prune(tmp_path / "none", 0)
