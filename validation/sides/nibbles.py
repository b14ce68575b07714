"""Products with weights of 8 bits as two with 4 bits, for comparisons without rounding of activations.

ONNX Runtime 1.31.1 has kernels for 4 bits that round no activations, and none for 8: a product of 4,096 inputs and
11,008 outputs took 10 and 318 ms of one row on two cores (``accuracy_level`` 0;
``findings/onnxruntime-8-bit-products-without-rounding.sh``). A byte ``16 h + l`` stands for
``scale (16 h + l - 128)``, which is ``16 scale (h - 8) + scale l``: the same weight as the sum of two that 4 bits hold.

Shapes: N outputs, G blocks, as in `trainers.decoder.quantise`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from iapt_export.graphs.ops.serving_ops import MICROSOFT, PRODUCT
from trainers.decoder.rounded import on_disk

ROWS_AT_ONCE = 1024
"""Outputs of a matrix that are split at once."""


def split_products(model: onnx.ModelProto, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Replace the products of a graph whose weights have 8 bits.

    Args:
        model: changed in place; its other initializers may be external.
        read: gives the values of an initializer by its name.

    Returns:
        Name to array of the new initializers, which the graph has as external ones without a file: give them to the
        session's ``add_external_initializers``. Those with a value for each weight are mapped from unnamed files.
    """
    graph, made = model.graph, dict[str, np.ndarray]()
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        fields = {field.name: helper.get_attribute_value(field) for field in node.attribute}
        if node.op_type != PRODUCT or fields["bits"] != 8 or any(node.input[3:5]) or node.input[1] not in weights:
            nodes.append(node)
            continue
        values, scales = node.input[1:3]
        names = {part: f"{values}.{part}" for part in ("high", "low", "zeros", "high_scales")}
        if names["high"] not in made:
            made |= dict(zip(names.values(), _split(read(values), read(scales)), strict=True))
        bias = ["", "", node.input[5]] if len(node.input) > 5 and node.input[5] else []
        reads = {
            "high": [names["high"], names["high_scales"], *bias],
            "low": [names["low"], scales, names["zeros"]],
        }
        halves = {half: f"{node.output[0]}.{half}" for half in reads}
        for half, inputs in reads.items():
            product = helper.make_node(
                PRODUCT, [node.input[0], *inputs], [halves[half]], f"{node.name}.{half}", domain=MICROSOFT
            )
            product.attribute.extend(helper.make_attribute(key, value) for key, value in (fields | {"bits": 4}).items())
            nodes.append(product)
        nodes.append(helper.make_node("Add", list(halves.values()), [node.output[0]], f"{node.name}.sum"))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(_declared(name, array) for name, array in made.items())
    return made


def _split(values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Both halves of ``values [N, G, block]``, ``[N, G, block / 2]`` each; zero points of the lower one; scales of the
    upper one.
    """
    parts = [values[start : start + ROWS_AT_ONCE] for start in range(0, len(values), ROWS_AT_ONCE)]
    high = on_disk([_packed(part >> 4) for part in parts])
    low = on_disk([_packed(part & 15) for part in parts])
    return high, low, np.zeros((len(values), -(-values.shape[1] // 2)), np.uint8), scales * np.float32(16)


def _packed(steps: np.ndarray) -> np.ndarray:
    """Two values of 4 bits a byte, the lower half first."""
    return steps[..., 0::2] | steps[..., 1::2] << 4


def _declared(name: str, array: np.ndarray) -> TensorProto:
    """An initializer whose values the session is given."""
    tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.external_data.add(key="location", value=f"{name}.given")
    return tensor
