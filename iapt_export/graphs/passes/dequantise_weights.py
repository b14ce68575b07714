"""Store a backbone's matrices in 4 or 8 bits behind ``DequantizeLinear``, for TensorRT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from iapt_export.contract.errors import IaptError
from iapt_export.graphs.passes.fold_transposes import TRANSPOSED
from iapt_export.graphs.passes.quantise_weights import OUTPUTS_AT_A_TIME, is_lookup
from iapt_export.graphs.weights import WEIGHTS
from trainers.decoder.scaled import Scaled, scaled

STEPS, FACTORS, RESTORED = ".steps", ".factors", ".restored"
"""Suffixes of a rounded weight's constants and of what ``DequantizeLinear`` makes of them."""
TYPES = {8: ir.DataType.INT8, 4: ir.DataType.INT4}


class DequantiseWeightsPass(ir.passes.InPlacePass):
    """Put ``DequantizeLinear`` of rounded values between a weight's place and all that reads it.

    A linear layer's matrix ``[K, N]`` is in blocks along axis 0, an embedding ``[N, K]`` along axis 1. One that is the
    head's too is stored as the head reads it, ``[K, N]``, and looked up along axis 1: of ``Gather`` and ``Transpose``
    over one INT8 table, TensorRT for RTX 1.7.1 keeps a copy each in its engine.

    Requires: `FoldTransposesPass`; fp16 weights; opset 21 or later. Ensures: no weight that has bits is left in fp16,
    all others are as they were. The values are computed when they are written.
    """

    def __init__(self, bits: Mapping[str, int], block: int) -> None:
        """Take the names of a backbone's weights with the bits of each, and how many values share a scale.

        A graph may have some of the weights.
        """
        super().__init__()
        self.bits, self.block = bits, block
        self.note = ""

    def requires(self, model: ir.Model) -> None:
        """Weights that have bits are fp16."""
        others = [str(value.name) for value in self._weights(model.graph) if value.dtype != ir.DataType.FLOAT16]
        if others:
            raise ir.passes.PreconditionError(f"{others[0]} and {len(others) - 1} more weights are not fp16")

    def ensures(self, model: ir.Model) -> None:
        """No weight that has bits is left in fp16."""
        if names := [str(value.name) for value in self._weights(model.graph)]:
            raise ir.passes.PostconditionError(f"{', '.join(names)} are still fp16")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        counts: Counter[int] = Counter()
        for weight, bits in self._weights(graph).items():
            _dequantise(graph, weight, bits, self.block)
            del graph.initializers[str(weight.name)]
            counts[bits] += 1
        done = [f"{count} weights in {bits} bits" for bits, count in sorted(counts.items())]
        self.note = ", ".join(done) or "no weight of the backbone is rounded"
        return ir.passes.PassResult(model, bool(counts))

    def _weights(self, graph: ir.Graph) -> dict[ir.Value, int]:
        """The constants that have bits, and how many."""
        names = {name: name.removeprefix(WEIGHTS).removesuffix(TRANSPOSED) for name in graph.initializers}
        return {graph.initializers[name]: self.bits[own] for name, own in names.items() if own in self.bits}


def _dequantise(graph: ir.Graph, weight: ir.Value, bits: int, block: int) -> None:
    """Let all that reads a weight read what is restored of its rounded values.

    Raises:
        IaptError: something else than a product or a lookup reads it, so that it is not known which axis has blocks.
    """
    readers = [(node, place) for node, place in weight.uses()]
    lookups = [node for node, place in readers if is_lookup(node, place)]
    turns = [node for node, _ in readers if node.op_type == "Transpose" and not node.domain]
    products = [node for node, place in readers if _is_product(node, place)]
    others = [node for node, _ in readers if node not in (*lookups, *turns, *products)]
    if others or (products and (lookups or turns)):
        raise IaptError(
            f"{str(weight.name).removeprefix(WEIGHTS)} cannot be stored in {bits} bits: "
            f"{(others or products)[0].op_type} reads it, and blocks go along the inputs of products and the rows of "
            "lookups; build for tensorrt-rtx:fp16"
        )
    is_turned = bool(lookups or turns)  # [N, K]
    assert weight.const_value is not None
    later = _Later(weight.const_value, bits, block, is_turned=is_turned)
    restored = _restored(graph, weight, later, turn=bool(turns))
    for node in turns:
        node.outputs[0].replace_all_uses_with(restored)
        graph.remove(node, safe=True)
    for node in lookups:
        node.replace_input_with(0, restored)
        if turns:
            _look_up_columns(graph, node)
    for node, place in readers:
        if node in products:
            node.replace_input_with(place, restored)


def _restored(graph: ir.Graph, weight: ir.Value, later: _Later, *, turn: bool) -> ir.Value:
    """What ``DequantizeLinear`` makes of a weight.

    Args:
        graph: gets the node, and the constants.
        weight: the constant as it is.
        later: its values, when they are written.
        turn: store it the other way round.
    """
    outputs_first = later.is_turned and not turn
    shape = [later.num_outputs, later.num_inputs] if outputs_first else [later.num_inputs, later.num_outputs]
    axis = 1 if outputs_first else 0
    blocks = [size // later.block if place == axis else size for place, size in enumerate(shape)]
    steps = later.constant(graph, f"{weight.name}{STEPS}", TYPES[later.bits], shape, outputs_first)
    factors = later.constant(graph, f"{weight.name}{FACTORS}", ir.DataType.FLOAT16, blocks, outputs_first)
    node = ir.node("DequantizeLinear", [steps, factors], {"axis": axis, "block_size": later.block})
    restored = node.outputs[0]
    restored.name, restored.shape = f"{weight.name}{RESTORED}", ir.Shape(shape)
    restored.type = ir.TensorType(ir.DataType.FLOAT16)
    reader = next(iter(weight.uses()))[0]
    node.metadata_props.update(reader.metadata_props)  # which module it is of
    graph.insert_before(graph[0], node)
    return restored


def _look_up_columns(graph: ir.Graph, node: ir.Node) -> None:
    """Let a lookup of rows ``[..., K]`` take columns ``[K, ...]`` of the table turned round, and turn them."""
    result = node.outputs[0]
    assert result.shape is not None
    rank = len(result.shape)
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    turned = ir.node("Transpose", [result], {"perm": [*range(1, rank), 0]})
    ir.convenience.replace_all_uses_with(result, turned.outputs[0], replace_graph_outputs=True)
    turned.replace_input_with(0, result)
    turned.outputs[0].name, turned.outputs[0].shape, turned.outputs[0].type = (
        f"{result.name}_rows",
        result.shape,
        result.type,
    )
    result.shape = ir.Shape([result.shape[rank - 1], *list(result.shape)[: rank - 1]])
    turned.metadata_props.update(node.metadata_props)
    graph.insert_after(node, turned)


class _Later:
    """A matrix that is rounded when the first of its two tensors is written; the other waits for its turn."""

    def __init__(self, tensor: ir.TensorProtocol, bits: int, block: int, *, is_turned: bool) -> None:
        """Take a matrix ``[K, N]``, or ``[N, K]`` if it ``is_turned``."""
        self.tensor, self.bits, self.block, self.is_turned = tensor, bits, block, is_turned
        shape = tensor.shape.numpy()
        self.num_inputs, self.num_outputs = reversed(shape) if is_turned else shape
        self.waiting: dict[str, np.ndarray] = {}

    def constant(
        self, graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int], outputs_first: bool
    ) -> ir.Value:
        """The constant of the graph that will hold the values or the scales."""

        def compute() -> ir.Tensor:
            rows = self._take(name.endswith(FACTORS))
            array = np.ascontiguousarray(rows if outputs_first else rows.T)
            return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)

        tensor = ir.LazyTensor(compute, dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def _take(self, is_scales: bool) -> np.ndarray:
        key = "scales" if is_scales else "values"
        if key not in self.waiting:
            made = self._rounded()
            self.waiting = {"values": made.values, "scales": made.scales}
        return self.waiting.pop(key)

    def _rounded(self) -> Scaled:
        """Outputs have nothing to do with each other, so some at a time are copied and rounded.

        Raises:
            IaptError: see `scaled`; with the weight's name.
        """
        array = self.tensor.numpy()
        rows = array if self.is_turned else array.T  # [N, K]
        begins = range(0, self.num_outputs, OUTPUTS_AT_A_TIME)
        try:
            parts = [scaled(rows[begin : begin + OUTPUTS_AT_A_TIME], self.bits, self.block) for begin in begins]
        except IaptError as error:
            name = str(self.tensor.name).removeprefix(WEIGHTS).removesuffix(TRANSPOSED)
            raise IaptError(f"{name}: {error}") from error
        return Scaled(np.concatenate([part.values for part in parts]), np.concatenate([part.scales for part in parts]))


def _is_product(node: ir.Node, place: int) -> bool:
    """Whether a node multiplies with the matrix ``[K, N]`` that is its input of that place."""
    if node.domain or place != 1 or node.op_type not in ("MatMul", "Gemm"):
        return False
    return node.attributes.get_int("transB", 0) == 0
