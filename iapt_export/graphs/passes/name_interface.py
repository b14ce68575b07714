"""Give a graph the names of its interface."""

from __future__ import annotations

import re

import onnx_ir as ir

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec


class NameInterfacePass(ir.passes.InPlacePass):
    """Name inputs, outputs and dynamic dimensions as the interface does.

    Requires: inputs and outputs stand in the interface's order. Ensures: their names, ranks and dynamic
    dimensions are the interface's, also inside the graph; weights lose the ``backbone.`` of the twin; values carry
    no metadata of the exporter.
    """

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__()
        self.spec = spec

    def ensures(self, model: ir.Model) -> None:
        """Inputs and outputs bear the interface's names."""
        for values, tensors in ((model.graph.inputs, self.spec.inputs), (model.graph.outputs, self.spec.outputs)):
            names = [tensor.name for tensor in tensors]
            if [value.name for value in values] != names:
                raise ir.passes.PostconditionError(f"{self.spec.path}: names are not {', '.join(names)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for kind, values, tensors in (
            ("inputs", graph.inputs, self.spec.inputs),
            ("outputs", graph.outputs, self.spec.outputs),
        ):
            if len(values) != len(tensors):
                raise IaptError(f"{self.spec.path}: {len(values)} {kind} were traced, expected {len(tensors)}")
        names = self._dimension_names(graph)
        for value in [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(size, names) for size in value.shape])
        for value in [
            *graph.inputs,
            *graph.initializers.values(),
            *(out for node in graph.all_nodes() for out in node.outputs),
        ]:
            value.metadata_props.clear()
        for values, tensors in ((graph.inputs, self.spec.inputs), (graph.outputs, self.spec.outputs)):
            for value, tensor in zip(values, tensors, strict=True):
                value.name = tensor.name
                value.shape = ir.Shape(tensor.shape)
        for name in list(graph.initializers):
            if name.startswith("backbone."):
                graph.initializers[name].name = name.removeprefix("backbone.")
        return ir.passes.PassResult(model, True)

    def _dimension_names(self, graph: ir.Graph) -> dict[str, str]:
        """The exporter's symbols (``s43``) to the interface's names, read off the inputs."""
        names: dict[str, str] = {}
        for value, tensor in zip(graph.inputs, self.spec.inputs, strict=True):
            for size, name in zip(value.shape or (), tensor.shape, strict=True):
                if isinstance(size, ir.SymbolicDim) and isinstance(name, str) and size.value:
                    names.setdefault(str(size.value), name)
        return names


def _renamed(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    if size.value is None:
        return None
    return re.sub(r"\w+", lambda match: names.get(match[0], match[0]), str(size.value))
