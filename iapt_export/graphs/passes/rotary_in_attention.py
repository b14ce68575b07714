"""Let ONNX Runtime's attention rotate queries and keys itself, from a table of cosines and sines."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from iapt_export.graphs.ops.serving_ops import ATTENTION
from iapt_export.graphs.passes.attentions import attentions

POSITIONS = "position_ids"
ELEMENTWISE = {"Add", "Cast", "Concat", "Cos", "Div", "Expand", "Mul", "Neg", "Sin", "Squeeze", "Sub", "Unsqueeze"}
"""Operators that treat each position alone, as rotary embeddings write them; a maximum over positions is not here."""
ROTARY = "RotaryEmbedding"
FIRST_TABLE = 7
"""``GroupQueryAttention`` takes cos_cache, sin_cache and position_ids as inputs 7, 8 and 9."""
HEAD_MULTIPLE = 16
"""ONNX Runtime rotates heads in vectors of eight pairs."""


class RotaryInAttentionPass(ir.passes.InPlacePass):
    """Move ``RotaryEmbedding`` into ``GroupQueryAttention`` (``do_rotary``).

    Requires: `FlattenHeadsPass`; an input ``position_ids [B, T]``. Ensures: where every attention's query and key come
    from a rotary embedding of whole heads, whose cosines and sines depend on each position alone, the table of them for
    positions 0 to ``num_positions - 1`` is a constant and the embedding's nodes are gone; each row's ``position_ids``
    pick from it. ``reason`` says why nothing was done where that is not so: a prefix stands between embedding and
    attention, or a scaling looks at the longest row.
    """

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.reason = ""

    @property
    def note(self) -> str:
        """What was done."""
        return self.reason or f"attention rotates queries and keys by a table of {self.num_positions} positions"

    def requires(self, model: ir.Model) -> None:
        """There are positions to pick from the table by."""
        if attentions(model.graph) and all(value.name != POSITIONS for value in model.graph.inputs):
            raise ir.passes.PreconditionError(f"the graph has no input {POSITIONS}")

    def ensures(self, model: ir.Model) -> None:
        """Every attention rotates the queries and keys that it reads, or there is a reason why none does."""
        rotating = {bool(node.attributes.get_int("do_rotary", 0)) for node in attentions(model.graph)}
        if rotating - {not self.reason}:
            raise ir.passes.PostconditionError("some attentions rotate queries and keys, others do not")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = attentions(graph)
        candidates = [_rotary_pair(node) for node in nodes]
        rotaries = [pair for pair in candidates if pair]
        self.reason = _unfit(nodes, rotaries)
        if self.reason:
            return ir.passes.PassResult(model, False)
        tables: dict[tuple[ir.Value, ir.Value], list[ir.Value]] = {}
        for query, key in rotaries:
            pair = _cos_sin(query)
            if pair == _cos_sin(key) and pair not in tables:
                table = self._table(graph, pair, len(tables))
                if isinstance(table, str):
                    self.reason = table
                    return ir.passes.PassResult(model, False)
                tables[pair] = table
        positions = next(value for value in graph.inputs if value.name == POSITIONS)
        for node, (query, key) in zip(nodes, rotaries, strict=True):
            _absorb(node, query, key, [*tables[_cos_sin(query)], positions])
        return ir.passes.PassResult(model, True)

    def _table(self, graph: ir.Graph, pair: tuple[ir.Value, ir.Value], number: int) -> list[ir.Value] | str:
        """Constants ``[num_positions, K/2]`` of a pair of cosines and sines, or why there can be none."""
        nodes = _ancestors(pair)
        if other := sorted({node.op_type for node in nodes} - ELEMENTWISE):
            return f"its cosines depend on positions through {', '.join(other)}, which may look at other positions"
        arrays = _evaluate(graph, nodes, pair, self.num_positions)
        if any(array.shape[:2] != (1, self.num_positions) or array.ndim != 3 for array in arrays):
            return f"its cosines have the shape {arrays[0].shape}, expected one row for each position"
        values = []
        for name, array, value in zip(("cos", "sin"), arrays, pair, strict=True):
            tensor = ir.Tensor(np.ascontiguousarray(array[0]), name=f"rotary.{name}.{number}")
            assert value.dtype in (None, tensor.dtype)
            values.append(ir.Value(name=tensor.name, shape=tensor.shape, const_value=tensor))
            values[-1].dtype = tensor.dtype
            graph.register_initializer(values[-1])
        return values


def _rotary_pair(attention: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The nodes that rotate an attention's query and key."""
    query, key = (value.producer() if value is not None else None for value in attention.inputs[:2])
    if query is None or key is None or any((node.domain, node.op_type) != ("", ROTARY) for node in (query, key)):
        return None
    return query, key


def _unfit(nodes: list[ir.Node], rotaries: list[tuple[ir.Node, ir.Node]]) -> str:
    """Why a graph's embeddings cannot move, as far as the nodes alone tell; empty if they can."""
    if not nodes:
        return f"the graph has no {ATTENTION}"
    if len(rotaries) < len(nodes):
        others = len(nodes) - len(rotaries)
        return f"{others} of {len(nodes)} attentions do not follow a rotary embedding directly"
    for query, key in rotaries:
        if _cos_sin(query) != _cos_sin(key):
            return "queries and keys are rotated differently"
        if len({node.attributes.get_int("interleaved", 0) for node in (query, key)}) != 1:
            return "queries and keys are rotated differently"
        if any(node.attributes.get_int("rotary_embedding_dim", 0) for node in (query, key)):
            return "only a part of each head is rotated"
    widths = {attention.inputs[3].shape[3] for attention in nodes}  # type: ignore[union-attr, index]
    if unfit := [width for width in widths if not isinstance(width, int) or width % HEAD_MULTIPLE]:
        return f"heads are {unfit[0]} wide, and {ATTENTION} rotates multiples of {HEAD_MULTIPLE}"
    return ""


def _cos_sin(rotary: ir.Node) -> tuple[ir.Value, ir.Value]:
    cos, sin = rotary.inputs[1:3]
    assert cos is not None
    assert sin is not None
    return cos, sin


def _ancestors(values: tuple[ir.Value, ...]) -> set[ir.Node]:
    """All nodes that values are computed from."""
    ancestors: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in ancestors:
            ancestors.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return ancestors


def _evaluate(
    graph: ir.Graph, nodes: set[ir.Node], outputs: tuple[ir.Value, ...], num_positions: int
) -> list[np.ndarray]:
    """What ``nodes`` make for positions 0 to ``num_positions - 1``, ``[1, num_positions, K/2]`` each."""
    constants = {value for node in nodes for value in node.inputs if value is not None and value.is_initializer()}
    body = onnx.helper.make_graph(
        [ir.to_proto(node) for node in graph if node in nodes],
        "rotary",
        [onnx.helper.make_tensor_value_info(POSITIONS, onnx.TensorProto.INT64, [1, num_positions])],
        [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in outputs],
        [
            onnx.numpy_helper.from_array(value.const_value.numpy(), value.name)
            for value in constants
            if value.const_value
        ],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    model = onnx.helper.make_model(body, opset_imports=opsets)
    return list(ReferenceEvaluator(model).run(None, {POSITIONS: np.arange(num_positions)[None]}))


def _absorb(attention: ir.Node, query: ir.Node, key: ir.Node, tables: list[ir.Value]) -> None:
    # a later input, the attention sink, may be there already
    attention.resize_inputs(max(len(attention.inputs), FIRST_TABLE + len(tables)))
    for place, value in enumerate([query.inputs[0], key.inputs[0]]):
        attention.replace_input_with(place, value)
    for place, value in enumerate(tables):
        attention.replace_input_with(FIRST_TABLE + place, value)
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    interleaved = query.attributes.get_int("interleaved", 0)
    attention.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", interleaved)
