"""Let several new tokens of a row attend one after the other, each as in a step of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iapt_export.graphs.ops.serving_ops import ATTENTION, MICROSOFT
from iapt_export.graphs.passes.attentions import PAST_INPUTS, attentions, constant

QUERY_KEY_VALUE = (0, 1, 2)
LENGTHS = (5, 6)
"""Each row's last entry, and the number of entries of the longest row."""
POSITIONS = 9
"""Places of ``GroupQueryAttention``'s inputs."""


class OneByOnePass(ir.passes.InPlacePass):
    """Turn each ``GroupQueryAttention`` over ``length`` tokens into a chain of as many over one.

    ONNX Runtime's attention takes several new tokens of a row over a filled cache for a batch of one row only, and
    computes them by another kernel, whose last bits differ. In a chain each does what a decode step does. Everything
    else computes all tokens at once, which is where the time goes.

    Requires: every attention's input and output have ``length`` tokens. Ensures: what each link leaves in the cache is
    an output of the graph, ``present.N.key.STEP``, behind those that were there, so that all links can be given one
    memory.
    """

    note = ""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def ensures(self, model: ir.Model) -> None:
        """Each attention but the first of a layer goes on over what another one left."""
        for node in attentions(model.graph):
            past = node.inputs[PAST_INPUTS[0]]
            if past is None or not (past.is_graph_input() or past.is_graph_output()):
                raise ir.passes.PostconditionError(f"{node.name} goes on over a cache that is no output")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = attentions(graph)
        if not nodes:
            return ir.passes.PassResult(model, False)
        first = nodes[0]
        ones = constant(graph, "one_by_one.sizes", np.ones(self.length, np.int64))
        counted = [self._counted(graph, first, first.inputs[place]) for place in LENGTHS]
        places = first.inputs[POSITIONS] if len(first.inputs) > POSITIONS else None
        positions = self._split(graph, first, places, ones) if places is not None else None
        between: dict[ir.Value, list[ir.Value]] = {}
        """Each output that is a cache to what was in it after each token but the last."""
        for node in nodes:
            self._chain(graph, node, ones, [*counted, *([positions] if positions else [])], between)
        outputs = list(graph.outputs)
        for step in range(self.length - 1):
            graph.outputs.extend(between[value][step] for value in outputs if value in between)
        self.note = f"{len(nodes)} attentions take {self.length} tokens one by one"
        return ir.passes.PassResult(model, True)

    def _counted(self, graph: ir.Graph, before: ir.Node, value: ir.Value | None) -> list[ir.Value]:
        """Lengths as they are after each token but the last; the given ones behind them."""
        assert value is not None
        made = []
        for step in range(self.length - 1):
            later = constant(graph, f"one_by_one.later.{step}", np.array(self.length - 1 - step, np.int32))
            node = ir.node("Sub", [value, later])
            _like(node.outputs[0], value, f"{value.name}.{step}", value.shape)
            graph.insert_before(before, node)
            made.append(node.outputs[0])
        return [*made, value]

    def _split(self, graph: ir.Graph, before: ir.Node, value: ir.Value, ones: ir.Value) -> list[ir.Value]:
        """``[B, T, ...]`` as ``T`` of ``[B, 1, ...]``."""
        node = ir.node("Split", [value, ones], attributes={"axis": 1}, num_outputs=self.length)
        for step, part in enumerate(node.outputs):
            _like(part, value, f"{value.name}.{step}", _one(value.shape))
        graph.insert_before(before, node)
        return list(node.outputs)

    def _chain(
        self,
        graph: ir.Graph,
        node: ir.Node,
        ones: ir.Value,
        counted: list[list[ir.Value]],
        between: dict[ir.Value, list[ir.Value]],
    ) -> None:
        """Put a node's links before it, and what they give together in its place."""
        parts = {
            place: self._split(graph, node, value, ones)
            for place in QUERY_KEY_VALUE
            if (value := node.inputs[place]) is not None
        }
        output, caches = node.outputs[0], node.outputs[1:3]
        past: list[ir.Value | None] = [node.inputs[place] for place in PAST_INPUTS]
        links = []
        for step in range(self.length):
            inputs = list(node.inputs)
            for place, values in [*parts.items(), *zip((*LENGTHS, POSITIONS), counted, strict=False)]:
                inputs[place] = values[step]
            for place, value in zip(PAST_INPUTS, past, strict=True):
                inputs[place] = value
            link = ir.node(
                ATTENTION, inputs, attributes=dict(node.attributes), domain=MICROSOFT, num_outputs=len(node.outputs)
            )
            link.metadata_props.update(node.metadata_props)  # which module it is of
            _like(link.outputs[0], output, f"{output.name}.{step}", _one(output.shape))
            for left, cache in zip(link.outputs[1:3], caches, strict=True):
                _like(left, cache, f"{cache.name}.{step}", cache.shape)
            graph.insert_before(node, link)
            links.append(link)
            past = list(link.outputs[1:3])
        joined = ir.node("Concat", [link.outputs[0] for link in links], attributes={"axis": 1})
        joined.metadata_props.update(node.metadata_props)
        _like(joined.outputs[0], output, f"{output.name}.joined", output.shape)
        graph.insert_before(node, joined)
        ir.convenience.replace_all_uses_with(output, joined.outputs[0])
        for place, value in enumerate(graph.outputs):  # the last link's cache is the step's
            if value in caches:
                made = [link.outputs[1 + caches.index(value)] for link in links]
                graph.outputs[place] = made[-1]
                between[made[-1]] = made[:-1]
        graph.remove(node, safe=True)


def _like(value: ir.Value, other: ir.Value, name: str, shape: ir.Shape | None) -> None:
    value.name, value.shape, value.type = name, shape, other.type


def _one(shape: ir.Shape | None) -> ir.Shape | None:
    """The same with one token."""
    return None if shape is None else ir.Shape([shape[0], 1, *shape[2:]])
