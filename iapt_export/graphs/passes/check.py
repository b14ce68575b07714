"""The last pass: refuse to ship a graph that breaks its contract."""

from __future__ import annotations

import onnx_ir as ir

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec
from iapt_export.contract.types import TENSOR_TYPES
from iapt_export.graphs.ops import DOMAIN
from iapt_export.graphs.ops.serving_ops import ATTENTION, LOOKUP, MICROSOFT, PRODUCT


class CheckPass(ir.passes.InPlacePass):
    """Change nothing; fail on anything that a runtime or a reader would stumble over.

    Ensures: only standard operators of the planned opset, ``ai.iapt`` and ONNX Runtime's own; inputs and
    outputs of the interface's names and types; no documentation strings or metadata (they carry source paths).

    Raises:
        IaptError: with every problem of the graph listed.
    """

    def __init__(self, spec: GraphSpec, opset: int) -> None:
        super().__init__()
        self.spec = spec
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        problems = [
            f"node {node.name} has the operator {node.domain}::{node.op_type} of an unknown domain"
            for node in graph.all_nodes()
            if node.domain not in ("", DOMAIN)
            and (node.domain != MICROSOFT or node.op_type not in (ATTENTION, PRODUCT, LOOKUP))
        ]
        if model.opset_imports.get("") != self.opset:
            problems.append(f"opset is {model.opset_imports.get('')}, planned was {self.opset}")
        for values, tensors in ((graph.inputs, self.spec.inputs), (graph.outputs, self.spec.outputs)):
            problems += [
                f"{tensor.name} became {value.name} of type {value.dtype}, expected {tensor.dtype}"
                for value, tensor in zip(values, tensors, strict=True)
                if value.name != tensor.name or value.dtype != _ir_type(tensor.dtype)
            ]
        problems += [
            f"node {node.name} still carries metadata"
            for node in graph.all_nodes()
            if node.metadata_props or node.doc_string
        ]
        problems += [
            f"value {value.name} still carries metadata"
            for value in [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
            if value.metadata_props or value.doc_string
        ]
        if problems:
            raise IaptError(f"{self.spec.path} cannot be shipped: " + "; ".join(problems[:20]))
        return ir.passes.PassResult(model, False)


def _ir_type(dtype: str) -> ir.DataType:
    """The manifest's type as onnx_ir's; ONNX calls float32 FLOAT."""
    return ir.DataType["FLOAT" if dtype == "fp32" else TENSOR_TYPES[dtype].upper()]
