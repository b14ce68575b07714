"""FP4 in a copy of a graph, for ONNX Runtime, which has no kernel for it on the CPU (1.31)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NUMBERS = "fp4_numbers"
"""Name of the constant that holds FP4's 16 numbers, twice as large, so that they are whole."""


def with_kernels_for_fp4(model: onnx.ModelProto) -> None:
    """Let constants in FP4 be looked up in a table of its 16 numbers, in place.

    They are read as the integers that their four bits are, from where they lie. ``DequantizeLinear`` gets twice the
    numbers and half the scale, which changes no bit of what it gives.
    """
    graph = model.graph
    codes = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT4E2M1}
    if not codes:
        return
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array((2 * every).astype(np.int8), NUMBERS))
    graph.initializer.append(numpy_helper.from_array(np.float32(0.5), f"{NUMBERS}.half"))
    nodes = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            name, scale = node.input[0], node.input[1]
            codes[name].data_type = TensorProto.UINT4
            nodes.append(helper.make_node("Cast", [name], [f"{name}.codes"], to=TensorProto.INT32))
            nodes.append(helper.make_node("Gather", [NUMBERS, f"{name}.codes"], [f"{name}.doubled"]))
            nodes.append(helper.make_node("Mul", [scale, f"{NUMBERS}.half"], [f"{scale}.halved"]))
            node.input[0], node.input[1] = f"{name}.doubled", f"{scale}.halved"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
