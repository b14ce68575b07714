"""A graph whose weights are read when they are written has the bytes of one whose backbone was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import iapt_export.graphs.export
from iapt_export.contract.low_bits import Rounding
from iapt_export.graphs.export import Serving, export_graphs
from tests.graphs import installed
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder.backbone import load_backbone
from trainers.decoder.insertion import sizes_of
from trainers.decoder.stored import is_outline, load_mapped, outline_of


@pytest.fixture
def two_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One backbone of four layers, of which three are traced: as an outline, and loaded; each is traced once."""
    folder = str(save_tiny_backbone(tmp_path / "model", tiny_llama(num_hidden_layers=4).to(torch.bfloat16)))
    stored = load_mapped(folder)
    assert stored is not None
    outline = outline_of(stored, "fp32")
    assert outline is not None and is_outline(outline.model)
    trace, known = iapt_export.graphs.export.trace_graph, {}

    def traced_once(name: str, backbone: Any, *rest: Any) -> ir.Model:
        if id(backbone) not in known:
            known[id(backbone)] = trace(name, backbone, *rest)
        return known[id(backbone)].clone()

    monkeypatch.setattr(iapt_export.graphs.export, "trace_graph", traced_once)
    return {"outline": outline.model, "loaded": load_backbone(folder).model}


@pytest.mark.thorough
def test_an_outline_exports_to_the_same_bytes(two_backbones: dict[str, Any], tmp_path: Path) -> None:
    for bits in (None, 4):
        made = {}
        for name, model in two_backbones.items():
            into = tmp_path / f"{name} {bits}"
            into.mkdir()
            serving = Serving(num_positions=64, rounding=Rounding(bits) if bits else None)
            methods = installed(sizes=sizes_of(model))
            export_graphs(model, methods, into, dtype="fp32", opset=23, names=("serve",), serving=serving)
            made[name] = {path.name: path.read_bytes() for path in into.iterdir()}
        assert made["outline"].keys() == {"serve.onnx", "weights.data", "passes.json"}
        assert made["outline"] == made["loaded"], bits
