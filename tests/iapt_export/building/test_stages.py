"""Finished stages are kept, interrupted ones leave nothing, and only bundles are ever replaced."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iapt_export.building import stage_cache as stages
from iapt_export.building.stage_cache import (
    STAGE_FILE,
    check_output,
    content_key,
    default_cache,
    place,
    publish,
    run_stage,
    temporary_folder,
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


@pytest.fixture
def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    make = Maker()
    folder, found = run_stage(tmp_path, "graphs", INPUTS, make)
    assert (found, make.calls) == (False, 1)
    assert {path.name for path in folder.iterdir()} == {"first", "second", STAGE_FILE}
    assert run_stage(tmp_path, "graphs", dict(reversed(INPUTS.items())), make) == (folder, True)
    assert make.calls == 1
    assert folder.name == f"graphs-{content_key(INPUTS)}"
    assert json.loads((folder / STAGE_FILE).read_text())["inputs"] == INPUTS


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

    monkeypatch.setattr(stages, "write_atomically", fail)
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


def test_a_stage_that_another_build_finished_meanwhile_is_used(tmp_path: Path) -> None:
    def make_while_another_build_does(folder: Path) -> None:
        Maker()(folder)
        other = tmp_path / "other"
        made, _ = run_stage(other, "graphs", INPUTS, Maker())
        made.rename(tmp_path / "cache" / made.name)

    folder, found = run_stage(tmp_path / "cache", "graphs", INPUTS, make_while_another_build_does)
    assert not found
    assert (folder / STAGE_FILE).is_file()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_broken_folder_in_the_way_is_an_error(tmp_path: Path) -> None:
    def make_while_something_blocks(folder: Path) -> None:
        Maker()(folder)
        final = tmp_path / folder.name.split(".building-")[0].removeprefix(".")
        final.mkdir()
        (final / "half").write_text("written", encoding="utf-8")

    with pytest.raises(OSError, match="not empty"):
        run_stage(tmp_path, "graphs", INPUTS, make_while_something_blocks)


@pytest.mark.parametrize("stands", [False, True])
def test_a_bundle_that_a_killed_build_moved_aside_comes_back(tmp_path: Path, dead_process: int, stands: bool) -> None:
    output = tmp_path / "bundle"
    aside = tmp_path / f".bundle.old-{dead_process}"
    fields = {"schema_version": 2, "build_key": "old", "tenants": []}
    for folder in [aside, *([output] if stands else [])]:
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(fields | {"build_key": folder.name}), encoding="utf-8")
    check_output(output)
    assert not aside.exists()
    kept = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["build_key"]
    assert kept == ("bundle" if stands else aside.name)


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path, dead_process: int) -> None:
    final = tmp_path / "bundle"
    dead = tmp_path / f".bundle.building-{dead_process}"
    alive = tmp_path / f".bundle.building-{os.getppid()}"
    odd = tmp_path / ".bundle.building-x"
    other = tmp_path / f".other.building-{dead_process}"
    for folder in (dead, alive, odd, other):
        folder.mkdir()
        (folder / "half").write_text("half")
    with temporary_folder(final) as temporary:
        assert not dead.exists() and not odd.exists()
        assert alive.exists() and other.exists()
        assert temporary.parent == final.parent and list(temporary.iterdir()) == []
    assert not temporary.exists() and not final.exists()


def test_a_temporary_folder_starts_empty_and_makes_its_parents(tmp_path: Path) -> None:
    final = tmp_path / "a" / "b" / "bundle"
    with temporary_folder(final) as temporary:
        (temporary / "x").touch()
        os.replace(temporary, final)
    assert (final / "x").exists() and [path.name for path in final.parent.iterdir()] == ["bundle"]


def bundle(folder: Path, content: str = "old") -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, "build_key": content, "tenants": []}))
    return folder


def test_output_may_be_new_empty_or_a_bundle(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(tmp_path / "new" / "deeper")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(bundle(tmp_path / "bundle"))


@pytest.mark.parametrize("kind", ["file", "folder", "web app", "broken manifest", "list manifest"])
def test_output_that_is_not_ours_is_refused(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
        manifests = {"web app": '{"name": "app", "icons": []}', "broken manifest": "{", "list manifest": "[]"}
        if kind in manifests:
            (output / "manifest.json").write_text(manifests[kind])
    with pytest.raises(IaptError) as caught:
        check_output(output)
    assert str(caught.value) == (
        f"--output {output} exists and is not a bundle; nothing was changed. Give another --output"
    )
    assert ((output / "mine") if output.is_dir() else output).read_text() == "mine"


def test_publishing_replaces_a_whole_bundle_by_a_whole_bundle(tmp_path: Path) -> None:
    old, new = bundle(tmp_path / "bundle"), bundle(tmp_path / "built", "new")
    publish(new, old)
    assert json.loads((old / "manifest.json").read_text())["build_key"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("stop", [FULL, KeyboardInterrupt()], ids=repr)
def test_a_failed_publication_puts_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    old, new = bundle(tmp_path / "bundle"), bundle(tmp_path / "built", "new")
    honest = os.replace

    def replace(source: Path, target: Path) -> None:
        if source == new:
            raise stop
        honest(source, target)

    monkeypatch.setattr(stages.os, "replace", replace)
    with pytest.raises(type(stop)):
        publish(new, old)
    assert json.loads((old / "manifest.json").read_text())["build_key"] == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "bundle"]


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
