"""Trace few layers, lay out all: equal decoder layers are traced once and copied with their own weights and inputs.

The layers of a decoder differ in their weights, their cache and their number; everything else falls into few kinds
(sliding and full attention, dense and expert). So the first layers are traced, until each kind that comes again was
seen twice behind layer 0. Of two equal layers everything is compared, node by node; what differs must be

- a weight or an input with the layer's number in its name, or what the layer before gives out;
- an integer that grows with the number, as the place of the layer in a tenant's stacked weights.

What is constant may have been folded before, and shapes inferred, but for what depends on the layers' own weights.

Then any further layer is a copy with these replaced. Where anything else differs, `LayOutError` is raised, and the
whole decoder is traced, which is always right and takes as long as it has layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from iapt_export.contract.manifest import GraphSpec
from iapt_export.graphs.layer_kinds import layer_of, numbered
from iapt_export.graphs.ops.layer_end import LAYER_END
from iapt_export.graphs.ops.serving_ops import MARKER_DOMAIN
from iapt_export.graphs.weights import WEIGHTS, weight_tensor
from trainers.decoder.insertion import layers_path


class LayOutError(Exception):
    """Layers of one kind were not traced alike; says where."""


@dataclasses.dataclass
class _Body:
    """What one traced layer consists of."""

    layer: int
    nodes: list[ir.Node]
    end: ir.Value
    """What the layer gives out."""

    def __post_init__(self) -> None:
        # which of its nodes makes a value, and as which of its outputs
        self.places = {
            output: (position, which)
            for position, node in enumerate(self.nodes)
            for which, output in enumerate(node.outputs)
        }


def _is_end(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (MARKER_DOMAIN, LAYER_END)


@dataclasses.dataclass
class _Layout:
    """A graph of few layers on its way to all of them."""

    graph: ir.Graph
    short: GraphSpec
    spec: GraphSpec
    backbone: Any
    kinds: list[Hashable]

    def __post_init__(self) -> None:
        self.path = f"{WEIGHTS}{layers_path(self.backbone)}"
        self.inputs = {tensor.name: value for tensor, value in zip(self.short.inputs, self.graph.inputs, strict=True)}
        self.outputs = {
            tensor.name: value for tensor, value in zip(self.short.outputs, self.graph.outputs, strict=True)
        }
        self.input_names = {value: name for name, value in self.inputs.items()}
        self.output_names = {value: name for name, value in self.outputs.items()}
        self.ends = self._ends()
        self.bodies, self.tail = self._bodies()

    def _ends(self) -> list[ir.Node]:
        ends = [node for node in self.graph if _is_end(node)]
        numbers = [node.attributes["layer"].as_int() for node in ends]
        if numbers != list(range(len(numbers))):
            raise LayOutError(f"layers end in the order {numbers}")
        return ends

    def _bodies(self) -> tuple[list[_Body], list[ir.Node]]:
        """Each layer's nodes: what is needed for its end or its cache, and by no layer before it.

        What several layers need and no layer's states or weights go into, such as a mask, is of none.
        """
        owners: dict[ir.Node, int] = {}
        shared: set[ir.Node] = set()
        own = self._of_layers()
        for layer in range(len(self.ends)):
            for node in self._needed(layer):
                if owners.setdefault(node, layer) != layer and node not in own:
                    shared.add(node)
        nodes: list[list[ir.Node]] = [[] for _ in self.ends]
        tail = []
        for node in self.graph:
            if node.op_type == "Constant":
                continue  # written once where it is needed first, whichever layer that is
            if node in owners:
                if node not in shared:
                    nodes[owners[node]].append(node)
            else:
                tail.append(node)
        return [_Body(layer, own, self.ends[layer].outputs[0]) for layer, own in enumerate(nodes)], tail

    def _needed(self, layer: int) -> Iterator[ir.Node]:
        """The nodes that a layer's end and cache need, without what other layers' ends need."""
        cached = [value for name, value in self.outputs.items() if layer_of(name) == layer]
        waiting = [self.ends[layer], *(node for value in cached if (node := value.producer()))]
        seen: set[ir.Node] = set()
        while waiting:
            node = waiting.pop()
            if node not in seen and (node is self.ends[layer] or not _is_end(node)):
                seen.add(node)
                waiting += [made for value in node.inputs if value is not None and (made := value.producer())]
                yield node

    def _of_layers(self) -> set[ir.Node]:
        """The nodes into which a layer's states, cache or weights go, and not their sizes alone."""
        found: set[ir.Node] = set()
        for node in self.graph:
            if node.op_type == "Shape":
                continue
            for value in node.inputs:
                made = None if value is None else value.producer()
                if made in found or (made is None and self._is_of_a_layer(value)) or (made and _is_end(made)):
                    found.add(node)
        return found

    def _is_of_a_layer(self, value: ir.Value | None) -> bool:
        if value is None:
            return False
        name = self.input_names.get(value)
        return str(value.name).startswith(f"{self.path}.") if name is None else layer_of(name) is not None

    # -- what is replaced

    def reference(self, body: _Body, value: ir.Value | None) -> Any:
        """What a node's input is, in words that are equal for two layers which are alike; a constant is itself."""
        if value is None:
            return None
        if self._is_constant(value):
            return value
        if place := body.places.get(value):
            return ("own", *place)
        if body.layer and value is self.bodies[body.layer - 1].end:
            return "before"
        name = self.input_names.get(value)
        if name is not None and layer_of(name) == body.layer:
            return ("input", numbered(name, 0))
        own = f"{self.path}.{body.layer}."
        if value.is_initializer() and str(value.name).startswith(own):
            return ("weight", str(value.name).removeprefix(own))
        self._refuse_leak(body.layer, value)
        return ("shared", value)

    def _is_constant(self, value: ir.Value) -> bool:
        """Whether a value was written into the program or folded, and is no weight of the backbone."""
        if (node := value.producer()) is not None:
            return node.op_type == "Constant"
        return value.is_initializer() and not str(value.name).startswith(WEIGHTS)

    def _refuse_leak(self, layer: int, value: ir.Value) -> None:
        """Numbers about shapes may be computed in one layer and used in others; states may not."""
        made = next((body.layer for body in self.bodies if value in body.places), 0)
        if made and (value.dtype is None or value.dtype.is_floating_point()):
            raise LayOutError(f"layer {layer} reads {value.name}, which layer {made} computes")

    def pattern(self, kind: Hashable) -> tuple[_Body, list[list[Any]]]:
        """A traced layer of a kind, and for each of its nodes what its inputs are in any layer of the kind."""
        first, second = [body for body in self.bodies[1:] if self.kinds[body.layer] == kind][-2:]
        if len(first.nodes) != len(second.nodes):
            raise LayOutError(f"layers {first.layer} and {second.layer} have different numbers of nodes")
        return second, [self._inputs(first, *pair, second) for pair in zip(first.nodes, second.nodes, strict=True)]

    def _inputs(self, first: _Body, ours: ir.Node, theirs: ir.Node, second: _Body) -> list[Any]:
        """What the inputs of two nodes are that stand for each other in two layers."""
        pair = f"{ours.name} of layer {first.layer} and {theirs.name} of layer {second.layer}"
        if ours.op_identifier() != theirs.op_identifier() or not (_is_end(ours) or _same_attributes(ours, theirs)):
            raise LayOutError(f"{pair} differ in operator or attributes")
        names = [[self.output_names.get(value) for value in node.outputs] for node in (ours, theirs)]
        if [name and numbered(name, second.layer) for name in names[0]] != names[1]:
            raise LayOutError(f"{pair} give the outputs {names[0]} and {names[1]}")
        if len(ours.inputs) != len(theirs.inputs):
            raise LayOutError(f"{pair} have {len(ours.inputs)} and {len(theirs.inputs)} inputs")
        references = []
        for one, other in zip(ours.inputs, theirs.inputs, strict=True):
            was, now = self.reference(first, one), self.reference(second, other)
            if isinstance(was, ir.Value) and isinstance(now, ir.Value):
                references.append(_Number.between(was, now, first.layer, second.layer, pair))
            elif was == now:
                references.append(now)
            else:
                raise LayOutError(f"{pair} read {was} and {now}")
        return references

    # -- the copies

    def lay_out(self) -> None:
        """Append the layers that were not traced."""
        traced, total = len(self.bodies), len(self.kinds)
        self._check_tail()
        patterns = {kind: self.pattern(kind) for kind in set(self.kinds[traced:])}
        for tensor in self.spec.inputs:
            if tensor.name not in self.inputs:
                like = self.inputs[numbered(tensor.name, 0)]
                self.inputs[tensor.name] = ir.Value(name=tensor.name, shape=like.shape, type=like.type)
        ends = [body.end for body in self.bodies]
        after = self.ends[-1]
        for layer in range(traced, total):
            body, inputs = patterns[self.kinds[layer]]
            after, end = self._copy(layer, body, inputs, ends[-1], after)
            ends.append(end)
        for node in self.tail:
            read = [value for value in node.inputs if value in ends[:traced]]
            if read == ends[:traced]:
                _append_inputs(node, ends[traced:])  # what gathers all layers
            elif any(value is not ends[traced - 1] for value in read):
                raise LayOutError(f"{node.name} reads what some layers give out, and not the last alone")
            else:
                for index, value in enumerate(node.inputs):
                    if value is ends[traced - 1]:
                        node.replace_input_with(index, ends[-1])
        self.graph.inputs[:] = [self.inputs[tensor.name] for tensor in self.spec.inputs]
        self.graph.outputs[:] = [
            ends[-1] if self.outputs.get(tensor.name) is ends[traced - 1] else self.outputs[tensor.name]
            for tensor in self.spec.outputs
        ]

    def _check_tail(self) -> None:
        for node in self.tail:
            for value in node.inputs:
                if value is not None and all(value is not body.end for body in self.bodies):
                    self._refuse_leak(len(self.bodies), value)

    def _copy(
        self, layer: int, body: _Body, inputs: list[list[Any]], before: ir.Value, after: ir.Node
    ) -> tuple[ir.Node, ir.Value]:
        """Insert a copy of ``body`` as ``layer`` behind a node; returns its last node and its end."""
        copies: list[ir.Node] = []
        numbers: list[ir.Node] = []
        path = re.compile(rf"{re.escape(f'{self.path}.{body.layer}')}(?!\d)")

        def found(reference: Any) -> ir.Value | None:
            match reference:
                case "before":
                    return before
                case ("own", position, which):
                    return copies[position].outputs[which]
                case ("input", name):
                    return self.inputs[numbered(name, layer)]
                case ("weight", name):
                    return self._weight(f"{self.path}.{layer}.{name}")
                case ("shared", value):
                    return value
                case _Number():
                    if not reference.grows:
                        return reference.value
                    numbers.append(reference.at(layer))
                    return numbers[-1].outputs[0]
            return None

        for node, references in zip(body.nodes, inputs, strict=True):
            copy = ir.Node(
                node.domain,
                node.op_type,
                [found(reference) for reference in references],
                node.attributes.values(),
                overload=node.overload,
                outputs=[ir.Value(shape=value.shape, type=value.type) for value in node.outputs],
                metadata_props={
                    key: path.sub(f"{self.path}.{layer}", text) for key, text in node.metadata_props.items()
                },
            )
            for value, made in zip(node.outputs, copy.outputs, strict=True):
                if name := self.output_names.get(value):
                    self.outputs[numbered(name, layer)] = made
            copies.append(copy)
        self.graph.insert_after(after, [*numbers, *copies])
        position, which = body.places[body.end]
        return copies[-1], copies[position].outputs[which]

    def _weight(self, name: str) -> ir.Value:
        if name not in self.graph.initializers:
            const = weight_tensor(self.backbone, name)
            value = ir.Value(
                name=name, shape=ir.Shape(const.shape.numpy()), type=ir.TensorType(const.dtype), const_value=const
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


@dataclasses.dataclass
class _Number:
    """A constant that is the same in all layers of a kind, or grows with their number."""

    value: ir.Value
    layer: int
    growth: Any = 0

    @classmethod
    def between(cls, one: ir.Value, other: ir.Value, first: int, second: int, pair: str) -> _Number:
        """What two layers have in one place."""
        if one is other:
            return cls(other, second)
        ours, theirs = (ir.convenience.get_const_tensor(value, propagate_shape_type=True) for value in (one, other))
        if ours is None or theirs is None:
            raise LayOutError(f"{pair} read {one.name} and {other.name}")
        if _same_tensor(ours, theirs):
            return cls(other, second)
        growth = _growth(ours, theirs, second - first)
        if growth is None:
            raise LayOutError(f"{pair} read the constants {ours.numpy()} and {theirs.numpy()}")
        return cls(other, second, growth)

    @property
    def grows(self) -> bool:
        """Whether layers differ in it."""
        return bool(np.any(self.growth))

    def at(self, layer: int) -> ir.Node:
        """The constant of a layer."""
        tensor = ir.convenience.get_const_tensor(self.value)
        assert tensor is not None
        grown = ir.tensor(tensor.numpy() + self.growth * (layer - self.layer))
        made = self.value.producer()
        metadata = dict(made.metadata_props) if made is not None else {}
        node = ir.node("Constant", [], attributes={"value": grown}, metadata_props=metadata)
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(grown.shape.numpy()), grown.dtype
        return node


def _growth(one: ir.TensorProtocol, other: ir.TensorProtocol, layers: int) -> np.ndarray[Any, Any] | None:
    """By how much 64-bit integers grow from layer to layer; None where they do not, or are something else."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype != ir.DataType.INT64:
        return None
    difference = other.numpy() - one.numpy()
    return None if (difference % layers).any() else difference // layers


def _same_tensor(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def _same_attributes(ours: ir.Node, theirs: ir.Node) -> bool:
    if ours.attributes.keys() != theirs.attributes.keys():
        return False
    return all(_same(one, theirs.attributes[name]) for name, one in ours.attributes.items())


def _same(one: ir.Attr, other: ir.Attr) -> bool:
    if one.type != other.type or one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    if one.type == ir.AttributeType.TENSOR:
        return _same_tensor(one.as_tensor(), other.as_tensor())
    return bool(one.value == other.value)


def _append_inputs(node: ir.Node, more: list[ir.Value]) -> None:
    """Give a node with any number of inputs some more."""
    node.resize_inputs(len(node.inputs) + len(more))
    for index, value in enumerate(more, start=len(node.inputs) - len(more)):
        node.replace_input_with(index, value)


def lay_out(model: ir.Model, short: GraphSpec, spec: GraphSpec, backbone: Any, kinds: list[Hashable]) -> None:
    """Make a graph of all layers out of one of the first ones, in place, and take the marks of layers out.

    Args:
        model: traced under `first_layers` with the interface ``short``.
        short: the interface of `shortened`.
        spec: the graph's whole interface.
        backbone: the transformers model, with all its layers.
        kinds: those of `layer_kinds`.

    Raises:
        LayOutError: two layers of a kind were traced in different ways.
    """
    layout = _Layout(model.graph, short, spec, backbone, kinds)
    if layout.ends and len(layout.ends) < len(kinds):
        layout.lay_out()
    remove_marks(model)


def remove_marks(model: ir.Model) -> None:
    """Take the marks of layers out of a graph."""
    for node in list(model.graph):
        if _is_end(node):
            (value,) = node.inputs
            assert value is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
