"""Run and read ONNX files in tests, apart from the project's own runners."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import DynamicCache

from iapt_export.building.layout import engine_graphs, with_files
from iapt_export.contract.manifest import BundleManifest, GraphSpec
from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.installed import Installed, installed_from_manifest
from iapt_export.graphs.table import graph_specs
from tests.bundles import METHOD, SIZES, TinyBuild, random_method
from tests.traces import run_folder
from trainers.decoder.backbone import load_backbone
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.generate import prefill
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import Method, rows_of
from trainers.methods.configs import method_name

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


def installed(config: Any = METHOD, sizes: Sizes = SIZES) -> list[Installed]:
    """A bundle of one method; its weights do not count."""
    return [Installed(method_name(config).lower(), random_method(0, config, sizes))]


def specs_for(
    model: Any, methods: list[Installed], dtype: str = "fp32", capacity: int | None = None
) -> dict[str, GraphSpec]:
    """The interfaces of the graphs of a backbone with these methods."""
    return graph_specs(methods, sizes_of(model), dtype, capacity)


def with_engine_graphs(source: Path, copy: Path, model: Any) -> Path:
    """A copy of a bundle for ONNX Runtime whose target has the graphs of TensorRT's engines, and no others."""
    shutil.copytree(source, copy)
    manifest = BundleManifest.load(copy)
    methods, capacity = installed_from_manifest(manifest, model), manifest.ranges.past.max
    specs = specs_for(model, methods, capacity=capacity)
    names = tuple(name for name in specs if name in engine_graphs(specs))
    folder = copy / "graphs"
    folder.mkdir()
    export_graphs(model, methods, folder, dtype="fp32", opset=23, names=names, serving=Serving(capacity=capacity))
    graphs = {name: dataclasses.replace(specs[name], path=f"graphs/{name}.onnx") for name in names}
    target = dataclasses.replace(manifest.target(), graphs=graphs)
    with_files(dataclasses.replace(manifest, targets=[target]), copy).save(copy)
    return copy


@pytest.fixture(scope="session")
def engine_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> Path:
    """`with_engine_graphs` of the tiny bundle, made once a run; read only."""
    folder = run_folder(tmp_path_factory) / "engine-bundle"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            with_engine_graphs(tiny_build.bundle, folder, load_backbone(str(tiny_build.model)).model)
    return folder


def stacked_feeds(tenants: Sequence[Method], name: str = "iapt") -> Arrays:
    """The tenants' weights as named inputs ``NAME.TENSOR [N, ...]``."""
    return {
        f"{name}.{tensor}": torch.stack([tenant.get_parameter(tensor).detach() for tenant in tenants]).numpy()
        for tensor, _ in tenants[0].named_parameters()
    }


def iapt_feeds(tenants: Sequence[Method], index: list[int]) -> Arrays:
    """All that IAPT's graphs take of the tenants: whose row each is, and everybody's weights."""
    return {"iapt.tenant_index": np.array(index, np.int64), **stacked_feeds(tenants)}


def rest(spec: GraphSpec, feeds: Arrays) -> tuple[Tensor, ...]:
    """What a twin takes as one tuple: the inputs with a dot in their names, in the interface's order."""
    return tuple(torch.from_numpy(feeds[tensor.name]) for tensor in spec.inputs if "." in tensor.name)


def past_feeds(cache: DynamicCache) -> Arrays:
    """A PyTorch cache as ``past_key_values.N.*``."""
    pairs = [(layer, part) for layer in range(len(cache.layers)) for part in ("key", "value")]
    return {
        f"past_key_values.{layer}.{part}": tensor.numpy()
        for (layer, part), tensor in zip(pairs, flat(cache), strict=True)
    }


def trained_prefill(
    model: Any, tenants: Sequence[Method], index: list[int], ids: Tensor, mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Each row through its own trained method, alone: logits ``[B, V]``, K, V by layer ``[B, H, P+T, K]``."""
    logits, caches = [], []
    for row, tenant in enumerate(index):
        made, cache = prefill(model, rows_of(tenants[tenant]), ids[row : row + 1], mask[row : row + 1])
        logits.append(made)
        caches.append(flat(cache))
    return torch.cat(logits), [torch.cat(parts) for parts in zip(*caches, strict=True)]


def trained_prompt(tenant: Method, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
    """The prompts ``[B, P, D]`` that a trained method puts before a layer, made of ``hidden [B, T, D]``."""
    empty = hidden.new_zeros(len(hidden), tenant.num_slots, hidden.shape[-1])
    return tenant.slots(tenant.weights(), layer, empty, hidden, mask)


def flat(cache: DynamicCache) -> list[Tensor]:
    """Key and value of layer 0, of layer 1, and so on."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def worst(made: object, wanted: object) -> float:
    """Largest difference relative to the largest wanted value."""
    made, wanted = np.asarray(made, np.float64), np.asarray(wanted, np.float64)
    assert made.shape == wanted.shape, (made.shape, wanted.shape)
    assert np.isfinite(made).all()
    return float(np.abs(made - wanted).max() / np.abs(wanted).max())
