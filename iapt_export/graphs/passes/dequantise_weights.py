"""Store a backbone's matrices in 4 or 8 bits behind ``DequantizeLinear``, for TensorRT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import Rounding
from iapt_export.graphs.passes.fold_transposes import TRANSPOSED
from iapt_export.graphs.passes.quantise_weights import OUTPUTS_AT_A_TIME, is_lookup
from iapt_export.graphs.weights import WEIGHTS
from trainers.decoder.scaled import Scaled, scale_of_all, scaled

STEPS, FACTORS, WHOLE, RESTORED = ".steps", ".factors", ".whole", ".restored"
"""Suffixes of a rounded weight's constants and of what ``DequantizeLinear`` makes of them."""
FP4_IR = 11
"""The first version of ONNX's format that has FP4."""
TYPES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "fp4": ir.DataType.FLOAT4E2M1,
}


class DequantiseWeightsPass(ir.passes.InPlacePass):
    """Put ``DequantizeLinear`` of rounded values, with fp16 scales, between a weight's place and all that reads it.

    A linear layer's matrix ``[K, N]`` is in blocks along axis 0, an embedding ``[N, K]`` along axis 1. One that is the
    head's too is stored as the head reads it, ``[K, N]``, and looked up along axis 1: of ``Gather`` and ``Transpose``
    over one INT8 table, TensorRT for RTX 1.7.1 keeps a copy each in its engine.

    FP4 has FP8 scales, restored by a ``DequantizeLinear`` of their own with one fp32 scale, and a ``Cast`` to fp16.

    Requires: `FoldTransposesPass`; fp16 weights; opset 21 or later. Ensures: no weight that has bits is left in fp16,
    all others are as they were. The values are computed when they are written.
    """

    def __init__(self, bits: Mapping[str, int], rounding: Rounding) -> None:
        """Take the names of a backbone's weights with the bits of each, and how those are stored.

        A graph may have some of the weights.
        """
        super().__init__()
        self.bits, self.rounding = bits, rounding
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
            _dequantise(graph, weight, bits, self.rounding)
            del graph.initializers[str(weight.name)]
            counts[bits] += 1
            if self.rounding.stored_as(bits) == "fp4":
                model.ir_version = max(model.ir_version, FP4_IR)
        done = [f"{count} weights in {bits} bits" for bits, count in sorted(counts.items())]
        self.note = ", ".join(done) or "no weight of the backbone is rounded"
        return ir.passes.PassResult(model, bool(counts))

    def _weights(self, graph: ir.Graph) -> dict[ir.Value, int]:
        """The constants that have bits, and how many."""
        names = {name: name.removeprefix(WEIGHTS).removesuffix(TRANSPOSED) for name in graph.initializers}
        return {graph.initializers[name]: self.bits[own] for name, own in names.items() if own in self.bits}


def _dequantise(graph: ir.Graph, weight: ir.Value, bits: int, rounding: Rounding) -> None:
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
    later = _Later(weight.const_value, bits, rounding, is_turned=is_turned)
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
        graph: gets the nodes, and the constants.
        weight: the constant as it is.
        later: its values, when they are written.
        turn: store it the other way round.
    """
    outputs_first = later.is_turned and not turn
    shape = [later.num_outputs, later.num_inputs] if outputs_first else [later.num_inputs, later.num_outputs]
    axis = 1 if outputs_first else 0
    blocks = [size // later.block if place == axis else size for place, size in enumerate(shape)]
    how = {"axis": axis, "block_size": later.block}
    steps = later.constant(graph, f"{weight.name}{STEPS}", TYPES[later.kind], shape, outputs_first)
    if later.kind == "fp4":
        small = later.constant(graph, f"{weight.name}{FACTORS}", ir.DataType.FLOAT8E4M3FN, blocks, outputs_first)
        whole = later.constant(graph, f"{weight.name}{WHOLE}", ir.DataType.FLOAT, [], outputs_first)
        nodes = [ir.node("DequantizeLinear", [small, whole])]
        nodes.append(ir.node("DequantizeLinear", [steps, nodes[0].outputs[0]], how))
        nodes.append(ir.node("Cast", [nodes[1].outputs[0]], {"to": ir.DataType.FLOAT16}))
        _typed(nodes[0].outputs[0], f"{weight.name}{FACTORS}{RESTORED}", ir.DataType.FLOAT, blocks)
        _typed(nodes[1].outputs[0], f"{weight.name}{STEPS}{RESTORED}", ir.DataType.FLOAT, shape)
    else:
        factors = later.constant(graph, f"{weight.name}{FACTORS}", ir.DataType.FLOAT16, blocks, outputs_first)
        nodes = [ir.node("DequantizeLinear", [steps, factors], how)]
    reader = next(iter(weight.uses()))[0]
    for node in nodes:
        node.metadata_props.update(reader.metadata_props)  # which module it is of
    graph.insert_before(graph[0], nodes)
    return _typed(nodes[-1].outputs[0], f"{weight.name}{RESTORED}", ir.DataType.FLOAT16, shape)


def _typed(value: ir.Value, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
    return value


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
    """A matrix that is rounded when the first of its tensors is written; the others wait for their turn."""

    def __init__(self, tensor: ir.TensorProtocol, bits: int, rounding: Rounding, *, is_turned: bool) -> None:
        """Take a matrix ``[K, N]``, or ``[N, K]`` if it ``is_turned``."""
        self.tensor, self.bits, self.rounding, self.is_turned = tensor, bits, rounding, is_turned
        self.kind, self.block = rounding.stored_as(bits), rounding.block_for(bits)
        shape = tensor.shape.numpy()
        self.num_inputs, self.num_outputs = reversed(shape) if is_turned else shape
        self.waiting: dict[str, np.ndarray] = {}

    def constant(
        self, graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int], outputs_first: bool
    ) -> ir.Value:
        """The constant of the graph that will hold the values, the scales, or what is of all of them."""

        def compute() -> ir.Tensor:
            rows = self._take(name[name.rindex(".") :])
            array = np.ascontiguousarray(rows if outputs_first else rows.T).reshape(shape)
            return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)

        tensor = ir.LazyTensor(compute, dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def _take(self, suffix: str) -> np.ndarray:
        if suffix not in self.waiting:
            made = self._rounded()
            self.waiting = {STEPS: made.values, FACTORS: made.scales}
            if made.whole is not None:
                self.waiting[WHOLE] = np.array(made.whole, np.float32)
        return self.waiting.pop(suffix)

    def _rounded(self) -> Scaled:
        """Outputs have nothing to do with each other, so some at a time are copied and rounded.

        Raises:
            IaptError: see `scaled`; with the weight's name.
        """
        array = self.tensor.numpy()
        rows = array if self.is_turned else array.T  # [N, K]
        begins = range(0, self.num_outputs, OUTPUTS_AT_A_TIME)
        whole = scale_of_all(array.min(), array.max()) if self.kind == "fp4" else None
        try:
            parts = [scaled(rows[at : at + OUTPUTS_AT_A_TIME], self.bits, self.rounding, whole) for at in begins]
        except IaptError as error:
            name = str(self.tensor.name).removeprefix(WEIGHTS).removesuffix(TRANSPOSED)
            raise IaptError(f"{name}: {error}") from error
        values, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "scales"))
        return Scaled(values, scales, parts[0].whole)


def _is_product(node: ir.Node, place: int) -> bool:
    """Whether a node multiplies with the matrix ``[K, N]`` that is its input of that place."""
    if node.domain or place != 1 or node.op_type not in ("MatMul", "Gemm"):
        return False
    return node.attributes.get_int("transB", 0) == 0
