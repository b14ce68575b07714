"""Write into the cache by the standard's operator."""

from __future__ import annotations

import onnx_ir as ir

from iapt_export.graphs.ops.serving_ops import MARKER_DOMAIN, SCATTER

SCATTER_OPSET = 24


class UseTensorScatterPass(ir.passes.InPlacePass):
    """Turn each traced write into ``TensorScatter``, and the graph's opset into the one that brought it.

    Requires: a graph of opset 23, none of whose other operators means something else in 24. Ensures: no node of the
    tracing domain is left; what is written is the buffers' axis 2.
    """

    note = ""

    def requires(self, model: ir.Model) -> None:
        """The graph was traced in the opset before."""
        if (opset := model.opset_imports.get("")) != SCATTER_OPSET - 1:
            raise ir.passes.PreconditionError(f"the graph has opset {opset}, expected {SCATTER_OPSET - 1}")

    def ensures(self, model: ir.Model) -> None:
        """No node of the tracing domain is left."""
        if any(node.domain == MARKER_DOMAIN for node in model.graph.all_nodes()):
            raise ir.passes.PostconditionError(f"nodes of {MARKER_DOMAIN} are left")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        writes = [node for node in model.graph if (node.domain, node.op_type) == (MARKER_DOMAIN, SCATTER)]
        for node in writes:
            node.domain = ""
            node.attributes["axis"] = ir.AttrInt64("axis", 2)
        self.note = f"{len(writes)} writes into the cache"
        model.opset_imports.pop(MARKER_DOMAIN, None)
        model.opset_imports[""] = SCATTER_OPSET
        return ir.passes.PassResult(model, True)
