"""Run and read ONNX files in tests, apart from the project's own runners."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor
from transformers import DynamicCache

from trainers.generate import prefill
from trainers.iapt import IAPTGenerator, parameter_shapes

Arrays = dict[str, np.ndarray]


def run_onnx(path: Path | bytes, feeds: Arrays) -> Arrays:
    """Run a graph once with ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def operators(path: Path) -> list[str]:
    """The operators of a graph's nodes, one entry a node."""
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def stacked(generators: list[IAPTGenerator]) -> tuple[Tensor, ...]:
    """The tenants' weights ``[N, ...]`` in the order in which graphs take them."""
    first = generators[0]
    names = parameter_shapes(first.config, first.hidden_size, first.num_layers)
    return tuple(
        torch.stack([dict(module.named_parameters())[name].detach() for module in generators]) for name in names
    )


def stacked_feeds(generators: list[IAPTGenerator]) -> Arrays:
    """The same as named inputs."""
    first = generators[0]
    names = parameter_shapes(first.config, first.hidden_size, first.num_layers)
    return {f"generator.{name}": tensor.numpy() for name, tensor in zip(names, stacked(generators), strict=True)}


def trained_prefill(
    model: object, generators: list[IAPTGenerator], tenants: list[int], ids: Tensor, mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Each row through its own trained generator, alone: logits ``[B, V]``, K, V by layer ``[B, H, P+T, K]``."""
    logits, caches = [], []
    for row, tenant in enumerate(tenants):
        generator = generators[tenant]
        made, cache = prefill(model, generator, generator.config.prompt_length, ids[row : row + 1], mask[row : row + 1])
        logits.append(made)
        caches.append(flat(cache))
    return torch.cat(logits), [torch.cat(parts) for parts in zip(*caches, strict=True)]


def flat(cache: DynamicCache) -> list[Tensor]:
    """Key and value of layer 0, of layer 1, and so on."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def worst(made: object, wanted: object) -> float:
    """Largest difference relative to the largest wanted value."""
    made, wanted = np.asarray(made, np.float64), np.asarray(wanted, np.float64)
    assert made.shape == wanted.shape, (made.shape, wanted.shape)
    assert np.isfinite(made).all()
    return float(np.abs(made - wanted).max() / np.abs(wanted).max())
