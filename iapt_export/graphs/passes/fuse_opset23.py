"""Use the normalisation and rotary-embedding operators that opset 23 brought."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import onnx_fusions


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

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if self.opset >= 23:
            self.fused = onnx_fusions.fuse(model)
        return ir.passes.PassResult(model, any(self.fused.values()))
