"""Keep queries, keys and values as ``[B, T, heads K]``, which is how ONNX Runtime's attention takes them."""

from __future__ import annotations

import onnx_ir as ir

HEADS_FIRST = [0, 2, 1, 3]
"""``[B, T, heads, K]`` to ``[B, heads, T, K]``, and back."""


class FlattenHeadsPass(ir.passes.InPlacePass):
    """Remove the transpositions to heads first and back again that surround ``GroupQueryAttention``.

    Before: ``Reshape -> Transpose -> [RotaryEmbedding ->] Transpose -> Reshape``. After: the rotary embedding on
    ``[B, T, heads K]``, which the standard operator allows, or nothing.

    Requires: inferred shapes. Ensures: no two transpositions undo each other; no reshape gives back what an earlier
    one was given. A reshape that feeds a normalisation of each head stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for node in list(model.graph):
            # a rewritten node may match another rule
            while _flatten_rotary(model.graph, node) or _drop_inverse(node) or _drop_round_trip(node):
                changed = True
        return ir.passes.PassResult(model, changed)


def _flatten_rotary(graph: ir.Graph, flat: ir.Node) -> bool:
    """``Reshape(Transpose(RotaryEmbedding(Transpose(x))))`` becomes ``RotaryEmbedding(Reshape(x))``."""
    back = maker(flat, 0, "Reshape", "Transpose")
    rotary = back and maker(back, 0, "Transpose", "RotaryEmbedding")
    front = rotary and maker(rotary, 0, "RotaryEmbedding", "Transpose")
    if not (back and rotary and front and _moves_heads(back) and _moves_heads(front)):
        return False
    if not flat.outputs[0].uses() or len(rotary.inputs) != 3 or not _is_flat(flat.outputs[0], back.outputs[0]):
        return False
    source, result = front.inputs[0], flat.outputs[0]
    reshape = ir.node("Reshape", [source, flat.inputs[1]], attributes=dict(flat.attributes))
    rotated = ir.node("RotaryEmbedding", [reshape.outputs[0], *rotary.inputs[1:]], attributes=dict(rotary.attributes))
    for value in (reshape.outputs[0], rotated.outputs[0]):
        value.shape, value.type = result.shape, result.type
    rotated.outputs[0].name = f"{result.name}_rotated"
    reshape.outputs[0].name = f"{result.name}_flat"
    graph.insert_before(flat, [reshape, rotated])
    result.replace_all_uses_with(rotated.outputs[0])
    _drop_round_trip(reshape)
    return True


def _drop_inverse(node: ir.Node) -> bool:
    """``Transpose(Transpose(x))`` becomes ``x`` where the second undoes the first."""
    first = maker(node, 0, "Transpose", "Transpose")
    if not first or not node.outputs[0].uses():
        return False
    order, then = (list(each.attributes.get_ints("perm", [])) for each in (first, node))
    if not order or [order[axis] for axis in then] != list(range(len(order))):
        return False
    return _replace(node.outputs[0], first.inputs[0])


def _drop_round_trip(node: ir.Node) -> bool:
    """``Reshape(Reshape(x))`` becomes ``x`` where it has the shape of ``x`` again."""
    first = maker(node, 0, "Reshape", "Reshape")
    if not first or not node.outputs[0].uses() or first.inputs[0] is None:
        return False
    if not same_sizes(first.inputs[0].shape, node.outputs[0].shape):
        return False
    return _replace(node.outputs[0], first.inputs[0])


def maker(node: ir.Node, place: int, own: str, wanted: str) -> ir.Node | None:
    """The node that makes an input of ``node``, if the two are of these operators."""
    if node.op_type != own or node.domain or node.inputs[place] is None:
        return None
    producer = node.inputs[place].producer()  # type: ignore[union-attr]
    return producer if producer is not None and producer.op_type == wanted and not producer.domain else None


def same_sizes(left: ir.Shape | None, right: ir.Shape | None) -> bool:
    """Whether two shapes are known to be equal."""
    if left is None or right is None or len(left) != len(right):
        return False
    unknown = any(isinstance(size, ir.SymbolicDim) and size.value is None for size in [*left, *right])
    return not unknown and list(left) == list(right)


def _moves_heads(node: ir.Node) -> bool:
    return list(node.attributes.get_ints("perm", [])) == HEADS_FIRST


def _is_flat(flat: ir.Value, heads: ir.Value) -> bool:
    """Whether ``flat [B, T, heads K]`` has the sizes of ``heads [B, T, heads, K]``."""
    if flat.shape is None or heads.shape is None or len(flat.shape) != 3 or len(heads.shape) != 4:
        return False
    count, width = heads.shape[2], heads.shape[3]
    if not isinstance(count, int) or not isinstance(width, int):
        return False
    return same_sizes(flat.shape, ir.Shape([heads.shape[0], heads.shape[1], count * width]))


def _replace(value: ir.Value, by: ir.Value | None) -> bool:
    assert by is not None
    value.replace_all_uses_with(by)
    return True
