"""What a build may replace is decided before it works, and the bundle is there at every moment."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iapt_export.building import output as module
from iapt_export.building.output import check_output, claimed, publish, temporary_folder
from iapt_export.contract.errors import IaptError

FULL = OSError(errno.ENOSPC, "No space left on device")


def bundle(folder: Path, content: str = "old") -> Path:
    folder.mkdir()
    fields = {"schema_version": 2, "build_key": content, "tenants": [], "files": {"serve.onnx": {}}}
    (folder / "manifest.json").write_text(json.dumps(fields))
    (folder / "serve.onnx").write_text(content)
    return folder


def content(folder: Path) -> str:
    return (folder / "serve.onnx").read_text()


def refusal(output: Path, cache: Path | None = None) -> str:
    with pytest.raises(IaptError) as caught:
        check_output(output, cache)
    return str(caught.value)


def test_output_may_be_new_empty_or_a_bundle(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(tmp_path / "new" / "deeper")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(bundle(tmp_path / "bundle"), tmp_path / "cache")


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
    text = f"--output {output} exists and is not a bundle; nothing was changed. Give another --output"
    assert refusal(output) == text
    assert ((output / "mine") if output.is_dir() else output).read_text() == "mine"


def test_a_bundle_with_files_of_others_is_refused(tmp_path: Path) -> None:
    output = bundle(tmp_path / "bundle")
    (output / "tenants").mkdir()
    (output / "tenants" / "notes.txt").write_text("mine")
    (output / "link").symlink_to(tmp_path)
    assert refusal(output) == (
        f"--output {output} holds files that are not the bundle's: link, tenants/notes.txt; nothing was changed. "
        "Move them away, or give another --output"
    )


def test_the_folder_in_which_the_command_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for output in (Path(), Path(".."), tmp_path / "a"):
        assert "is the folder in which this command runs, or one around it" in refusal(output)
    check_output(Path("bundle"))


def test_mount_points_files_long_names_dangling_links_and_places_in_bundles_are_refused(tmp_path: Path) -> None:
    assert "--output /proc is a mount point" in refusal(Path("/proc"))
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "bundle"
    assert refusal(below) == (
        f"--output {below} cannot be made, because {tmp_path / 'file'} is a file; give another --output"
    )
    assert "the folder's name is too long; give a shorter one" in refusal(tmp_path / ("x" * 250))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert refusal(tmp_path / "dangling") == (
        f"--output {tmp_path / 'dangling'} is a link to nowhere, which does not exist; remove the link"
    )
    outer = bundle(tmp_path / "bundle")
    assert f"is inside the bundle {outer}, which it would damage" in refusal(outer / "tenants" / "new")
    assert "is inside --output" in refusal(tmp_path / "new", tmp_path / "new" / "cache")
    (tmp_path / "loop").symlink_to("loop")
    assert "is a link to loop, which does not exist" in refusal(tmp_path / "loop")


def test_a_link_stays_and_its_bundle_is_replaced(tmp_path: Path) -> None:
    real, link = bundle(tmp_path / "real"), tmp_path / "link"
    link.symlink_to("real")
    check_output(link)
    with claimed(link) as output, temporary_folder(output) as built:
        (built / "serve.onnx").write_text("new")
        publish(built, output)
    assert (link.is_symlink(), content(link), content(real)) == (True, "new", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_one_build_at_a_time_writes_an_output(tmp_path: Path) -> None:
    output = tmp_path / "new" / "bundle"
    with claimed(output):
        with pytest.raises(IaptError) as caught, claimed(output):
            pass
        text = f"another build is writing {output}; wait until it is done, or give another --output"
        assert str(caught.value) == text
    assert not output.parent.exists(), "a build that wrote nothing leaves nothing"
    with claimed(output):
        pass


def test_the_lock_of_a_killed_build_is_open(tmp_path: Path) -> None:
    """Whatever its process id: in a container all may have the same."""
    output = tmp_path / "bundle"
    code = (
        "import os, pathlib, signal\n"
        "from iapt_export.building.output import claimed, temporary_folder\n"
        f"with claimed(pathlib.Path({str(output)!r})) as output, temporary_folder(output) as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(module.__file__).parents[2])
    assert done.returncode == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.building", ".bundle.lock"]
    with claimed(output) as real, temporary_folder(real) as folder:
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stands", [False, True])
def test_a_bundle_that_a_killed_build_moved_aside_comes_back(tmp_path: Path, stands: bool) -> None:
    bundle(tmp_path / ".bundle.old", "aside")
    output = bundle(tmp_path / "bundle", "new") if stands else tmp_path / "bundle"
    with claimed(output):
        assert content(output) == ("new" if stands else "aside")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_publishing_replaces_a_whole_bundle_by_a_whole_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    old, new = bundle(tmp_path / "bundle"), bundle(tmp_path / "built", "new")
    if not exchanges:
        monkeypatch.setattr(module, "exchange", lambda *_: False)
    publish(new, old)
    assert content(old) == "new"
    left = [path for path in tmp_path.iterdir() if path != old]
    assert [content(path) for path in left] == (["old"] if exchanges else [])


def test_a_bundle_that_is_replaced_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rename touches the output: the two change places in one step."""
    old, new = bundle(tmp_path / "bundle"), bundle(tmp_path / "built", "new")
    monkeypatch.setattr(module.os, "replace", lambda *_: pytest.fail("a moment without the bundle"))
    publish(new, old)
    assert (content(old), content(new)) == ("new", "old")


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

    monkeypatch.setattr(module, "exchange", lambda *_: False)
    monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(type(stop)):
        publish(new, old)
    assert content(old) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "bundle"]
