"""Write the graphs of a bundle; weights that several graphs use are stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from iapt_export.contract.errors import IaptError

WEIGHTS_FILE = "weights.data"
INLINE_BYTES = 1024
"""Tensors up to this size stay inside the graph's file, where shape inference needs them."""
ALIGNMENT = 4096
"""Offsets are multiples of this, so that runtimes can map the file instead of reading it."""


def save_graphs(models: dict[str, ir.Model], folder: Path, on_tensor: Callable[[int], None] = lambda _: None) -> None:
    """Write ``NAME.onnx`` for each model, and ``weights.data`` with every distinct large tensor once.

    Tensors are told apart by their bytes, so a weight that prefill and decode both use occupies the disk
    once, whatever the exporter called it and whatever shape a node sees it in. One tensor at a time is in memory.

    Args:
        models: graph name to model.
        folder: an existing folder.
        on_tensor: called with the bytes of each tensor written, for progress.

    Raises:
        IaptError: a saved graph does not pass ``onnx.checker`` or shape inference.
    """
    places: dict[bytes, tuple[int, int]] = {}
    with (folder / WEIGHTS_FILE).open("wb") as stream:
        for model in models.values():
            for name, value in sorted(model.graph.initializers.items()):
                tensor = value.const_value
                if tensor is None or tensor.nbytes <= INLINE_BYTES:
                    continue
                data = _bytes_of(tensor)
                shape = tuple(tensor.shape.numpy())
                key = hashlib.sha256(data).digest()
                if key not in places:
                    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
                    places[key] = (stream.tell(), len(data))
                    stream.write(data)
                    on_tensor(len(data))
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS_FILE, offset, length, tensor.dtype, shape=ir.Shape(shape), name=name, base_dir=folder
                )
    for name, model in models.items():
        _save_graph(model, folder / f"{name}.onnx")


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """As they are stored: without a copy, but for several values a byte."""
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def _save_graph(model: ir.Model, path: Path) -> None:
    model.producer_name = "iapt-export"
    model.producer_version = None
    ir.save(model, path)
    try:
        onnx.checker.check_model(path, full_check=False)
        inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise IaptError(f"{path.name} does not pass onnx's own checks: {error}") from error
    del inferred
