"""Give stray bfloat16 arithmetic to kernels that every runtime has."""

from __future__ import annotations

import onnx_ir as ir

from iapt_export.contract.manifest import GraphSpec

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Sqrt")
BFLOAT16 = ir.DataType.BFLOAT16


class WidenBfloat16Pass(ir.passes.InPlacePass):
    """Compute in fp32 and round what a graph of another type computes in bfloat16.

    transformers computes Falcon's ALiBi so, whatever the model's type, and ONNX Runtime has no such kernels on a CPU.
    fp32 has more than twice the digits of bfloat16, so that its rounded result is that of bfloat16 itself.

    Requires: inferred types. Ensures: no ``Add``, ``Sub``, ``Mul``, ``Div`` or ``Sqrt`` gives bfloat16, but in a graph
    whose inputs or outputs are bfloat16.
    """

    note = ""

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__()
        self._wanted = any(tensor.dtype == "bf16" for tensor in (*spec.inputs, *spec.outputs))

    def ensures(self, model: ir.Model) -> None:
        """Nothing narrow is left."""
        if left := [str(node.name) for node in self._narrow(model)]:
            raise ir.passes.PostconditionError(f"computed in bfloat16: {', '.join(left)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        narrow = self._narrow(model)
        for node in narrow:
            _widen(node)
        self.note = f"{len(narrow)} operators of bfloat16 are computed in fp32 and rounded" if narrow else ""
        return ir.passes.PassResult(model, bool(narrow))

    def _narrow(self, model: ir.Model) -> list[ir.Node]:
        if self._wanted:
            return []
        nodes = (node for node in model.graph.all_nodes() if not node.domain and node.op_type in ARITHMETIC)
        return [node for node in nodes if node.outputs[0].dtype == BFLOAT16]


def _widen(node: ir.Node) -> None:
    assert node.graph is not None
    result = node.outputs[0]
    wide = [ir.node("Cast", [value], {"to": ir.DataType.FLOAT}) for value in node.inputs]
    computed = ir.node(node.op_type, [cast.outputs[0] for cast in wide], dict(node.attributes))
    rounded = ir.node("Cast", [computed.outputs[0]], {"to": BFLOAT16})
    for made in (*wide, computed, rounded):
        made.metadata_props.update(node.metadata_props)
    for value, source in zip(wide, node.inputs, strict=True):
        assert source is not None
        value.outputs[0].dtype, value.outputs[0].shape = ir.DataType.FLOAT, source.shape
    computed.outputs[0].dtype, computed.outputs[0].shape = ir.DataType.FLOAT, result.shape
    rounded.outputs[0].dtype, rounded.outputs[0].shape = BFLOAT16, result.shape
    node.graph.insert_before(node, [*wide, computed, rounded])
    ir.convenience.replace_all_uses_with(result, rounded.outputs[0], replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
