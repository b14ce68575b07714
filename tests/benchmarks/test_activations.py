"""How far an adapter's activations moved, where their inputs are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.activations import changes, draw, inputs_of, learned
from iapt_export.contract.errors import IaptError
from tests.bundles import METHOD, PROMPTS, TinyBuild, save_tiny_adapter
from trainers.adapters.adapter import EXAMPLES_FILE
from trainers.adapters.directory import load_adapter, save_adapter
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import PromptTuningConfig
from trainers.methods.rational import initial_coefficients


def test_what_a_layer_learned_shows_where_its_inputs_are(tiny_build: TinyBuild, tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_build.model))
    folder = save_tiny_adapter(tmp_path / "first", 0, backbone.fingerprint, METHOD)
    adapter = load_adapter(folder)
    top, bottom = initial_coefficients("gelu", 5, 4, "B")
    adapter.tensors["numerator"] = torch.tensor(np.stack([top, top + np.array([0, 0.5, 0, 0, 0, 0])])).float()
    adapter.tensors["denominator"] = torch.tensor(np.stack([bottom, bottom])).float()
    adapter.tensors["down_weight"] = adapter.tensors["down_weight"] * 0.3  # so that inputs end before the drawing does
    save_adapter(tmp_path / "second", adapter.config, adapter.tensors)
    lines = [f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS]
    (tmp_path / "second" / EXAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
    found = learned(tmp_path / "second", backbone)
    assert torch.equal(found.seen, inputs_of(adapter, PROMPTS, backbone))
    low, high = found.seen[1]
    inputs = found.inputs[(found.inputs >= low) & (found.inputs <= high)]
    powers = torch.stack([inputs**power for power in range(1, 5)])
    by_hand = (0.5 * inputs / (1 + (torch.tensor(bottom, dtype=torch.float32) @ powers).abs())).abs().max()
    assert 0 < len(inputs) < len(found.inputs) and found.moved[0] == 0
    assert float(found.moved[1]) == pytest.approx(float(by_hand), rel=1e-4)
    assert changes([found]).splitlines()[-1].endswith(f"{found.moved[1]:.3f} (layer 1) |")
    draw([found], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_a_method_without_an_activation_is_refused(tiny_build: TinyBuild, tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_build.model))
    folder = save_tiny_adapter(tmp_path / "other", 0, backbone.fingerprint, PromptTuningConfig(prompt_length=4))
    with pytest.raises(IaptError, match="expected an IAPT adapter whose rational activation started as one function"):
        learned(folder, backbone)
