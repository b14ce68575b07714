"""Compute what only the reading of instructions needs in no other step."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from iapt_export.graphs.ops.serving_ops import MARKER, MARKER_DOMAIN


class SinkIntoIfPass(ir.passes.InPlacePass):
    """Turn each marker ``InstructionOnly(changed, unchanged, flag)`` into an ``If`` that holds what makes ``changed``.

    Requires: markers share one flag, a graph input. Ensures: no marker is left; a node that serves one marker alone
    stands in its ``If``; nodes that serve several stand in one ``If`` before all of them, unless they depend on a
    marker's result; these and all others stay where every step computes them.
    """

    note = ""

    def requires(self, model: ir.Model) -> None:
        """All markers ask one input of the graph."""
        flags = {node.inputs[2] for node in _markers(model.graph)}
        if len(flags) > 1 or not flags <= set(model.graph.inputs):
            raise ir.passes.PreconditionError("markers do not share one flag that is an input of the graph")

    def ensures(self, model: ir.Model) -> None:
        """No marker is left."""
        if left := [str(node.name) for node in model.graph.all_nodes() if _is_marker(node)]:
            raise ir.passes.PostconditionError(f"markers are left: {', '.join(left)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        markers = _markers(graph)
        self.note = f"{len(markers)} places are computed only while instructions are read"
        if not markers:
            return ir.passes.PassResult(model, False)
        owners = _owners(graph, markers)
        flag = markers[0].inputs[2]
        assert flag is not None
        shared = [node for node in graph if len(owners.get(node, ())) > 1]
        if shared:
            _sink_shared(graph, shared, flag)
        by_marker = defaultdict(list)
        for node in graph:
            if len(owners.get(node, ())) == 1:
                by_marker[next(iter(owners[node]))].append(node)
        for marker in markers:
            _sink(graph, marker, by_marker[marker])
        model.opset_imports.pop(MARKER_DOMAIN, None)
        TopologicalSortPass()(model)
        return ir.passes.PassResult(model, True)


def _is_marker(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (MARKER_DOMAIN, MARKER)


def _markers(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if _is_marker(node)]


def _owners(graph: ir.Graph, markers: list[ir.Node]) -> dict[ir.Node, frozenset[ir.Node]]:
    """Node to the markers that alone need it; nodes that anything else needs are left out."""
    after = _after_markers(graph, set(markers))
    kept = set(markers)
    outputs = set(graph.outputs)
    owners: dict[ir.Node, frozenset[ir.Node]] = {}
    for node in reversed(list(graph)):
        if node in kept:
            continue
        needed_by: set[ir.Node] = set()
        alone = not any(value in outputs for value in node.outputs)
        for value in node.outputs:
            for user, place in value.uses():
                if user in markers and place == 0:
                    needed_by.add(user)
                elif user in owners:
                    needed_by |= owners[user]
                else:
                    alone = False
        if alone and needed_by and (len(needed_by) == 1 or node not in after):
            owners[node] = frozenset(needed_by)
    return owners


def _after_markers(graph: ir.Graph, markers: set[ir.Node]) -> set[ir.Node]:
    """Nodes that depend on a marker's result."""
    after: set[ir.Node] = set()
    for node in graph:
        producers = [value.producer() for value in node.inputs if value is not None]
        if any(producer in markers or producer in after for producer in producers):
            after.add(node)
    return after


def _sink(graph: ir.Graph, marker: ir.Node, nodes: list[ir.Node]) -> None:
    """Put a marker's own nodes into an ``If`` in its place."""
    changed, unchanged, flag = marker.inputs
    result = marker.outputs[0]
    assert changed is not None
    assert unchanged is not None
    inside = set(nodes)
    then_value = changed
    if changed.producer() not in inside:
        copied = ir.node("Identity", [changed])
        nodes = [*nodes, copied]
        then_value = _typed(copied.outputs[0], changed, f"{result.name}_then")
    graph.remove([node for node in nodes if node in inside])
    kept = ir.node("Identity", [unchanged])
    branches = {
        "then_branch": ir.Graph([], [then_value], nodes=nodes, name=f"{result.name}_read"),
        "else_branch": ir.Graph(
            [], [_typed(kept.outputs[0], unchanged, f"{result.name}_else")], nodes=[kept], name=f"{result.name}_pass"
        ),
    }
    branch = ir.node("If", [flag], attributes=branches)
    replaced = _typed(branch.outputs[0], result, result.name)
    ir.convenience.replace_all_uses_with(result, replaced)
    graph.insert_before(marker, branch)
    graph.remove(marker, safe=True)


def _sink_shared(graph: ir.Graph, nodes: list[ir.Node], flag: ir.Value) -> None:
    """Put nodes that several markers need into one ``If``; in other steps its results are empty tensors."""
    inside = set(nodes)
    crossing = [
        value for node in nodes for value in node.outputs if any(user not in inside for user, _ in value.uses())
    ]
    empties, constants = [], []
    for value in crossing:
        assert value.dtype is not None
        assert value.shape is not None
        array = np.zeros([0] * len(value.shape), dtype=value.dtype.numpy())
        constant = ir.node("Constant", [], attributes={"value": ir.Tensor(array, dtype=value.dtype)})
        empties.append(_typed(constant.outputs[0], value, f"{value.name}_empty"))
        empties[-1].shape = ir.Shape(array.shape)
        constants.append(constant)
    branch = ir.node(
        "If",
        [flag],
        attributes={
            "then_branch": ir.Graph([], crossing, nodes=[], name="read_instructions"),
            "else_branch": ir.Graph([], empties, nodes=constants, name="no_instructions"),
        },
        num_outputs=len(crossing),
    )
    for value, outer in zip(crossing, branch.outputs, strict=True):
        _typed(outer, value, f"{value.name}_read")
        outer.shape = ir.Shape([None] * len(value.shape or ()))
        for user, place in [use for use in value.uses() if use[0] not in inside]:
            user.replace_input_with(place, outer)
    graph.insert_before(nodes[0], branch)
    graph.remove(nodes)
    branch.attributes["then_branch"].as_graph().extend(nodes)


def _typed(value: ir.Value, like: ir.Value, name: str | None) -> ir.Value:
    value.name = name
    value.shape = like.shape
    if like.dtype is not None:
        value.dtype = like.dtype
    return value
