"""Name nodes after the PyTorch modules that they come from."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules around a node, outermost first, and the node's own name last."""


class NameNodesPass(ir.passes.InPlacePass):
    """Call each node ``MODULE/OPERATOR``, with ``_2``, ``_3`` where a module has several of an operator.

    ``model.layers.3.self_attn.q_proj/MatMul`` is what a profile, an error of a runtime, and the comparison with
    PyTorch can point to; a node outside all modules is called ``/OPERATOR``.

    Requires: the exporter's metadata is still there, so it runs right before that is cleared. Ensures: names are
    unique, and depend on nothing but modules, operators and their order.
    """

    def requires(self, model: ir.Model) -> None:
        """The exporter's notes on modules are there."""
        if len(model.graph) and not any(SCOPES in node.metadata_props for node in model.graph.all_nodes()):
            raise ir.passes.PreconditionError(f"no node has {SCOPES}, so no module is known; run before it is cleared")

    def ensures(self, model: ir.Model) -> None:
        """Names are unique."""
        names = Counter(node.name for node in model.graph.all_nodes())
        if twice := [str(name) for name, count in names.items() if count > 1]:
            raise ir.passes.PostconditionError(f"several nodes are called {', '.join(twice)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        seen: Counter[str] = Counter()
        for node in model.graph.all_nodes():
            name = f"{_module(node)}/{node.op_type}"
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        return ir.passes.PassResult(model, True)


def _module(node: ir.Node) -> str:
    """Path of the innermost backbone module around a node, empty where there is none."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope.startswith("backbone.")]
    return modules[-1].removeprefix("backbone.") if modules else ""
