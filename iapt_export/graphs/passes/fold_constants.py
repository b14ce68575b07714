"""Compute at export what does not depend on the inputs."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir

MAX_ELEMENTS = 8 * 1024
"""Constants with more elements are weights: folding them would copy the model."""


class FoldConstantsPass(ir.passes.InPlacePass):
    """Fold small constant expressions and infer shapes on the way (onnxscript's folder).

    Args:
        spared: weights whose names begin with this stay as they are, and so does what is computed from them.
        infer_shapes: without it, the graph has been through this pass before; its new nodes have no shapes yet.

    Requires: nothing. Ensures: shapes that the inputs determine are known, which later fusions need;
    no tensor above `MAX_ELEMENTS` was read or made.
    """

    def __init__(self, *, spared: str | None = None, infer_shapes: bool = True) -> None:
        super().__init__()
        self.spared = spared
        self.infer_shapes = infer_shapes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = fold_constants_ir(
            model,
            onnx_shape_inference=self.infer_shapes,
            input_size_limit=MAX_ELEMENTS,
            output_size_limit=MAX_ELEMENTS,
            should_fold=self._should_fold,
        )
        return ir.passes.PassResult(model, result.modified)

    def _should_fold(self, node: ir.Node) -> bool | None:
        """False where a spared weight is read; None leaves it to the folder's own rules."""
        if self.spared is None:
            return None
        names = [str(value.name) for value in node.inputs if value is not None and value.is_initializer()]
        return False if any(name.startswith(self.spared) for name in names) else None
