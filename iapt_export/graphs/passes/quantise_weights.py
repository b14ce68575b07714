"""Store a backbone's matrices in 4 or 8 bits, for ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from iapt_export.contract.errors import IaptError
from iapt_export.graphs.ops.serving_ops import LOOKUP, MICROSOFT, PRODUCT
from iapt_export.graphs.passes.fold_transposes import TRANSPOSED
from iapt_export.graphs.passes.pack_projections import JOIN
from iapt_export.graphs.weights import WEIGHTS
from trainers.decoder.quantise import ACCURACY_LEVEL, Blocks, quantise, require_quantiser
from trainers.decoder.rounded import Importance, importance_for

BLOCKS, ROWS, SCALES = ".blocks", ".rows", ".scales"
"""Suffixes of a quantised weight's tensors: its values as products take them, as a lookup takes them, its scales."""
OUTPUTS_AT_A_TIME = 512
"""So few that a copy of them stays in the processor's cache while it is transposed: with 4,096 it took 1.5 times as
long."""

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class QuantiseWeightsPass(ir.passes.InPlacePass):
    """Replace products with constant matrices by ``MatMulNBits``, and the embedding by ``GatherBlockQuantized``.

    Which weights, and to how many bits, is `trainers.decoder.rounded.rounded_weights`'s to say, as it is for PyTorch's
    side of the proof: the router of a mixture of experts is a product too, and stays as it is.

    Requires: `FoldTransposesPass`; fp32 weights. Ensures: no weight that has bits is left in fp32, all others are as
    they were, and a matrix that is both embedding and head is stored once.
    """

    def __init__(self, bits: Mapping[str, int], block: int, importance: Importance | None = None) -> None:
        """Take the names of a backbone's weights with the bits of each, how many values share a scale, and how much the
        inputs of weights count, by their names.

        A graph may have some of the weights.
        """
        super().__init__()
        self.bits, self.block, self.importance = bits, block, importance or {}
        self.note = ""

    def requires(self, model: ir.Model) -> None:
        """Weights that have bits are fp32."""
        halves = [str(value.name) for value in self._weights(model.graph) if value.dtype in HALVES]
        if halves:
            raise ir.passes.PreconditionError(f"{halves[0]} and {len(halves) - 1} more weights are not fp32")

    def ensures(self, model: ir.Model) -> None:
        """No weight that has bits is left in fp32."""
        if names := [str(value.name) for value in self._weights(model.graph)]:
            raise ir.passes.PostconditionError(f"{', '.join(names)} are still fp32")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        require_quantiser()  # before the long work, which is done when the weights are written
        graph = model.graph
        counts: Counter[int] = Counter()
        for weight, parts in self._weights(graph).items():
            bits = max(parts.values())
            if min(parts.values()) < bits:
                raise IaptError(
                    f"{' and '.join(parts)} stand in one matrix and would be stored in "
                    f"{' and '.join(map(str, parts.values()))} bits, where 0 means as they are; build for "
                    "onnxruntime:fp32"
                )
            # weights that stand in one matrix have the same inputs
            counts[bits] += _quantise(graph, weight, bits, self.block, importance_for(parts, self.importance))
        for name in [name for name, value in graph.initializers.items() if not value.uses()]:
            del graph.initializers[name]
        if counts:
            model.opset_imports[MICROSOFT] = 1
        done = [f"{count} products and lookups in {bits} bits" for bits, count in sorted(counts.items())]
        self.note = ", ".join(done) or "no weight of the backbone is rounded"
        return ir.passes.PassResult(model, bool(counts))

    def _weights(self, graph: ir.Graph) -> dict[ir.Value, dict[str, int]]:
        """The constants that have bits: the weights that stand in each side by side, and their bits."""
        found = {}
        for name, value in graph.initializers.items():
            if name.endswith((BLOCKS, ROWS, SCALES)):
                continue
            parts = [part.removeprefix(WEIGHTS).removesuffix(TRANSPOSED) for part in name.split(JOIN)]
            found[value] = {part: self.bits.get(part, 0) for part in parts}
        return {value: bits for value, bits in found.items() if any(bits.values())}


def _quantise(graph: ir.Graph, weight: ir.Value, bits: int, block: int, importance: np.ndarray | None) -> int:
    """Put operators that take blocks in the place of all that use a weight.

    Returns:
        How many there are.

    Raises:
        IaptError: another operator uses it, of which there is none that takes blocks.
    """
    rows = any(node.op_type in ("Gather", "Transpose") for node, _ in weight.uses())  # [N, K]: a table, a tied head
    blocks = _Later(weight, bits, block, importance, turned=rows)
    count = 0
    for node, place in list(weight.uses()):
        if rows and node.op_type == "Transpose":
            for product, at in list(node.outputs[0].uses()):
                if _is_product(product, at):
                    _replace(graph, product, _nbits(graph, product, blocks))
                    count += 1
            if not node.outputs[0].uses():
                graph.remove(node, safe=True)
        elif rows and is_lookup(node, place):
            _replace(graph, node, _lookup(graph, node, blocks))
            count += 1
        elif not rows and _is_product(node, place):
            _replace(graph, node, _nbits(graph, node, blocks))
            count += 1
    for node, _ in weight.uses():
        raise IaptError(
            f"{str(weight.name).removeprefix(WEIGHTS)} cannot be stored in {bits} bits: {node.op_type} reads it, and "
            "only products and lookups read blocks; build for onnxruntime:fp32"
        )
    return count


class _Later:
    """A matrix that is quantised when the first of its tensors is written; the others wait for their turn."""

    def __init__(
        self, weight: ir.Value, bits: int, block: int, importance: np.ndarray | None, *, turned: bool = False
    ) -> None:
        """Take a matrix ``[K, N]``, or ``[N, K]`` if it is ``turned``."""
        assert weight.const_value is not None
        self.tensor, self.name, self.turned = weight.const_value, str(weight.name), turned
        self.bits, self.block, self.importance = bits, block, importance
        shape = _shape(weight)
        self.num_inputs, self.num_outputs = reversed(shape) if turned else shape
        self.parts: list[str] = []
        self.waiting: dict[str, np.ndarray] = {}

    def constant(self, graph: ir.Graph, part: str) -> ir.Value:
        """The constant of the graph that holds one of the tensors, made at first."""
        name = f"{self.name}{part}"
        if name in graph.initializers:
            return graph.initializers[name]
        blocks, size = -(-self.num_inputs // self.block), self.block * self.bits // 8
        shape = {
            BLOCKS: [self.num_outputs, blocks, size],
            ROWS: [self.num_outputs, blocks * size],
            SCALES: [self.num_outputs, blocks],
        }[part]
        dtype = ir.DataType.FLOAT if part == SCALES else ir.DataType.UINT8
        self.parts.append(part)

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
            quantise(np.ascontiguousarray(part), self.bits, self.block, self.importance)
            for part in np.split(matrix, range(OUTPUTS_AT_A_TIME, self.num_outputs, OUTPUTS_AT_A_TIME), axis=1)
        ]
        values, scales = (
            np.concatenate(each) for each in zip(*((part.values, part.scales) for part in made), strict=True)
        )
        return Blocks(self.bits, values, scales, self.num_inputs)


def _nbits(graph: ir.Graph, node: ir.Node, blocks: _Later) -> ir.Node:
    """The product of ``node``'s first input with a quantised matrix, and its bias where it has one."""
    fields = {
        "K": blocks.num_inputs,
        "N": blocks.num_outputs,
        "bits": blocks.bits,
        "block_size": blocks.block,
        "accuracy_level": ACCURACY_LEVEL,
    }
    values, scales = blocks.constant(graph, BLOCKS), blocks.constant(graph, SCALES)
    bias = [None, None, node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    return ir.node(PRODUCT, [node.inputs[0], values, scales, *bias], fields, domain=MICROSOFT)


def _lookup(graph: ir.Graph, node: ir.Node, blocks: _Later) -> ir.Node:
    """The rows of a quantised table that ``node`` gathers."""
    fields = {"bits": blocks.bits, "block_size": blocks.block, "gather_axis": 0, "quantize_axis": 1}
    flat, scales = blocks.constant(graph, ROWS), blocks.constant(graph, SCALES)
    return ir.node(LOOKUP, [flat, node.inputs[1], scales], fields, domain=MICROSOFT)


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


def is_lookup(node: ir.Node, place: int) -> bool:
    """Whether a node takes rows of the matrix that is its input of that place."""
    return node.op_type == "Gather" and not node.domain and place == 0 and node.attributes.get_int("axis", 0) == 0


def _is_product(node: ir.Node, place: int) -> bool:
    """Whether a node multiplies with the matrix that is its input of that place, without factors or transposing."""
    if node.domain or place != 1:
        return False
    factors = (node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0))
    transposed = (node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0))
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and factors == (1.0, 1.0) and transposed == (0, 0))
