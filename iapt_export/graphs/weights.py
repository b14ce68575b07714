"""The backbone's weights in a graph: each is read from its file when it is written, transposed or quantised."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch._subclasses.fake_tensor import FakeTensor

from trainers.decoder.stored import stored_weight

WEIGHTS = "backbone."
"""Names of the backbone's parameters and buffers begin with it: twins hold it under this name."""


def weight_tensor(backbone: Any, name: str) -> ir.TensorProtocol:
    """The values of a graph's weight, by its name there.

    Args:
        backbone: the transformers model, also an outline of `trainers.decoder.stored`.
        name: begins with `WEIGHTS`.
    """
    path = name.removeprefix(WEIGHTS)
    owner, _, own = path.rpartition(".")
    tensor = getattr(backbone.get_submodule(owner), own)
    if not isinstance(tensor, FakeTensor):
        return TorchTensor(tensor.detach(), name=name)

    def read() -> ir.TensorProtocol:
        return TorchTensor(stored_weight(backbone, path), name=name)

    return ir.LazyTensor(read, from_torch_dtype(tensor.dtype), ir.Shape(tensor.shape), name=name)


def fill_in(model: ir.Model, backbone: Any) -> None:
    """Give the weights of a traced outline their values, unread; those of any other backbone have them."""
    for name, value in model.graph.initializers.items():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = weight_tensor(backbone, name)
