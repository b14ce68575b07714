"""Store linear layers' weights the way MatMul reads them."""

from __future__ import annotations

import onnx_ir as ir

TRANSPOSED = ".transposed"
"""Ends the name of a weight that is stored as ``MatMul`` reads it."""


class FoldTransposesPass(ir.passes.InPlacePass):
    """Replace ``Transpose(weight)`` by a weight that is stored transposed, and so for the second input of a ``Gemm``.

    Before: ``MatMul(x, Transpose(w [out, in]))`` or ``Gemm(x, w, c, transB=1)``. After: ``MatMul(x, w.T [in, out])``
    or ``Gemm(x, w.T, c)``.

    Requires: weights are initializers. Ensures: no 2-D initializer is transposed at run time, unless
    it is also used as it is (an embedding tied to the head), where a second copy would cost its memory.
    The new tensor is computed when it is written, so that no copy of the model stays in memory.
    """

    note = ""

    def ensures(self, model: ir.Model) -> None:
        """No weight of one use is transposed at run time."""
        if left := [node.name for node in model.graph if _transposed_weight(node)]:
            raise ir.passes.PostconditionError(f"weights are still transposed by {', '.join(map(str, left))}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = 0
        for node in list(model.graph):
            if not (weight := _transposed_weight(node)):
                continue
            tensor = weight.const_value
            assert tensor is not None
            folded = ir.Value(
                name=f"{weight.name}{TRANSPOSED}",
                shape=ir.Shape(reversed(tensor.shape.numpy())),
                type=ir.TensorType(tensor.dtype),
                const_value=_transposed(tensor, f"{weight.name}{TRANSPOSED}"),
            )
            model.graph.register_initializer(folded)
            if node.op_type == "Gemm":
                node.replace_input_with(1, folded)
                del node.attributes["transB"]
            else:
                node.outputs[0].replace_all_uses_with(folded)
                model.graph.remove(node, safe=True)
            del model.graph.initializers[str(weight.name)]
            count += 1
        self.note = f"{count} weights are stored transposed"
        return ir.passes.PassResult(model, count > 0)


def _transposed_weight(node: ir.Node) -> ir.Value | None:
    """The matrix that a node transposes and that nothing else uses."""
    if node.domain:
        return None
    if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]:
        weight = node.inputs[0]
    elif node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        weight = node.inputs[1]
    else:
        return None
    if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
        return None
    return weight if weight.const_value is not None and len(weight.const_value.shape) == 2 else None


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    shape = ir.Shape(reversed(tensor.shape.numpy()))

    def compute() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().T, dtype=tensor.dtype, name=name)  # who writes or rounds it copies it once

    return ir.LazyTensor(compute, tensor.dtype, shape, name=name)
