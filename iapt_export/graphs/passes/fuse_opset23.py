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
        counts = ", ".join(f"{count} {name}" for name, count in self.fused.items())
        self.note = f"fused {counts}" if self.opset >= 23 else f"opset {self.opset} has no such operators"
        return ir.passes.PassResult(model, any(self.fused.values()))
