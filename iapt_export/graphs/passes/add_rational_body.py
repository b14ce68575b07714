"""Ship the rational activation's body with the graph that uses it."""

from __future__ import annotations

import onnx_ir as ir

from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION, RATIONAL
from iapt_export.graphs.ops.rational_op import rational_function

BODY = (DOMAIN, RATIONAL, "")


class AddRationalBodyPass(ir.passes.InPlacePass):
    """Append the model-local function ``ai.iapt::Rational`` where the graph has such nodes.

    Requires: all nodes share one degrees pair and form, which `iapt_export.graphs.installed.install` sees to. Ensures:
    exactly one body, so that a runtime without a native kernel can run every node; none in a graph without nodes.
    """

    def __init__(self, forms: set[tuple[int, int, str]], opset: int) -> None:
        super().__init__()
        self.forms = forms
        self.opset = opset
        self.note = ""

    def requires(self, model: ir.Model) -> None:
        """All nodes share one body."""
        if _has_nodes(model) and len(self.forms) != 1:
            raise ir.passes.PreconditionError(f"{len(self.forms)} forms of {DOMAIN}::{RATIONAL}, expected one")

    def ensures(self, model: ir.Model) -> None:
        """There is a body where there are nodes, and else none."""
        if _has_nodes(model) != (BODY in model.functions):
            raise ir.passes.PostconditionError(f"{RATIONAL} has nodes and no body, or a body and no nodes")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not _has_nodes(model):
            self.note = "no rational activation"
            return ir.passes.PassResult(model, False)
        (form,) = self.forms
        body = rational_function(*form, self.opset)
        model.functions[BODY] = ir.from_proto(body)
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        self.note = f"degrees ({form[0] - 1}, {form[1]}) form {form[2]}"
        return ir.passes.PassResult(model, True)


def _has_nodes(model: ir.Model) -> bool:
    return any(node.domain == DOMAIN and node.op_type == RATIONAL for node in model.graph.all_nodes())
