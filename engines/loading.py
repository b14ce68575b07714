"""Open what a bundle's manifest names: the runners of a target and the tenants' stacked weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from engines.runner import NUMPY_TYPES, Arrays, Runner
from iapt_export.errors import BundleError
from iapt_export.manifest import WEIGHT_PREFIX, BundleManifest, TargetSpec


def open_runners(bundle: Path, target: TargetSpec, *, device: str = "cpu") -> dict[str, Runner]:
    """A runner for each graph of a target, not yet active.

    Args:
        bundle: the bundle's folder.
        target: one of its targets.
        device: ``cpu`` or ``cuda``, for ONNX Runtime; TensorRT always runs on the GPU.
    """
    if target.name == "onnxruntime":
        from engines.onnxruntime_runner import OnnxRuntimeRunner

        return {
            name: OnnxRuntimeRunner(bundle / spec.path, spec, device=device) for name, spec in target.graphs.items()
        }
    from engines.tensorrt_runner import TensorRTRunner

    return {name: TensorRTRunner(bundle / spec.path, spec, target.name) for name, spec in target.graphs.items()}


def load_tenants(bundle: Path, manifest: BundleManifest, target: TargetSpec) -> Arrays:
    """The weights of all tenants, stacked in the manifest's order.

    Returns:
        ``generator.NAME`` to ``[N, ...]`` in the type that the target's prefill graph takes.

    Raises:
        BundleError: a tenant's file is missing, no safetensors, or not what the contract asks for.
    """
    files = [_load_tenant(bundle, manifest, index) for index in range(len(manifest.tenants))]
    types = {tensor.name: NUMPY_TYPES[tensor.dtype] for tensor in target.graphs["prefill"].inputs}
    return {
        WEIGHT_PREFIX + weight.name: _cast(
            np.stack([file[weight.name] for file in files]), types[WEIGHT_PREFIX + weight.name]
        )
        for weight in manifest.generator.weights
    }


def _load_tenant(bundle: Path, manifest: BundleManifest, index: int) -> Arrays:
    tenant = manifest.tenants[index]
    try:
        tensors = load_file(bundle / tenant.path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"tenant {tenant.name}: {tenant.path} is not a whole safetensors file ({error})") from error
    for weight in manifest.generator.weights:
        found = tensors.get(weight.name)
        if found is None or list(found.shape) != weight.shape:
            came = "nothing" if found is None else f"shape {list(found.shape)}"
            raise BundleError(f"tenant {tenant.name}: {weight.name} has {came}, the bundle expects {weight.shape}")
        if not np.isfinite(found).all():
            raise BundleError(f"tenant {tenant.name}: {weight.name} holds NaN or infinity; train the adapter again")
    return tensors


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)
