"""Store a backbone's matrices in 4 or 8 bits, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from iapt_export.graphs.ops.serving_ops import LOOKUP, MICROSOFT, PRODUCT
from trainers.decoder.quantise import (
    ACCURACY_LEVEL,
    BLOCK_SIZE,
    FRAGILE_BITS,
    Blocks,
    bits_for,
    quantise,
    require_quantiser,
)

BLOCKS, ROWS, SCALES = ".blocks", ".rows", ".scales"
"""Suffixes of a quantised weight's tensors: its values as products take them, as a lookup takes them, its scales."""
OUTPUTS_AT_A_TIME = 4096

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class QuantiseWeightsPass(ir.passes.InPlacePass):
    """Replace products with constant matrices by ``MatMulNBits``, and the embedding by ``GatherBlockQuantized``.

    Requires: `FoldTransposesPass`; fp32 weights. Ensures: no 2-D weight of a ``MatMul`` or a plain ``Gemm`` is left in
    fp32, a matrix that is both embedding and head is stored once, and what is multiplied with an input (a tenant's
    weights) is as it was. ``kept`` names matrices that no operator takes.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.kept: list[str] = []
        self.note = ""

    def requires(self, model: ir.Model) -> None:
        """Weights of products are fp32."""
        weights = [node.inputs[1] for node in _products(model.graph)]
        halves = [w.name for w in weights if w and w.is_initializer() and w.dtype in HALVES and len(w.shape or ()) == 2]
        if halves:
            raise ir.passes.PreconditionError(f"{halves[0]} and {len(halves) - 1} more weights are not fp32")

    def ensures(self, model: ir.Model) -> None:
        """No matrix of a product is left in fp32 but those that are named as kept."""
        left = [node.inputs[1] for node in _products(model.graph) if _is_matrix(node.inputs[1])]
        if names := [str(value.name) for value in left if value and value.name not in self.kept]:
            raise ir.passes.PostconditionError(f"{', '.join(names)} are still fp32")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        require_quantiser()  # before the long work, which is done when the weights are written
        graph = model.graph
        tables = [value for value in graph.initializers.values() if _is_embedding(value)]
        count = sum(self._embedding(graph, table) for table in tables)
        for node in _products(graph):
            if _is_matrix(node.inputs[1]):
                count += self._product(graph, node)
        for name in [name for name, value in graph.initializers.items() if not value.uses()]:
            del graph.initializers[name]
        if count:
            model.opset_imports[MICROSOFT] = 1
        kept = f", kept {', '.join(self.kept)}" if self.kept else ""
        self.note = f"{count} products and lookups in {self.bits} bits{kept}"
        return ir.passes.PassResult(model, count > 0)

    def _embedding(self, graph: ir.Graph, table: ir.Value) -> int:
        """Quantise a table ``[V, D]`` where it is looked up, and where it is transposed and multiplied: a tied head."""
        if _shape(table)[1] % BLOCK_SIZE:
            self.kept.append(str(table.name))
            return 0
        blocks = _Later(table, FRAGILE_BITS, turned=True)
        flat, values, scales = (blocks.constant(graph, part) for part in (ROWS, BLOCKS, SCALES))
        count = 0
        for node, _ in list(table.uses()):
            if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
                fields = {"bits": FRAGILE_BITS, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
                _replace(graph, node, ir.node(LOOKUP, [flat, node.inputs[1], scales], fields, domain=MICROSOFT))
                count += 1
            elif node.op_type == "Transpose":
                for product, place in list(node.outputs[0].uses()):
                    if product.op_type == "MatMul" and place == 1:
                        _replace(graph, product, _nbits(product, blocks, values, scales))
                        count += 1
                if not node.outputs[0].uses():
                    graph.remove(node, safe=True)
        return count

    def _product(self, graph: ir.Graph, node: ir.Node) -> int:
        """Quantise the constant matrix of a linear layer."""
        weight = node.inputs[1]
        assert weight is not None
        if node.op_type == "Gemm" and not _is_plain(node):
            self.kept.append(str(weight.name))
            return 0
        bits = bits_for(_shape(weight), self.bits, is_end=node.outputs[0] in graph.outputs)
        blocks = _Later(weight, bits)
        values, scales = (blocks.constant(graph, part) for part in (BLOCKS, SCALES))
        _replace(graph, node, _nbits(node, blocks, values, scales))
        return 1


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type in ("MatMul", "Gemm") and not node.domain]


class _Later:
    """A matrix that is quantised when the first of its tensors is written; the others wait for their turn."""

    def __init__(self, weight: ir.Value, bits: int, *, turned: bool = False) -> None:
        """Take a matrix ``[K, N]``, or ``[N, K]`` if it is ``turned``."""
        assert weight.const_value is not None
        self.tensor, self.name, self.bits, self.turned = weight.const_value, str(weight.name), bits, turned
        shape = _shape(weight)
        self.num_inputs, self.num_outputs = reversed(shape) if turned else shape
        self.parts: list[str] = []
        self.waiting: dict[str, np.ndarray] = {}

    def constant(self, graph: ir.Graph, part: str) -> ir.Value:
        """A constant of the graph that holds one of the tensors."""
        blocks, size = -(-self.num_inputs // BLOCK_SIZE), BLOCK_SIZE * self.bits // 8
        shape = {
            BLOCKS: [self.num_outputs, blocks, size],
            ROWS: [self.num_outputs, blocks * size],
            SCALES: [self.num_outputs, blocks],
        }[part]
        dtype = ir.DataType.FLOAT if part == SCALES else ir.DataType.UINT8
        self.parts.append(part)
        name = f"{self.name}{part}"

        def compute() -> ir.Tensor:
            return ir.Tensor(self._take(part).reshape(shape), name=name)

        tensor = ir.LazyTensor(compute, dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def _take(self, part: str) -> np.ndarray:
        if part not in self.waiting:
            made = self._quantised()
            self.waiting = {each: made.scales if each == SCALES else made.values for each in self.parts}
        return self.waiting.pop(part)

    def _quantised(self) -> Blocks:
        """All blocks; outputs have nothing to do with each other, so some at a time are copied and rounded."""
        array = self.tensor.numpy()
        matrix = array.T if self.turned else array  # [K, N]
        made = [
            quantise(np.ascontiguousarray(matrix[:, begin : begin + OUTPUTS_AT_A_TIME]), self.bits)
            for begin in range(0, self.num_outputs, OUTPUTS_AT_A_TIME)
        ]
        values, scales = (
            np.concatenate(each) for each in zip(*((part.values, part.scales) for part in made), strict=True)
        )
        return Blocks(self.bits, values, scales, self.num_inputs)


def _nbits(node: ir.Node, blocks: _Later, values: ir.Value, scales: ir.Value) -> ir.Node:
    """The product of ``node``'s first input with a quantised matrix, and its bias where it has one."""
    fields = {
        "K": blocks.num_inputs,
        "N": blocks.num_outputs,
        "bits": blocks.bits,
        "block_size": BLOCK_SIZE,
        "accuracy_level": ACCURACY_LEVEL,
    }
    bias = [None, None, node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    return ir.node(PRODUCT, [node.inputs[0], values, scales, *bias], fields, domain=MICROSOFT)


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put a node of one output in another's place."""
    result, replacement = old.outputs[0], new.outputs[0]
    replacement.name, replacement.shape, replacement.type = result.name, result.shape, result.type
    new.metadata_props.update(old.metadata_props)  # which module it is of
    ir.convenience.replace_all_uses_with(result, replacement, replace_graph_outputs=True)
    graph.insert_before(old, new)
    graph.remove(old, safe=True)


def _shape(value: ir.Value) -> Sequence[int]:
    """The sizes of a constant."""
    assert value.const_value is not None
    return value.const_value.shape.numpy()


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether a value is a constant fp32 matrix with at least a block of inputs."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    tensor = value.const_value
    return tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 and tensor.shape.numpy()[0] >= BLOCK_SIZE


def _is_embedding(value: ir.Value) -> bool:
    """Whether a constant matrix is looked up by rows of an input."""
    return _is_matrix(value) and any(
        node.op_type == "Gather" and place == 0 and node.attributes.get_int("axis", 0) == 0
        for node, place in value.uses()
    )


def _is_plain(gemm: ir.Node) -> bool:
    """Whether a ``Gemm`` is a product and a bias, without factors or transposed matrices."""
    factors = (gemm.attributes.get_float("alpha", 1.0), gemm.attributes.get_float("beta", 1.0))
    transposed = (gemm.attributes.get_int("transA", 0), gemm.attributes.get_int("transB", 0))
    return factors == (1.0, 1.0) and transposed == (0, 0)
