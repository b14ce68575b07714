"""Tiny checkpoints in FP8, and the same ones with their weights multiplied out by hand."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import save_tiny_backbone

LARGEST = 448.0
"""Of E4M3."""
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Fp8:
    """How matrices are rounded."""

    block: tuple[int, int] | None = (16, 16)
    scale_type: torch.dtype = torch.float32
    static: bool = False
    """Whether scales of inputs stand beside those of weights."""


def rounded(weight: Tensor, kind: Fp8) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix [R, C] in E4M3, its scales, and their product in fp32, block by block."""
    height, width = kind.block or weight.shape
    rows, columns = range(0, weight.shape[0], height), range(0, weight.shape[1], width)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales, product = torch.empty(len(rows), len(columns), dtype=kind.scale_type), torch.empty(weight.shape)
    for (i, top), (j, left) in itertools.product(enumerate(rows), enumerate(columns)):
        at = (slice(top, top + height), slice(left, left + width))
        scales[i, j] = weight[at].abs().max() / LARGEST
        scale = scales[i, j].float()
        values[at] = (weight[at] / scale).clamp(-LARGEST, LARGEST).to(values.dtype)
        product[at] = values[at].float() * scale
    return values, scales if kind.block else scales.reshape(()), product


def save_fp8(root: Path, model: Any, kind: Fp8 | None = None) -> tuple[Path, Path]:
    """A model's folder with its layers' matrices in FP8, and one with the products of the same values and scales."""
    kind = kind or Fp8()
    folder, by_hand = root / "fp8", root / "by-hand"
    save_tiny_backbone(folder, model)
    shutil.copytree(folder, by_hand)
    stored, products = {}, {}
    for name, weight in load_file(folder / WEIGHTS).items():
        stored[name] = products[name] = weight
        if name.endswith("proj.weight"):
            stored[name], stored[f"{name}_scale_inv"], products[name] = rounded(weight.float(), kind)
            if kind.static:
                stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    save_file(products, by_hand / WEIGHTS, {"format": "pt"})
    scheme = "static" if kind.static else "dynamic"
    set_quantisation(folder, quant_method="fp8", activation_scheme=scheme, weight_block_size=kind.block)
    return folder, by_hand


def set_quantisation(folder: Path, **fields: Any) -> None:
    """Let a folder's configuration say how its weights are quantised."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"quantization_config": fields}), encoding="utf-8")
