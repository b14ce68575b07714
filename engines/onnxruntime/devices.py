"""What ONNX Runtime needs of a machine to run on a device, and what it is told there."""

from __future__ import annotations

import os
from typing import Any

from engines.cuda.libraries import cuda_major, load_libraries
from iapt_export.contract.errors import NotRunnableError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
"""On a GPU fp32 is fp32: by default products would be of TF32, which has ten bits of fraction."""
ERRORS = 3
"""Of ONNX Runtime's log: no warnings, on which nobody who serves could act."""
FAULTY_VERSIONS = {
    "1.23.0": "its Attention-23 is wrong where several query heads share a key head (logits off by 0.84 of the largest)"
}
"""Releases of ONNX Runtime that compute something else without a word."""
ROUNDED_CACHE = (1, 27)
"""The first release whose attention computes over a cache in 8 bits on a CPU: 1.24.4 does not load such a graph, 1.25.0
to 1.26.0 load it and fail at the first step; see findings/onnxruntime-loads-a-cache-that-it-cannot-run.sh."""


def load_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        NotRunnableError: it is not installed, or a release that is known to compute wrongly.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise NotRunnableError("ONNX Runtime is not installed; try: pip install onnxruntime") from error
    if reason := FAULTY_VERSIONS.get(onnxruntime.__version__):
        raise NotRunnableError(
            f"ONNX Runtime {onnxruntime.__version__} gives wrong answers: {reason}; "
            "expected 1.23.1 or newer: pip install --upgrade onnxruntime"
        )
    onnxruntime.set_default_logger_severity(ERRORS)
    if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":  # too late where an application has loaded it before us
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def require_device(device: str) -> Any:
    """Refuse, before any work, a device that this ONNX Runtime does not run on; returns the module.

    Raises:
        NotRunnableError: ONNX Runtime is missing, or lacks the device's provider.
    """
    onnxruntime = load_onnxruntime()
    available = onnxruntime.get_available_providers()
    if PROVIDERS.get(device) not in available:
        raise NotRunnableError(
            f"device {device!r} is not available: this ONNX Runtime offers {', '.join(available)}; "
            "use --device cpu, or install onnxruntime-gpu on a machine with an NVIDIA GPU"
        )
    return onnxruntime


def require_rounded_cache() -> None:
    """Refuse, before any work, a cache in 8 bits where this ONNX Runtime computes over none.

    Raises:
        NotRunnableError: ONNX Runtime is missing, or older than the first that does.
    """
    version, first = str(load_onnxruntime().__version__), ".".join(map(str, ROUNDED_CACHE))
    if tuple(map(int, version.split(".")[:2])) < ROUNDED_CACHE:
        raise NotRunnableError(
            f"a cache in 8 bits needs ONNX Runtime {first} or newer, and this is {version}; pip install --upgrade "
            "onnxruntime, or build without cache=8"
        )


def check_provider(session: Any, device: str) -> None:
    """Refuse a session that fell back to the CPU, which ONNX Runtime does with no more than a line in its log.

    Raises:
        NotRunnableError: the provider did not load.
    """
    if PROVIDERS[device] not in session.get_providers():
        raise NotRunnableError(
            f"ONNX Runtime's {PROVIDERS[device]} does not load here and it would run on the CPU instead: the GPU's "
            "driver, or a library of CUDA or cuDNN, is missing; 'iapt-export doctor' says which"
        )


def preload_cuda(onnxruntime: Any) -> None:
    """Load CUDA's and cuDNN's libraries from NVIDIA's Python packages, where they are installed as such."""
    load_libraries(cuda_major(onnxruntime.__path__))
