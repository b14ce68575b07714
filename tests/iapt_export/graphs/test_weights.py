"""A graph whose weights are read when they are written has the bytes of one whose backbone was loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iapt_export.graphs.export import Serving, export_graphs
from tests.graphs import installed
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder.backbone import load_backbone
from trainers.decoder.insertion import sizes_of
from trainers.decoder.stored import is_outline, load_mapped, outline_of


@pytest.mark.parametrize("bits", [None, 4])
def test_an_outline_exports_to_the_same_bytes(tmp_path: Path, bits: int | None) -> None:
    folder = str(save_tiny_backbone(tmp_path / "model", tiny_llama(num_hidden_layers=4).to(torch.bfloat16)))
    stored = load_mapped(folder)
    assert stored is not None
    outline = outline_of(stored, "fp32")
    assert outline is not None and is_outline(outline.model)
    made = {}
    for name, model in (("outline", outline.model), ("loaded", load_backbone(folder).model)):
        into = tmp_path / name
        into.mkdir()
        serving = Serving(num_positions=64, weight_bits=bits)
        export_graphs(
            model, installed(sizes=sizes_of(model)), into, dtype="fp32", opset=23, names=("serve",), serving=serving
        )
        made[name] = {path.name: path.read_bytes() for path in into.iterdir()}
    assert made["outline"].keys() == {"serve.onnx", "weights.data", "passes.json"}
    assert made["outline"] == made["loaded"]
