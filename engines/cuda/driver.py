"""Ask the NVIDIA driver which GPUs there are, through ctypes: works without any CUDA package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# CUdevice_attribute in cuda.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    compute_capability: str
    """For example ``8.9``."""
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """What the driver answered."""

    gpus: tuple[Gpu, ...] = ()
    cuda_version: str = ""
    """Newest CUDA that the driver serves, for example ``13.0``; empty without a driver."""
    problem: str = ""
    """Why no GPU can be used; empty when one can."""


def find_driver() -> Driver:
    """Load the driver's library and list its GPUs. Never raises: what is wrong stands in ``problem``."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError:
        return Driver(problem=f"no NVIDIA driver found: {LIBRARY} is missing")
    status = cuda.cuInit(0)
    if status:
        return Driver(problem=f"the NVIDIA driver does not start: cuInit gives error {status}; see nvidia-smi")
    version = _integer(cuda, "cuDriverGetVersion")
    gpus = tuple(_gpu(cuda, index) for index in range(_integer(cuda, "cuDeviceGetCount")))
    return Driver(
        gpus=gpus,
        cuda_version=f"{version // 1000}.{version % 1000 // 10}",
        problem="" if gpus else "the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi",
    )


def _gpu(cuda: Any, index: int) -> Gpu:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major = _integer(cuda, "cuDeviceGetAttribute", _CAPABILITY_MAJOR, device)
    minor = _integer(cuda, "cuDeviceGetAttribute", _CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}", memory.value)


def _integer(cuda: Any, function: str, *arguments: Any) -> int:
    """Call a driver function whose first parameter receives an int."""
    result = ctypes.c_int()
    getattr(cuda, function)(ctypes.byref(result), *arguments)
    return result.value
