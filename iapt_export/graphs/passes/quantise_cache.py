"""Keep the KV cache in 8 bits, for ONNX Runtime's own attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from iapt_export.contract.graphs import PAST
from iapt_export.graphs.ops.serving_ops import ATTENTION, MICROSOFT

PASTS = {"k": (3, 12), "v": (4, 13)}
"""Of keys and of values: the places of the buffer and of its scales among ``GroupQueryAttention``'s inputs."""
SCALE = ".scale"
"""Suffix of the scales' names; before it the buffer's."""


class QuantiseCachePass(ir.passes.InPlacePass):
    """Let each ``GroupQueryAttention`` read and write buffers of int8, with a scale for each head.

    The operator rounds new keys, rotated already, and values, and attends to what is rounded, also to those of the same
    step. It has scales for each channel (``PER_CHANNEL``), of which those of a head are equal here.

    Requires: each attention's buffers are inputs of the graph, keys and values of one layer after the other, as in its
    interface, and all have scales. Ensures: those inputs, and what comes of them, are int8.
    """

    def __init__(self, scales: Mapping[str, np.ndarray]) -> None:
        """Take buffers' names to fp32 ``[H K]``."""
        super().__init__()
        self.scales = scales
        self.note = ""

    def requires(self, model: ir.Model) -> None:
        """There are scales for every buffer."""
        if missing := [name for name in _names(model.graph).values() if name not in self.scales]:
            raise ir.passes.PreconditionError(f"{', '.join(missing)} have no scales")

    def ensures(self, model: ir.Model) -> None:
        """Buffers are int8, before a step and after it."""
        for node in _attentions(model.graph):
            for value in (*_buffers(node), *node.outputs[1:3]):
                if value.dtype != ir.DataType.INT8:
                    raise ir.passes.PostconditionError(f"{value.name} is {value.dtype}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        attentions, names = list(_attentions(model.graph)), _names(model.graph)
        for node in attentions:
            node.resize_inputs(max(len(node.inputs), 1 + max(place for _, place in PASTS.values())))
            for output, (letter, (place, scale_place)) in enumerate(PASTS.items(), 1):
                buffer = node.inputs[place]
                assert buffer is not None
                node.replace_input_with(scale_place, self._constant(model.graph, names[buffer]))
                node.attributes[f"{letter}_quant_type"] = ir.AttrString(f"{letter}_quant_type", "PER_CHANNEL")
                buffer.dtype = node.outputs[output].dtype = ir.DataType.INT8
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        self.note = f"the cache of {len(attentions)} attentions in 8 bits" if attentions else ""
        return ir.passes.PassResult(model, bool(attentions))

    def _constant(self, graph: ir.Graph, buffer: str) -> ir.Value:
        name = buffer + SCALE
        if name not in graph.initializers:
            tensor = ir.Tensor(np.ascontiguousarray(self.scales[buffer], dtype=np.float32), name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(value)
        return graph.initializers[name]


def _attentions(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if (node.domain, node.op_type) == (MICROSOFT, ATTENTION))


def _names(graph: ir.Graph) -> dict[ir.Value, str]:
    """What the buffers will be called; the exporter numbers some of a list's tensors."""
    buffers = {value for node in _attentions(graph) for value in _buffers(node)}
    parts = (f"{PAST}{layer}.{part}" for layer in itertools.count() for part in ("key", "value"))
    return dict(zip((value for value in graph.inputs if value in buffers), parts, strict=False))


def _buffers(node: ir.Node) -> list[ir.Value]:
    return [value for place, _ in PASTS.values() if (value := node.inputs[place]) is not None]
