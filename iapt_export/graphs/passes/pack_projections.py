"""Compute an attention's queries, keys and values in one product."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from iapt_export.graphs.passes.attentions import attentions

JOIN = " + "
"""Between the names of the weights that a packed one is made of."""


class PackProjectionsPass(ir.passes.InPlacePass):
    """Give ``GroupQueryAttention`` one packed ``[B, T, (heads + 2 H) K]`` in place of query, key and value.

    Requires: `RotaryInAttentionPass`; unused nodes are removed afterwards. Ensures: where the three are products of one
    input with constant matrices, each used once, with a bias at all or at none of them, one product with the matrices
    side by side stands in their place; its weight is named after theirs. What a tenant adds to a projection keeps the
    three apart.
    """

    note = ""

    def ensures(self, model: ir.Model) -> None:
        """An attention takes three inputs, or one packed."""
        for node in attentions(model.graph):
            if sum(value is None for value in node.inputs[:3]) not in (0, 2):
                raise ir.passes.PostconditionError(f"{node.name} takes neither query, key and value nor one packed")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = attentions(graph)
        count = sum(_pack(graph, node) for node in nodes)
        self.note = f"{count} of {len(nodes)} attentions take one product"
        return ir.passes.PassResult(model, count > 0)


def _pack(graph: ir.Graph, attention: ir.Node) -> bool:
    projections = [_projection(value) for value in attention.inputs[:3]]
    parts = [part for part in projections if part]
    biases = [bias for _, bias in parts if bias is not None]
    if len(parts) < 3 or len({part.inputs[0] for part, _ in parts}) > 1 or len(biases) not in (0, 3):
        return False
    packed = ir.node("MatMul", [parts[0][0].inputs[0], _joined(graph, [part.inputs[1] for part, _ in parts])])
    nodes = [packed]
    if biases:
        nodes.append(ir.node("Add", [packed.outputs[0], _joined(graph, biases)]))
    for node in nodes:
        node.outputs[0].name = f"{attention.outputs[0].name}_{node.op_type.lower()}"
        node.outputs[0].type = attention.outputs[0].type
        node.metadata_props.update(attention.metadata_props)  # which module it is of
    graph.insert_before(attention, nodes)
    for place, value in enumerate([nodes[-1].outputs[0], None, None]):
        attention.replace_input_with(place, value)
    return True


def _projection(value: ir.Value | None) -> tuple[ir.Node, ir.Value | None] | None:
    """The product that makes a value, and the bias that is added to it; None where it is made in another way."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    bias = None
    if node is not None and not node.domain and node.op_type == "Add":
        constants = [each for each in node.inputs if _is_constant(each, 1)]
        others = [each for each in node.inputs if not _is_constant(each, 1)]
        if len(constants) != 1 or others[0] is None or len(others[0].uses()) != 1:
            return None
        bias, node = constants[0], others[0].producer()
    if node is None or node.domain or node.op_type != "MatMul" or not _is_constant(node.inputs[1], 2):
        return None
    return node, bias


def _is_constant(value: ir.Value | None, rank: int) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == rank


def _joined(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value:
    """Constants side by side along their last axis, joined when they are written; equal biases of layers are shared."""
    name = JOIN.join(str(value.name).removeprefix("backbone.") for value in values if value is not None)
    if name in graph.initializers:
        return graph.initializers[name]
    parts = [value.const_value for value in values if value is not None and value.const_value is not None]
    shapes = [part.shape.numpy() for part in parts]
    shape = ir.Shape([*shapes[0][:-1], sum(each[-1] for each in shapes)])

    def compute() -> ir.Tensor:
        return ir.Tensor(np.concatenate([part.numpy() for part in parts], axis=-1), dtype=parts[0].dtype, name=name)

    tensor = ir.LazyTensor(compute, parts[0].dtype, shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
