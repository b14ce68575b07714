"""One trace instead of two, and nothing computed twice: the same graph; the long way where that cannot be."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxscript import opset18
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from iapt_export.graphs import trace
from iapt_export.graphs.export import run_passes
from iapt_export.graphs.installed import rational_forms
from iapt_export.graphs.one_trace import REWRITES, nothing_computed_twice, rewrite_for_one_trace
from iapt_export.graphs.passes import ship_pipeline
from iapt_export.graphs.table import TABLE, Serving
from tests.graphs import installed, run_onnx, specs_for
from tests.thorough import default_for
from tests.tiny import tiny_llama


class Rewritten(nn.Module):
    """Every operator that is rewritten, on ``x [B, 4, 6]``."""

    def forward(self, x: Tensor) -> Tensor:
        wide = (x + torch.tensor([1.0]).detach()).to(torch.float32).to(x.device)
        mask = ((wide > 0) & (wide < 2)) | (wide == wide.flatten(1).max())
        return (wide.flatten(1).unflatten(1, (2, 12)).flatten(1) + mask.to(dtype=torch.float32).flatten(1)).to(x)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0]
        return first.add_(1).clone() + x[:, 0]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def traced(module: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(module, (x,), dynamic_shapes=({0: Dim("batch")},), strict=False)


def in_onnx(program: ExportedProgram) -> bytes:
    made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    assert made is not None
    for node in made.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # which the context leaves out
    return made.model_proto.SerializeToString()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_rewritten_computes_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 6).to(dtype)
    program = traced(Rewritten().eval(), x)
    # sizes are asserted on where a tensor depends on one, and detach_ stands for a constant
    unseen = {torch.ops.aten._assert_scalar.default, torch.ops.aten.detach.default}
    assert {node.target for node in program.graph.nodes} >= set(REWRITES) - unseen
    assert rewrite_for_one_trace(program)
    assert program.run_decompositions({}) is program
    assert not {node.target for node in program.graph.nodes} & set(REWRITES)
    with nothing_computed_twice():
        graph = in_onnx(program)
    for rows in (3, 5):
        x = torch.randn(rows, 4, 6).to(dtype)
        (made,) = run_onnx(graph, {"x": x.numpy()}).values()
        np.testing.assert_array_equal(made, Rewritten()(x).numpy())


@pytest.mark.parametrize("module", [InPlace(), Branching()], ids=["in place", "a graph inside"])
def test_side_effects_and_inner_graphs_go_the_long_way(module: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="iapt_export")
    x = torch.randn(3, 4)
    program = traced(module.eval(), x)
    text = str(program.graph)
    assert not rewrite_for_one_trace(program)
    assert str(program.graph) == text, "nothing was touched"
    assert "traced a second time: " in caplog.text
    with nothing_computed_twice():
        graph = in_onnx(program)
    (made,) = run_onnx(graph, {"x": x.numpy()}).values()
    np.testing.assert_array_equal(made, module(x.clone()).numpy())


class Mixed(nn.Module):
    """Arguments of two types, an integer that is divided, and a number that a half keeps its type with."""

    def forward(self, x: Tensor) -> Tensor:
        ones = (x > 0).to(torch.int64)
        return (ones + x.float()) * (ones / 3) + torch.pow(x, 2) * 1.5 + torch.where(x > 0, x, 1)


@pytest.mark.parametrize("dtype", default_for(lambda dtype: dtype == torch.float32, [torch.float32, torch.float16]))
def test_types_are_promoted_as_the_exporter_does(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype)
    plain = in_onnx(traced(Mixed().eval(), x))
    for _ in range(2):
        with nothing_computed_twice():
            assert in_onnx(traced(Mixed().eval(), x)) == plain
    (made,) = run_onnx(plain, {"x": x.numpy()}).values()
    np.testing.assert_allclose(made, Mixed()(x).numpy(), rtol=2e-3 if dtype is torch.float16 else 1e-6)


class WithoutGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return y + x.sin()


@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_program_is_cut_only_where_gradients_are_switched(has_gradients: bool) -> None:
    x = torch.randn(3, 4)
    with torch.set_grad_enabled(has_gradients):
        plain = traced(WithoutGradients(), x)
        with nothing_computed_twice():
            made = traced(WithoutGradients(), x)
    assert [node.target for node in made.graph.nodes] == [node.target for node in plain.graph.nodes]
    assert (torch.ops.higher_order.wrap_with_set_grad_enabled in {n.target for n in made.graph.nodes}) == has_gradients
    assert torch.equal(made.module()(x), WithoutGradients()(x))


def test_the_same_operators_are_composite_however_often_they_are_looked_for() -> None:
    from torch._export.utils import _collect_all_valid_cia_ops

    wanted = set(_collect_all_valid_cia_ops())
    with nothing_computed_twice():
        assert set(_collect_all_valid_cia_ops()) == wanted and len(wanted) > 100


def test_a_custom_translation_is_forgotten_after_its_export() -> None:
    def halved(x: Any) -> Any:
        return opset18.Mul(x, opset18.Constant(value_float=0.5))

    def operators_with(table: dict[Any, Any] | None) -> list[str]:
        program = traced(nn.Sigmoid(), torch.randn(3, 4))
        made = torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=table)
        assert made is not None
        return [node.op_type for node in made.model.graph]

    with nothing_computed_twice():
        assert operators_with({torch.ops.aten.sigmoid.default: halved}) == ["Mul"]
        assert operators_with(None) == ["Sigmoid"]


def test_other_insides_of_the_exporter_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="iapt_export")
    monkeypatch.delattr("torch.onnx._internal.fx.passes.type_promotion._TypePromotionInterpreter")
    with nothing_computed_twice():
        pass
    assert "the exporter computes twice what it knows: " in caplog.text


def operators(model: ir.Model) -> list[tuple[str, int]]:
    return [(node.op_type, len(node.inputs)) for node in model.graph]


@pytest.mark.thorough
def test_a_decoders_graph_is_that_of_two_traces(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(num_hidden_layers=1)
    methods = installed()
    spec = specs_for(model, methods)["decode"]

    def shipped() -> list[tuple[str, int]]:
        passes = ship_pipeline(spec, rational_forms(methods), 23, TABLE["decode"].passes(Serving()))
        return operators(run_passes("decode", passes, trace.trace_graph("decode", model, methods, spec, 23))[0])

    caplog.set_level("INFO", logger="iapt_export")
    once = shipped()
    assert "traced a second time" not in caplog.text
    monkeypatch.setattr(trace, "rewrite_for_one_trace", lambda program: False)
    monkeypatch.setattr(trace, "nothing_computed_twice", contextlib.nullcontext)
    assert once == shipped()


@pytest.mark.thorough
def test_what_has_no_translation_is_traced_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if a decoder used an operator that has to be broken up and that nothing is known about."""
    caplog.set_level("INFO", logger="iapt_export")
    for target in (torch.ops.aten.__and__.Tensor, torch.ops.aten.to.dtype):
        monkeypatch.delitem(REWRITES, target)
    model = tiny_llama(num_hidden_layers=1)
    methods = installed()
    made = trace.trace_graph("decode", model, methods, specs_for(model, methods)["decode"], 23)
    assert "traced a second time: No ONNX function found for <OpOverload(op='aten.to'" in caplog.text
    assert any(node.op_type == "And" for node in made.graph)
