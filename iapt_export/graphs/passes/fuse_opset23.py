"""Use the normalisation and rotary-embedding operators that opset 23 brought."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import onnx_fusions

FUSED = ("RMSNormalization", "RotaryEmbedding")


class FuseOpset23Pass(ir.passes.InPlacePass):
    """Fuse to ``RMSNormalization`` and ``RotaryEmbedding`` (onnxscript's rules).

    Requires: multiplications by one are gone, or the rotary pattern does not match. Ensures: below
    opset 23 nothing changes, because the operators do not exist there. ``fused`` counts what matched,
    by operator; a zero says that the backbone writes the operation in another way.

    Gemma multiplies in fp32 what is otherwise fp16. The operator allows that, but onnx 1.23 takes the input's type for
    the output's and refuses the graph; so the input is cast to the scale's type first, as the backbone does.
    """

    def __init__(self, opset: int) -> None:
        super().__init__()
        self.opset = opset
        self.fused: dict[str, int] = {}
        self.note = ""

    def ensures(self, model: ir.Model) -> None:
        """Below opset 23 there is no operator of it."""
        if self.opset < 23 and any(node.op_type in FUSED and not node.domain for node in model.graph.all_nodes()):
            raise ir.passes.PostconditionError(f"operators of opset 23 stand in a graph of opset {self.opset}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if self.opset >= 23:
            self.fused = onnx_fusions.fuse(model)
            for node in list(model.graph):
                if node.op_type == "RMSNormalization" and not node.domain:
                    _give_one_type(model.graph, node)
        counts = ", ".join(f"{count} {name}" for name, count in self.fused.items())
        self.note = f"fused {counts}" if self.opset >= 23 else f"opset {self.opset} has no such operators"
        return ir.passes.PassResult(model, any(self.fused.values()))


def _give_one_type(graph: ir.Graph, node: ir.Node) -> None:
    """Cast a normalisation's input where its scale has another type."""
    value, scale = node.inputs
    assert value is not None and scale is not None and scale.dtype is not None
    if value.dtype != scale.dtype:
        cast = ir.node("Cast", [value], {"to": scale.dtype}, name=f"{node.name}/input")
        cast.metadata_props.update(node.metadata_props)  # which module it is of
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(scale.dtype)
        graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])
