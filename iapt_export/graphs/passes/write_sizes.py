"""Write down the sizes that a reader would have to infer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

INFER = -1
"""What a ``Reshape`` is given for the one size that follows from the others."""


class WriteSizesPass(ir.passes.InPlacePass):
    """Leave nothing to inference that some runtimes do not infer: numbers of heads, and what a shape is filled with.

    Before: ``Reshape(x, Concat(batch, tokens, [-1], [64]))``. After: ``Reshape(x, Concat(batch, tokens, [9], [64]))``,
    where shape inference knows the size. OpenVINO takes the number of heads of ``Attention`` from there. A
    ``ConstantOfShape`` without a value, which is zero, gets it.

    Requires: inferred shapes. Ensures: no ``Reshape`` by parts infers a size that is known, no ``ConstantOfShape`` is
    without a value. Constants are nodes; the pass that lifts them comes behind.
    """

    note = ""

    def ensures(self, model: ir.Model) -> None:
        """Everything known is written down."""
        left = [str(node.name) for node in model.graph.all_nodes() if _inferred_axis(node) is not None]
        left += [str(node.name) for node in model.graph.all_nodes() if _lacks_value(node)]
        if left:
            raise ir.passes.PostconditionError(f"sizes or values are left to inference in {', '.join(left)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        written = [node for node in model.graph.all_nodes() if _write_size(node)]
        empty = [node for node in model.graph.all_nodes() if _lacks_value(node)]
        for node in empty:
            zero = ir.tensor(np.zeros(1, np.float32))  # what the standard says of a node without a value
            node.attributes["value"] = ir.AttrTensor("value", zero)
        self.note = f"{len(written)} sizes of reshapes and {len(empty)} values of constants are written down"
        return ir.passes.PassResult(model, bool(written or empty))


def _write_size(node: ir.Node) -> bool:
    axis = _inferred_axis(node)
    if axis is None:
        return False
    shape, sizes = node.outputs[0].shape, node.inputs[1]
    assert shape is not None and sizes is not None
    joined = sizes.producer()
    assert joined is not None and node.graph is not None
    number = ir.node("Constant", [], {"value": ir.tensor(np.array([shape[axis]], np.int64))})
    parts = [number.outputs[0] if place == axis else part for place, part in enumerate(joined.inputs)]
    written = ir.node("Concat", parts, dict(joined.attributes))
    for made in (number, written):
        made.metadata_props.update(joined.metadata_props)
    for value, count in ((number.outputs[0], 1), (written.outputs[0], len(parts))):
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([count])
    node.graph.insert_before(node, [number, written])
    node.replace_input_with(1, written.outputs[0])
    return True


def _inferred_axis(node: ir.Node) -> int | None:
    """The axis whose size a ``Reshape`` by parts is not given although it is known."""
    if node.op_type != "Reshape" or node.domain or node.inputs[1] is None:
        return None
    joined, shape = node.inputs[1].producer(), node.outputs[0].shape
    if joined is None or joined.op_type != "Concat" or joined.domain or shape is None:
        return None
    if len(joined.inputs) != len(shape):
        return None  # not a number for each axis
    for axis, part in enumerate(joined.inputs):
        value = ir.convenience.get_const_tensor(part) if part is not None else None
        if value is not None and value.size == 1 and value.numpy().item() == INFER and isinstance(shape[axis], int):
            return axis
    return None


def _lacks_value(node: ir.Node) -> bool:
    return node.op_type == "ConstantOfShape" and not node.domain and "value" not in node.attributes
