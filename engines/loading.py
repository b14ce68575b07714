"""Open what a bundle's manifest names: the runners of a target and the tenants' stacked weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from engines.runner import NUMPY_TYPES, Arrays, Runner
from iapt_export.errors import BundleError
from iapt_export.manifest import BundleManifest, MethodSpec, TargetSpec, TenantSpec


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
    """The weights of all tenants, stacked by method in the manifest's order.

    Returns:
        ``METHOD.TENSOR`` to ``[N, ...]`` in the type that the target's graphs take.

    Raises:
        BundleError: a tenant's file is missing, no safetensors, or not what the contract asks for.
    """
    types = {tensor.name: tensor.dtype for graph in target.graphs.values() for tensor in graph.inputs}
    stacks: Arrays = {}
    for method in manifest.methods:
        files = [_load_tenant(bundle, tenant, method) for tenant in manifest.tenants_of(method.name)]
        for weight in method.weights:
            name = f"{method.name}.{weight.name}"
            stacks[name] = cast(np.stack([file[weight.name] for file in files]), types[name])
            if not np.isfinite(stacks[name].astype(np.float32)).all():
                raise BundleError(
                    f"method {method.name}: a tenant's {weight.name} has numbers too large for {types[name]}; "
                    "build for fp32 or bf16"
                )
    return stacks


def _load_tenant(bundle: Path, tenant: TenantSpec, method: MethodSpec) -> Arrays:
    if tenant.path is None:
        raise BundleError(f"tenant {tenant.name} is of method {method.name} but names no weights file")
    try:
        tensors = load_file(bundle / tenant.path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"tenant {tenant.name}: {tenant.path} is not a whole safetensors file ({error})") from error
    for weight in method.weights:
        found = tensors.get(weight.name)
        if found is None or list(found.shape) != weight.shape:
            came = "nothing" if found is None else f"shape {list(found.shape)}"
            raise BundleError(f"tenant {tenant.name}: {weight.name} has {came}, the bundle expects {weight.shape}")
        if not np.isfinite(found).all():
            raise BundleError(f"tenant {tenant.name}: {weight.name} holds NaN or infinity; train the adapter again")
    return tensors


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in a manifest's type, such as ``fp16``."""
    if dtype == "bf16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):  # callers look for infinities
        return array.astype(NUMPY_TYPES[dtype])
