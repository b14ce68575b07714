"""Twins and example inputs in, one onnx_ir model per graph out (``torch.onnx.export(dynamo=True)``)."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import Dim

from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import KINDS, PORTABLE
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from iapt_export.contract.types import FLOATS, TENSOR_TYPES
from iapt_export.graphs.in_place import in_place_attention
from iapt_export.graphs.installed import Installed, rational_forms
from iapt_export.graphs.lay_out import LayOutError, lay_out, remove_marks
from iapt_export.graphs.layer_kinds import first_layers, layer_kinds, layers_to_trace, shortened
from iapt_export.graphs.one_trace import nothing_computed_twice, rewrite_for_one_trace
from iapt_export.graphs.ops import layer_end, rms_norm
from iapt_export.graphs.ops import rational_op as rational
from iapt_export.graphs.ops import serving_ops as serving
from iapt_export.graphs.ops.layer_end import layers_marked
from iapt_export.graphs.passes import first_passes
from iapt_export.graphs.table import TABLE
from iapt_export.graphs.weights import WEIGHTS, fill_in
from trainers.decoder.attention import (
    attending_with,
    grouped_attention,
    mask_by_position,
    real_rotations,
    traceable_experts,
)
from trainers.decoder.insertion import decoder_layers

LOGGER = logging.getLogger("iapt_export")

EXAMPLE_SIZES = {"batch": 2, "sequence": 7, "places": 8, "past": 9, "total": 10, "capacity": 11, "tenants": 3}
"""Sizes of the example inputs; all differ and none is 1, so that no dimension is taken for a constant."""


COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""How terminals are told to change colour."""


def trace_graph(name: str, backbone: Any, installed: list[Installed], spec: GraphSpec, opset: int) -> ir.Model:
    """Trace one graph of a bundle.

    Args:
        name: one of `iapt_export.contract.graphs.KINDS`.
        backbone: the transformers model, in the graph's dtype.
        installed: the bundle's methods.
        spec: the graph's interface; inputs become graph inputs in its order.
        opset: version of the standard operators.

    Returns:
        The model after the first of `iapt_export.graphs.passes`; the others make it fit to ship.

    Raises:
        IaptError: the backbone's code cannot be traced.
    """
    kinds = layer_kinds(backbone, installed)
    count = layers_to_trace(kinds)
    first = first_passes(rational_forms(installed), opset, spared=WEIGHTS, portable=name in PORTABLE)

    def traced(spec: GraphSpec) -> ir.Model:
        model = _traced(name, backbone, installed, spec, opset)
        for step in first.passes:  # not all in a call, which would wrap our errors in its own
            model = step(model).model
        return model

    if count < len(kinds):
        short = shortened(spec, count)
        with first_layers(backbone, count):
            model = traced(short)
        try:
            lay_out(model, short, spec, backbone, kinds)
            return model
        except LayOutError as reason:
            LOGGER.info("%s.onnx: all %d layers are traced: %s", name, len(kinds), reason)
    model = traced(spec)
    remove_marks(model)
    return model


def _traced(name: str, backbone: Any, installed: list[Installed], spec: GraphSpec, opset: int) -> ir.Model:
    """A graph of all layers that the backbone has now, with their ends marked."""
    twin = TABLE[name].twin(backbone, installed, spec)
    num_plain = twin.num_plain
    examples = [_example(tensor) for tensor in spec.inputs]
    axes = [_dynamic_axes(tensor) for tensor in spec.inputs]
    attention = in_place_attention if KINDS[name].in_place else exportable
    marked = layers_marked(decoder_layers(backbone))

    def traced() -> torch.export.ExportedProgram:
        # the cache of fake tensors costs more than it saves where sizes are symbols
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            program = torch.export.export(
                twin.eval(),
                (*examples[:num_plain], tuple(examples[num_plain:])),
                dynamic_shapes=(*axes[:num_plain], tuple(axes[num_plain:])),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        _say_grouped(program.graph)
        return program

    with (
        attention(backbone),
        traceable_experts(backbone),
        real_rotations(backbone),
        marked,
        _nothing_left_behind(backbone),
        nothing_computed_twice(),
        _quiet(),
        torch.no_grad(),
    ):
        try:
            model = _translated(traced, opset)
        except RuntimeError as error:  # the exporter's own errors are of this kind, defects of ours are not
            raise IaptError(
                f"{type(backbone).__name__} could not be traced into {name}.onnx: {deepest_cause(error)}; only "
                "decoders whose forward pass torch.export can follow are supported, see docs/models.md"
            ) from error
    fill_in(model, backbone)
    return model


def _translated(traced: Callable[[], torch.export.ExportedProgram], opset: int) -> ir.Model:
    """The program that ``traced`` gives, in ONNX; from a second trace where an operator has no translation."""

    def translate(program: torch.export.ExportedProgram) -> ir.Model:
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            optimize=False,  # the default rewriter takes a minute on 30 layers; ours is iapt_export.graphs.passes
            verbose=False,
            custom_translation_table=rational.translation_table()
            | serving.translation_table()
            | layer_end.translation_table()
            | rms_norm.translation_table(opset),
        )
        assert onnx_program is not None
        return onnx_program.model

    program = traced()
    if rewrite_for_one_trace(program):
        try:
            return translate(program)
        except RuntimeError as error:
            LOGGER.info("traced a second time: %s", deepest_cause(error))
            program = traced()
    return translate(program)


@contextlib.contextmanager
def _nothing_left_behind(backbone: Any) -> Iterator[None]:
    """Take back tensors that a forward pass keeps in attributes, as longrope does: of a trace they have no values."""
    before = [(module, dict(vars(module))) for module in backbone.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and attributes.get(name) is not value:
                    vars(module).pop(name)
                    vars(module).update({name: attributes[name]} if name in attributes else {})


def _say_grouped(graph: torch.fx.Graph) -> None:
    """Falcon gives attention one key head, which PyTorch broadcasts; translations want to be told of groups."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            query, key = (node.args[place].meta["val"].shape[1] for place in (0, 1))
            if key == 1 != query:
                node.kwargs = {**node.kwargs, "enable_gqa": True}


def exportable(backbone: Any) -> AbstractContextManager[None]:
    """Give a backbone an attention that exports to one node with grouped key/value heads, while the context is open."""
    return attending_with(backbone, "iapt_export", grouped_attention, mask_by_position)


def deepest_cause(error: BaseException) -> str:
    """What an error came from in the end, in one line without colours; the exporter wraps it in pages."""
    text = ""
    cause: BaseException | None = error
    while cause is not None:
        lines = [line.strip() for line in COLOUR.sub("", str(cause)).splitlines()]
        first = next(filter(None, lines), "")
        # a bare KeyError or AssertionError says little without its name
        text = (f"{type(cause).__name__}: {first}" if not isinstance(cause, RuntimeError) else first) if first else text
        cause = cause.__cause__
    return (text or type(error).__name__).rstrip(".;: ")


def _example(tensor: TensorSpec) -> Tensor:
    # a method's own number of tenants is called tenants_METHOD
    sizes = [EXAMPLE_SIZES[size.split("_")[0]] if isinstance(size, str) else size for size in tensor.shape]
    # ones are right for token ids, masks, positions, lengths, flags and tenant numbers alike
    value = 0.01 if tensor.dtype in FLOATS else 1
    return torch.full(sizes, value, dtype=getattr(torch, TENSOR_TYPES[tensor.dtype]))


def _dynamic_axes(tensor: TensorSpec) -> dict[int, Any]:
    # a mask over the cache and one token more; families that attend by themselves (Bloom) must be told
    return {
        axis: Dim("past") + 1 if size == "total" else Dim(size)
        for axis, size in enumerate(tensor.shape)
        if isinstance(size, str)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's remarks on torchvision and axis names, which say nothing about the user's model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
