"""The large model's maker, on a small shape, and what is measured of a process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import build
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_backbone
from trainers.decoder.stored import stored_type


def test_a_model_is_made_that_loads_with_its_tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    monkeypatch.setattr(build, "LLAMA_2_7B", {**build.LLAMA_2_7B, **small, "vocab_size": 320})
    assert build.main(["make", "--folder", str(tmp_path), "--layers", "3"]) == 0
    model = tmp_path / "model"
    assert stored_type(str(model)) == "bf16" and len(list(model.glob("*.safetensors"))) == 3 + 3
    backbone = load_backbone(str(model))
    assert backbone.model.config.num_hidden_layers == 3
    one, two = (load_adapter(tmp_path / "adapters" / name) for name in build.TENANTS)
    assert one.config.backbone_fingerprint == two.config.backbone_fingerprint == backbone.fingerprint
    assert any((one.tensors[name] != two.tensors[name]).any() for name in one.tensors)


def test_a_process_is_measured_from_outside(tmp_path: Path) -> None:
    taken = "import time; held = bytearray(64 * 2**20); time.sleep(0.5); print('done')"
    figures = build.measured([sys.executable, "-c", taken], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "done\n" and figures["seconds"] >= 0.5
    assert 64 / 1024 <= figures["anonymous_gib"] <= figures["resident_gib"] < 1
    with pytest.raises(SystemExit, match="ends with"):
        build.measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


def test_flags_of_the_build_stand_behind_two_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(build, "measure", lambda *arguments: given.append(arguments) or {})
    assert build.main(["measure", "--folder", str(tmp_path), "--", "--batch", "1:2:4", "--depth", "quick"]) == 0
    assert build.main(["measure", "--folder", str(tmp_path)]) == 0
    assert given == [(tmp_path, ["--batch", "1:2:4", "--depth", "quick"]), (tmp_path, [])]
