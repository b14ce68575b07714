"""What each pass requires and ensures is checked when it runs: every promise is broken here once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from iapt_export.graphs.export import run_passes
from iapt_export.graphs.ops.serving_ops import ATTENTION, MARKER, MARKER_DOMAIN, MICROSOFT
from iapt_export.graphs.passes.add_rational_body import AddRationalBodyPass
from iapt_export.graphs.passes.check import CheckPass
from iapt_export.graphs.passes.fold_transposes import FoldTransposesPass
from iapt_export.graphs.passes.fuse_opset23 import FuseOpset23Pass
from iapt_export.graphs.passes.inline_rational import InlineRationalPass
from iapt_export.graphs.passes.name_interface import NameInterfacePass
from iapt_export.graphs.passes.name_nodes import NameNodesPass
from iapt_export.graphs.passes.pack_projections import PackProjectionsPass
from iapt_export.graphs.passes.quantise_weights import QuantiseWeightsPass
from iapt_export.graphs.passes.rotary_in_attention import RotaryInAttentionPass
from iapt_export.graphs.passes.sink_into_if import SinkIntoIfPass
from iapt_export.graphs.passes.use_tensor_scatter import UseTensorScatterPass
from iapt_export.graphs.passes.widen_bfloat16 import WidenBfloat16Pass
from iapt_export.graphs.passes.write_sizes import WriteSizesPass


def graph(*nodes: tuple[str, str, int], opset: int = 23, weight: np.ndarray | None = None) -> ir.Model:
    """A graph of nodes (domain, operator, inputs) that read ``x`` and, in the last place, the weight."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 32]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = []
    if weight is not None:
        tensor = ir.Tensor(weight, name="w")
        weights = [ir.Value(name="w", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)]
    made = []
    for number, (domain, operator, inputs) in enumerate(nodes):
        read = [*[x] * (inputs - len(weights)), *weights]
        made.append(ir.node(operator, read, domain=domain, name=f"node {number}"))
        made[-1].outputs[0].name = f"y{number}"
    body = ir.Graph([x], [made[-1].outputs[0]], nodes=made, initializers=weights, opset_imports={"": opset}, name="g")
    return ir.Model(body, ir_version=10)


def attention(nones: int, **attributes: int) -> ir.Model:
    model = graph((MICROSOFT, ATTENTION, 5))
    for place in range(nones):
        model.graph.node(0).replace_input_with(2 - place, None)
    model.graph.node(0).attributes.update({name: ir.AttrInt64(name, value) for name, value in attributes.items()})
    return model


def one_flag_of_two() -> ir.Model:
    model = graph((MARKER_DOMAIN, MARKER, 3), (MARKER_DOMAIN, MARKER, 3))
    model.graph.node(1).replace_input_with(2, model.graph.node(0).outputs[0])
    return model


def called_alike() -> ir.Model:
    model = graph(("", "Abs", 1), ("", "Abs", 1))
    model.graph.node(1).name = model.graph.node(0).name
    return model


def narrow() -> ir.Model:
    model = graph(("", "Mul", 2))
    model.graph.node(0).outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    return model


MATRIX = np.ones((32, 32), np.float32)
RATIONAL = ("ai.iapt", "Rational", 3)
SPEC = GraphSpec(
    "prefill.onnx", [TensorSpec("input_ids", "fp32", ["n", 32])], [TensorSpec("logits", "fp32", ["n", 32])]
)


@pytest.mark.parametrize(
    ("step", "model", "text"),
    [
        (AddRationalBodyPass(set(), 23), graph(RATIONAL), "0 forms of ai.iapt::Rational, expected one"),
        (InlineRationalPass(set(), 23), graph(RATIONAL), "0 forms of ai.iapt::Rational, expected one"),
        (NameNodesPass(), graph(("", "Abs", 1)), "no node has pkg.torch.onnx.name_scopes"),
        (
            QuantiseWeightsPass({"w": 8}, 32),
            graph(("", "MatMul", 2), weight=MATRIX.astype(np.float16)),
            "w and 0 more weights are",
        ),
        (RotaryInAttentionPass(8), attention(0), "the graph has no input position_ids"),
        (SinkIntoIfPass(), one_flag_of_two(), "markers do not share one flag"),
        (UseTensorScatterPass(), graph(("", "Abs", 1), opset=20), "the graph has opset 20, expected 23"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_pass_requires(step: ir.passes.PassBase, model: ir.Model, text: str) -> None:
    with pytest.raises(ir.passes.PreconditionError, match=text):
        step(model)


@pytest.mark.parametrize(
    ("step", "model", "text"),
    [
        (AddRationalBodyPass(set(), 23), graph(RATIONAL), "Rational has nodes and no body"),
        (FoldTransposesPass(), graph(("", "Transpose", 1), weight=MATRIX), "weights are still transposed by node 0"),
        (FuseOpset23Pass(20), graph(("", "RMSNormalization", 1), opset=20), "operators of opset 23 stand in a graph"),
        (InlineRationalPass(set(), 23), graph(RATIONAL), "1 nodes of ai.iapt::Rational are left"),
        (NameInterfacePass(SPEC), graph(("", "Abs", 1)), "prefill.onnx: names are not input_ids"),
        (NameNodesPass(), called_alike(), "several nodes are called node 0"),
        (PackProjectionsPass(), attention(1), "takes neither query, key and value nor one packed"),
        (QuantiseWeightsPass({"w": 8}, 32), graph(("", "MatMul", 2), weight=MATRIX), "w are still fp32"),
        (RotaryInAttentionPass(8), attention(0), "some attentions rotate queries and keys"),
        (SinkIntoIfPass(), graph((MARKER_DOMAIN, MARKER, 3)), "markers are left: node 0"),
        (WriteSizesPass(), graph(("", "ConstantOfShape", 1)), "sizes or values are left to inference in node 0"),
        (WidenBfloat16Pass(SPEC), narrow(), "computed in bfloat16: node 0"),
        (UseTensorScatterPass(), graph((MARKER_DOMAIN, MARKER, 3)), "nodes of ai.iapt.trace are left"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_pass_ensures(step: Any, model: ir.Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Callable[[ir.Model], ir.passes.PassResult] = lambda model: ir.passes.PassResult(model, False)  # noqa: E731
    monkeypatch.setattr(step, "call", nothing)
    monkeypatch.setattr(step, "requires", lambda model: None)
    with pytest.raises(ir.passes.PostconditionError, match=text):
        step(model)


def test_passes_say_what_they_did_in_the_log_and_in_words(caplog: pytest.LogCaptureFixture) -> None:
    steps = ir.passes.Sequential(FoldTransposesPass(), SinkIntoIfPass(), FuseOpset23Pass(20))
    with caplog.at_level(logging.INFO, logger="iapt_export"):
        model, notes = run_passes("prefill", steps, graph(("", "Transpose", 1), ("", "MatMul", 2), weight=None))
    assert len(model.graph) == 2
    assert notes == {
        "FoldTransposes": "0 weights are stored transposed",
        "SinkIntoIf": "0 places are computed only while instructions are read",
        "FuseOpset23": "opset 20 has no such operators",
    }
    assert caplog.messages[0] == "prefill.onnx: FoldTransposes: 0 weights are stored transposed"
    assert len(caplog.messages) == 3


def test_what_a_user_can_fix_reaches_the_user() -> None:
    with pytest.raises(IaptError, match=r"prefill\.onnx cannot be shipped"):
        run_passes("prefill", ir.passes.Sequential(CheckPass(SPEC, 23)), graph(("", "Abs", 1)))
