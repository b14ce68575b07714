"""Every setting of the method reaches the graph: the exported generators match the trained ones, whatever is chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from iapt_export.interface import ModelShape, graph_specs
from iapt_export.passes import ship_pipeline
from iapt_export.save import save_graphs
from iapt_export.trace import trace_graph
from tests.bundles import METHOD, random_generator
from tests.graphs import operators, run_onnx, stacked_feeds, worst
from tests.tiny import padded, tiny_llama
from trainers.config import IAPTConfig

LAYERS = 3
INDEX = [1, 0, 1]
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {"pooling": "mean"},
    "max": {"pooling": "max"},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": "silu"},
    "no sharing": {"sharing": "none"},
    "groups": {"sharing": "groups", "num_groups": 2},
    "no bias": {"bias": False},
    "scale": {"scale": True},
    "form A": {"rational_form": "A"},
    "degrees": {"numerator_degree": 6, "denominator_degree": 5, "prompt_length": 1},
    "all at once": {
        "pooling": "max",
        "activation": "tanh",
        "sharing": "groups",
        "num_groups": 3,
        "bias": False,
        "prompt_length": 3,
    },
}


def export_generator(config: IAPTConfig, folder: Path, dtype: str = "fp32", opset: int = 23) -> Path:
    model = tiny_llama(num_hidden_layers=LAYERS)
    spec = graph_specs(config, ModelShape.from_config(model.config), dtype)["generator"]
    graph = ship_pipeline(spec, config, opset)(trace_graph("generator", model, config, spec, opset)).model
    save_graphs({"generator": graph}, folder)
    return folder / "generator.onnx"


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, LAYERS, 9, 32), padded([9, 2, 6], "left")[1]


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, tmp_path: Path) -> None:
    config = dataclasses.replace(METHOD, **OPTIONS[option])
    path = export_generator(config, tmp_path)
    tenants = [random_generator(seed, config, 32, LAYERS) for seed in range(2)]
    hidden, mask = inputs()
    feeds = {"hidden_states": hidden.numpy(), "attention_mask": mask.numpy(), "tenant_index": np.array(INDEX)}
    made = run_onnx(path, {**feeds, **stacked_feeds(tenants)})["prompts"]
    assert made.shape == (3, LAYERS, config.prompt_length, 32)
    for row, tenant in enumerate(INDEX):
        for layer in range(LAYERS):
            wanted = tenants[tenant](layer, hidden[row : row + 1, layer], mask[row : row + 1])
            assert worst(made[row, layer], wanted[0]) < 2e-5
    rational = config.activation == "rational"
    assert operators(path).count("Rational") == LAYERS * rational
    functions = onnx.load(path).functions
    assert len(functions) == int(rational)
    if rational:
        (form,) = {
            attribute.s.decode()
            for node in onnx.load(path).graph.node
            for attribute in node.attribute
            if attribute.name == "form"
        }
        assert form == config.rational_form


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 2e-2), ("bf16", 1e-1)])
def test_half_precision(dtype: str, limit: float, tmp_path: Path) -> None:
    """Weights and hidden states in half precision, coefficients in fp32, as the interface says."""
    path = export_generator(METHOD, tmp_path, dtype)
    tenants = [random_generator(seed, METHOD, 32, LAYERS) for seed in range(2)]
    hidden, mask = inputs()
    kinds = {value.name: value.type.tensor_type.elem_type for value in onnx.load(path).graph.input}
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    assert kinds["generator.down_weight"] == kinds["hidden_states"] == half
    assert kinds["generator.numerator"] == kinds["generator.denominator"] == onnx.TensorProto.FLOAT
    kind = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    feeds: dict[str, Any] = {"hidden_states": hidden.numpy().astype(kind), "attention_mask": mask.numpy()}
    weights = {
        name: array if name.endswith("ator") else array.astype(kind) for name, array in stacked_feeds(tenants).items()
    }
    feeds |= {"tenant_index": np.array(INDEX), **weights}
    made = reference_or_runtime(path, feeds, dtype)
    for row, tenant in enumerate(INDEX):
        for layer in range(LAYERS):
            wanted = tenants[tenant](layer, hidden[row : row + 1, layer], mask[row : row + 1])
            assert worst(made[row, layer], wanted[0]) < limit


def reference_or_runtime(path: Path, feeds: dict[str, Any], dtype: str) -> np.ndarray:
    """ONNX Runtime's CPU has no bf16 matrix product, so onnx's own evaluator stands in."""
    if dtype != "bf16":
        return run_onnx(path, feeds)["prompts"].astype(np.float32)
    from onnx.reference import ReferenceEvaluator

    (prompts,) = ReferenceEvaluator(str(path)).run(None, feeds)
    return np.asarray(prompts).astype(np.float32)
