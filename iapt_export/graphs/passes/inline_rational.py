"""Write the rational activation as its definition in standard operators."""

from __future__ import annotations

import ast

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from iapt_export.graphs.ops import DOMAIN, RATIONAL
from iapt_export.graphs.passes.add_rational_body import AddRationalBodyPass
from iapt_export.graphs.passes.name_nodes import SCOPES

RATIONAL_MODULE = ".rational"
"""Ends the path that the definition's nodes have for a module: ``model.layers.3.rational/Mul``."""


class InlineRationalPass(ir.passes.InPlacePass):
    """Put the definition of ``ai.iapt::Rational`` in the place of each node, for runtimes that read no functions.

    Requires: all nodes share one degrees pair and form; the exporter's notes on modules are still there. Ensures: no
    node of the domain is left. Each definition's nodes stand in a module of their own, so that what goes in and comes
    out of it can still be found. The passes that follow fold what of it is constant.
    """

    def __init__(self, forms: set[tuple[int, int, str]], opset: int) -> None:
        super().__init__()
        self.body = AddRationalBodyPass(forms, opset)
        self.note = ""

    def requires(self, model: ir.Model) -> None:
        self.body.requires(model)

    def ensures(self, model: ir.Model) -> None:
        """Only standard operators are left of it."""
        if left := _nodes(model):
            raise ir.passes.PostconditionError(f"{len(left)} nodes of {DOMAIN}::{RATIONAL} are left")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = _nodes(model)
        self.note = f"{len(nodes)} rational activations are written as standard operators"
        if not nodes:
            return ir.passes.PassResult(model, False)
        for node in nodes:
            node.metadata_props[SCOPES] = _own_scope(node.metadata_props.get(SCOPES, "[]"))
        self.body(model)
        InlinePass()(model)  # gives each new node the notes of the one that it replaces
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, True)


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == (DOMAIN, RATIONAL)]


def _own_scope(noted: str) -> str:
    """The exporter's list of the modules around a node, outermost first, with one more around the node itself."""
    *modules, own = ast.literal_eval(noted) or [""]
    around = [scope for scope in modules if scope.startswith("backbone.")]
    return repr([*modules, *([f"{around[-1]}{RATIONAL_MODULE}"] if around else []), own])
