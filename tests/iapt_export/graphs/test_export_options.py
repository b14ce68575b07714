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

from iapt_export.graphs.export import export_graphs
from iapt_export.graphs.twins import GeneratorTwin
from tests.bundles import METHOD, SIZES, random_method
from tests.graphs import iapt_feeds, installed, operators, rest, run_onnx, specs_for, trained_prompt, worst
from tests.tiny import padded, tiny_llama
from trainers.decoder.method import Method
from trainers.methods.configs import IAPTConfig

INDEX = [1, 0, 1]
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {"pooling": "mean"},
    "max": {"pooling": "max"},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": "silu"},
    "relu": {"activation": "relu"},
    "no sharing": {"sharing": "none"},
    "groups": {"sharing": "groups", "num_groups": 2},
    "no bias": {"bias": False},
    "scale": {"scale": True},
    "raw input": {"normalize": False},
    "form A": {"rational_form": "A"},
    "degrees": {"numerator_degree": 6, "denominator_degree": 5, "prompt_length": 1},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "mean, no sharing": {"pooling": "mean", "sharing": "none"},
    "max, tanh, no bias": {"pooling": "max", "activation": "tanh", "bias": False, "prompt_length": 3},
    "gelu, scale": {"activation": "gelu", "scale": True},
    "form A, groups, raw input": {
        "rational_form": "A",
        "sharing": "groups",
        "num_groups": 2,
        "normalize": False,
    },
    "degrees": OPTIONS["degrees"],
}
"""Options that do not touch each other share an export."""


def export_generator(config: IAPTConfig, folder: Path, layers: int, dtype: str = "fp32", opset: int = 23) -> Path:
    model = tiny_llama(num_hidden_layers=layers)
    methods = installed(config, dataclasses.replace(SIZES, num_layers=layers))
    export_graphs(model, methods, folder, dtype=dtype, opset=opset, names=("generator",))
    return folder / "generator.onnx"


def inputs(layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, layers, 9, 32), padded([9, 2, 6], "left")[1]


def trained(config: IAPTConfig, layers: int) -> list[Method]:
    return [random_method(seed, config, dataclasses.replace(SIZES, num_layers=layers)) for seed in range(2)]


def worst_prompt(made: Any, tenants: list[Method], hidden: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest error of any row and layer against the row's own trained generator."""
    return max(
        worst(
            made[row, layer],
            trained_prompt(tenants[tenant], layer, hidden[row : row + 1, layer], mask[row : row + 1])[0],
        )
        for row, tenant in enumerate(INDEX)
        for layer in range(hidden.shape[1])
    )


@pytest.mark.parametrize("option", [*OPTIONS, *TOGETHER])
def test_options_of_the_twin(option: str) -> None:
    config = dataclasses.replace(METHOD, **(OPTIONS | TOGETHER)[option])
    tenants = trained(config, 3)
    hidden, mask = inputs(3)
    model, methods = tiny_llama(), installed(config, dataclasses.replace(SIZES, num_layers=3))
    spec = specs_for(model, methods)["generator"]
    twin = GeneratorTwin(model, methods, spec)
    (made,) = twin(hidden, mask, rest(spec, iapt_feeds(tenants, INDEX)))
    assert worst_prompt(made, tenants, hidden, mask) < 2e-5
    (other,) = twin(hidden, mask, rest(spec, iapt_feeds(tenants, [0, 1, 0])))
    assert worst_prompt(other, tenants, hidden, mask) > 1e-2


def check_exported(config: IAPTConfig, folder: Path, layers: int) -> None:
    path = export_generator(config, folder, layers)
    tenants = trained(config, layers)
    hidden, mask = inputs(layers)
    feeds = {"hidden_states": hidden.numpy(), "attention_mask": mask.numpy(), **iapt_feeds(tenants, INDEX)}
    made = run_onnx(path, feeds)["prompts"]
    assert made.shape == (3, layers, config.prompt_length, 32)
    assert worst_prompt(made, tenants, hidden, mask) < 2e-5
    rational = config.activation == "rational"
    assert operators(path).count("Rational") == layers * rational
    model = onnx.load(path)
    assert len(model.functions) == int(rational)
    forms = {item.s.decode() for node in model.graph.node for item in node.attribute if item.name == "form"}
    assert forms == ({config.rational_form} if rational else set())


@pytest.mark.parametrize("option", TOGETHER)
def test_options_of_the_graph(option: str, tmp_path: Path) -> None:
    config = dataclasses.replace(METHOD, **TOGETHER[option])
    check_exported(config, tmp_path, {"groups": 3, "none": 2}.get(config.sharing, 1))


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_of_the_graph_alone(option: str, tmp_path: Path) -> None:
    check_exported(dataclasses.replace(METHOD, **OPTIONS[option]), tmp_path, 3)


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 2e-2), ("bf16", 1e-1)])
def test_half_precision(dtype: str, limit: float, tmp_path: Path) -> None:
    """Weights and hidden states in half precision, coefficients in fp32, as the interface says."""
    path = export_generator(METHOD, tmp_path, 1, dtype)
    tenants = trained(METHOD, 1)
    hidden, mask = inputs(1)
    kinds = {value.name: value.type.tensor_type.elem_type for value in onnx.load(path).graph.input}
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    assert kinds["iapt.down_weight"] == kinds["hidden_states"] == half
    assert kinds["iapt.numerator"] == kinds["iapt.denominator"] == onnx.TensorProto.FLOAT
    kind = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    feeds: dict[str, Any] = {"hidden_states": hidden.numpy().astype(kind), "attention_mask": mask.numpy()}
    feeds |= {
        name: array if name.endswith(("ator", "index")) else array.astype(kind)
        for name, array in iapt_feeds(tenants, INDEX).items()
    }
    made = reference_or_runtime(path, feeds, dtype)
    assert worst_prompt(made, tenants, hidden, mask) < limit


def reference_or_runtime(path: Path, feeds: dict[str, Any], dtype: str) -> np.ndarray:
    """ONNX Runtime's CPU has no bf16 matrix product, so onnx's own evaluator stands in."""
    if dtype != "bf16":
        return run_onnx(path, feeds)["prompts"].astype(np.float32)
    from onnx.reference import ReferenceEvaluator

    (prompts,) = ReferenceEvaluator(str(path)).run(None, feeds)
    return np.asarray(prompts).astype(np.float32)
