"""Compute at export what does not depend on the inputs."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir

MAX_ELEMENTS = 8 * 1024
"""Constants with more elements are weights: folding them would copy the model."""


class FoldConstantsPass(ir.passes.InPlacePass):
    """Fold small constant expressions and infer shapes on the way (onnxscript's folder).

    Requires: nothing. Ensures: shapes that the inputs determine are known, which later fusions need;
    no tensor above `MAX_ELEMENTS` was read or made.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=MAX_ELEMENTS, output_size_limit=MAX_ELEMENTS
        )
        return ir.passes.PassResult(model, result.modified)
