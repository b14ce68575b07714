"""What passes over ONNX Runtime's own attention share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iapt_export.graphs.ops.serving_ops import ATTENTION, MICROSOFT

PAST_INPUTS = (3, 4)
"""Places of the buffers of keys and of values among ``GroupQueryAttention``'s inputs."""


def attentions(graph: ir.Graph) -> list[ir.Node]:
    """A graph's ``GroupQueryAttention`` nodes, in their order."""
    return [node for node in graph if (node.domain, node.op_type) == (MICROSOFT, ATTENTION)]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The graph's constant of that name, made at first."""
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        graph.register_initializer(value)
    return graph.initializers[name]
