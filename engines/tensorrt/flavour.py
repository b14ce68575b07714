"""The two TensorRTs behind one API: what each is called, what it can do, and what it accepts.

``tensorrt-rtx`` builds engines ahead of time on any machine, even without a GPU, and compiles kernels
when they first run; ``tensorrt`` measures kernels on the GPU that it builds for. Their Python modules
have nearly the same API, so one builder and one runner serve both.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.types import FLOATS, OPSETS

BLOCKED_OPSET = 21
"""The first whose ``DequantizeLinear`` takes a scale for each block."""
PORTABLE = "portable"
"""Compute capability of an engine that runs on every GPU of `Flavour.portable`."""


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRTs."""

    target: str
    module: str
    extra: str
    """The extra of this project that installs it."""
    compute_capabilities: tuple[str, ...]
    """GPUs that it runs on."""
    portable: tuple[str, ...]
    """GPUs that a portable engine runs on; empty where there is no such engine."""
    builds_without_gpu: bool
    """Builds for a chosen compute capability on any machine."""
    plugins: bool
    refit: bool
    timing_cache: bool
    version_compatible: bool
    hardware_compatibility: bool
    driver: str
    """Oldest NVIDIA driver branch for its CUDA 13 packages."""
    weights: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Type of stored weights, beside those that a backbone computes in, to the GPUs that have it."""


RTX = Flavour(
    target="tensorrt-rtx",
    module="tensorrt_rtx",
    extra="tensorrt-rtx",
    compute_capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    # 7.5 lacks kernels that the others have, so an engine for it must be asked for by name
    portable=("8.0", "8.6", "8.9", "12.0", "12.1"),
    builds_without_gpu=True,
    plugins=False,
    refit=False,
    timing_cache=False,
    version_compatible=False,
    hardware_compatibility=False,
    driver="580",
    # as its builder says for each GPU alone: "model contains HW-specific datatypes"
    weights={
        "int8": ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        "int4": ("8.0", "8.6", "8.9", "12.0", "12.1"),
        "fp8": ("8.9", "12.0", "12.1"),
        "nvfp4": ("12.0", "12.1"),
    },
)
DATACENTRE = Flavour(
    target="tensorrt",
    module="tensorrt",
    extra="tensorrt",
    compute_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"),
    portable=(),
    builds_without_gpu=False,
    plugins=True,
    refit=True,
    timing_cache=True,
    version_compatible=True,
    hardware_compatibility=True,
    driver="580",
)


def flavour(target: str) -> Flavour:
    """The flavour of a target's name.

    Raises:
        IaptError: no TensorRT target has that name.
    """
    for candidate in (RTX, DATACENTRE):
        if candidate.target == target:
            return candidate
    raise IaptError(f"target {target!r} is no TensorRT target; expected {RTX.target} or {DATACENTRE.target}")


def load_tensorrt(target: str) -> Any:
    """Import the target's Python module.

    Raises:
        NotRunnableError: it is not installed, or its libraries do not load.
    """
    wanted = flavour(target)
    try:
        return importlib.import_module(wanted.module)
    except ImportError as error:
        if getattr(error, "name", None) == wanted.module:
            raise NotRunnableError(
                f"{target} is not installed (no Python module {wanted.module}); try: pip install -e '.[{wanted.extra}]'"
            ) from error
        raise _broken(wanted, error) from error
    except (OSError, RuntimeError) as error:
        raise _broken(wanted, error) from error


def _broken(wanted: Flavour, error: Exception) -> NotRunnableError:
    return NotRunnableError(
        f"{wanted.target} is installed but does not load: {error}; "
        f"try: pip install --force-reinstall -e '.[{wanted.extra}]'"
    )


def runtime_version(target: str) -> str:
    """Version of the installed runtime, for example ``1.7.1.116``; raises as `load_tensorrt`."""
    return str(load_tensorrt(target).__version__)


def check_target(target: str, dtype: str, opset: int = 23, compute_capability: str | None = None) -> None:
    """Refuse what cannot be built, before any long work.

    Args:
        target: ``tensorrt-rtx`` or ``tensorrt``.
        dtype: ``fp32``, ``fp16``, ``bf16``, or one of `Flavour.weights`.
        opset: of the ONNX graph.
        compute_capability: ``8.9``, ``portable``, or None for the target's default.

    Raises:
        IaptError: with every problem listed.
    """
    chosen = flavour(target)
    problems = []
    if dtype not in (*FLOATS, *chosen.weights):
        problems.append(f"dtype {dtype!r} is not supported; use {', '.join((*FLOATS, *chosen.weights))}")
    if opset not in OPSETS:
        problems.append(f"opset {opset} is not supported; use {' or '.join(map(str, OPSETS))}")
    problems += _capability_problems(chosen, compute_capability)
    if compute_capability == "7.5" and dtype in ("fp32", "bf16"):
        problems.append(f"GPUs of compute capability 7.5 have no {dtype} matrix kernels here; use fp16")
    problems += [] if problems else _weight_problems(chosen, dtype, opset, compute_capability)
    if problems:
        raise IaptError(f"target {target}: " + "; ".join(problems))


def _weight_problems(chosen: Flavour, dtype: str, opset: int, compute_capability: str | None) -> list[str]:
    """Why weights cannot be stored in a type for these GPUs."""
    able = chosen.weights.get(dtype)
    if able is None:
        return []
    problems = []
    if opset < BLOCKED_OPSET:
        problems.append(f"{dtype} weights need DequantizeLinear with blocks, which opset {opset} lacks; use opset 23")
    wanted = chosen.portable if compute_capability in (None, PORTABLE) else (str(compute_capability),)
    lacking = [capability for capability in wanted if capability not in able]
    if lacking:
        problems.append(
            f"GPUs of compute capability {', '.join(lacking)} have no {dtype} weights; "
            f"choose one of {', '.join(able)} with --compute-capability, or use fp16"
        )
    return problems


def check_compute_capability(target: str, compute_capability: str | None) -> None:
    """Refuse a GPU that the target cannot build for.

    Raises:
        IaptError: the target does not serve it, or does not let it be chosen.
    """
    problems = _capability_problems(flavour(target), compute_capability)
    if problems:
        raise IaptError(f"target {target}: {problems[0]}")


def _capability_problems(chosen: Flavour, compute_capability: str | None) -> list[str]:
    if compute_capability is None:
        return []
    if not chosen.builds_without_gpu:
        return [
            f"compute capability {compute_capability!r} cannot be chosen: {chosen.target} builds for the GPU of the "
            "machine it runs on; leave it out, and see the hardware compatibility option for other GPUs"
        ]
    if compute_capability == PORTABLE or compute_capability in chosen.compute_capabilities:
        return []
    known = ", ".join(chosen.compute_capabilities)
    problem = f"compute capability {compute_capability!r} is not supported; use {PORTABLE} or one of {known}"
    if compute_capability in DATACENTRE.compute_capabilities:
        problem += f"; GPUs of {compute_capability} need the target {DATACENTRE.target}"
    return [problem]
