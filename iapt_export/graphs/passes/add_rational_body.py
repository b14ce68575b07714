"""Ship the rational activation's body with the graph that uses it."""

from __future__ import annotations

import onnx_ir as ir

from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION, RATIONAL
from iapt_export.graphs.ops.rational_op import rational_function


class AddRationalBodyPass(ir.passes.InPlacePass):
    """Append the model-local function ``ai.iapt::Rational`` where the graph has such nodes.

    Requires: all nodes share one degrees pair and form, which `iapt_export.graphs.installed.install` sees to. Ensures:
    exactly one body, so that a runtime without a native kernel can run every node; none in a graph without nodes.
    """

    def __init__(self, forms: set[tuple[int, int, str]], opset: int) -> None:
        super().__init__()
        self.forms = forms
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not any(node.domain == DOMAIN and node.op_type == RATIONAL for node in model.graph.all_nodes()):
            return ir.passes.PassResult(model, False)
        (form,) = self.forms
        body = rational_function(*form, self.opset)
        model.functions[(DOMAIN, RATIONAL, "")] = ir.from_proto(body)
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.passes.PassResult(model, True)
