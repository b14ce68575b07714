"""Keep the KV cache in 8 bits, for ONNX Runtime's own attention."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from iapt_export.contract.graphs import PAST
from iapt_export.graphs.passes.attentions import PAST_INPUTS, attentions, constant

SCALE_INPUTS = (12, 13)
"""Places of the buffers' scales among ``GroupQueryAttention``'s inputs."""
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
        for node in attentions(model.graph):
            for value in (*_buffers(node), *node.outputs[1:3]):
                if value.dtype != ir.DataType.INT8:
                    raise ir.passes.PostconditionError(f"{value.name} is {value.dtype}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes, names = attentions(model.graph), _names(model.graph)
        for node in nodes:
            node.resize_inputs(1 + max(SCALE_INPUTS))
            for kind, place, buffer, after in zip("kv", SCALE_INPUTS, _buffers(node), node.outputs[1:3], strict=True):
                scales = np.ascontiguousarray(self.scales[names[buffer]], dtype=np.float32)
                node.replace_input_with(place, constant(model.graph, names[buffer] + SCALE, scales))
                node.attributes[f"{kind}_quant_type"] = ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL")
                buffer.dtype = after.dtype = ir.DataType.INT8
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        self.note = f"the cache of {len(nodes)} attentions in 8 bits" if nodes else ""
        return ir.passes.PassResult(model, bool(nodes))


def _names(graph: ir.Graph) -> dict[ir.Value, str]:
    """What the buffers will be called; the exporter numbers some of a list's tensors."""
    buffers = {value for node in attentions(graph) for value in _buffers(node)}
    parts = (f"{PAST}{layer}.{part}" for layer in itertools.count() for part in ("key", "value"))
    return dict(zip((value for value in graph.inputs if value in buffers), parts, strict=False))


def _buffers(node: ir.Node) -> list[ir.Value]:
    return [value for place in PAST_INPUTS if (value := node.inputs[place]) is not None]
