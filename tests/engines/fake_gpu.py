"""Stand-ins for a GPU: CUDA's runtime API over the host's memory, and a TensorRT whose engine computes in NumPy.

They keep the real ones' manners: addresses are numbers, calls return a status first, shapes are unknown
until the inputs' are set.
"""

from __future__ import annotations

import ctypes
import enum
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines.cuda import memory as cuda_memory
from engines.runner import numpy_type
from iapt_export.contract.manifest import GraphSpec, TensorSpec


class Status(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815  (CUDA's names)
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInvalidDevice = 101  # noqa: N815


class FakeCuda:
    """`cuda.bindings.runtime`: "device" memory is host memory, and every allocation is counted."""

    cudaMemcpyKind = types.SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        self.memory_bytes = memory_bytes
        self.live: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams = 0
        self.allocations = 0
        self.uploads = 0

    def cudaSetDevice(self, device: int) -> tuple[Status]:  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaStreamCreate(self) -> tuple[Status, int]:  # noqa: N802
        self.streams += 1
        return Status.cudaSuccess, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:  # noqa: N802
        self.streams -= 1
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:  # noqa: N802
        if size > self.memory_bytes:
            return Status.cudaErrorMemoryAllocation, 0
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        self.live[address] = buffer
        self.allocations += 1
        return Status.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[Status]:  # noqa: N802
        del self.live[address]
        return (Status.cudaSuccess,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Status, int]:  # noqa: N802
        status, address = self.cudaMalloc(size)
        if not status:
            self.pinned[address] = self.live.pop(address)
        return status, address

    def cudaFreeHost(self, address: int) -> tuple[Status]:  # noqa: N802
        del self.pinned[address]
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, *arguments: Any) -> tuple[Status]:  # noqa: N802
        target, source, size, kind, _ = arguments
        ctypes.memmove(target, source, size)
        self.uploads += kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        return (Status.cudaSuccess,)

    def cudaMemcpy2DAsync(self, *arguments: Any) -> tuple[Status]:  # noqa: N802
        target, target_pitch, source, source_pitch, width, height, _, _ = arguments
        assert width <= min(target_pitch, source_pitch)  # CUDA refuses it
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        return (Status.cudaSuccess,)

    def cudaMemset2DAsync(self, *arguments: Any) -> tuple[Status]:  # noqa: N802
        address, pitch, value, width, height, _ = arguments
        assert width <= pitch
        for row in range(height):
            ctypes.memset(address + row * pitch, value, width)
        return (Status.cudaSuccess,)


class FakeContext:
    """Computes ``y = x @ generator_weight[tenant_index]``, the tiny prefill without its activation."""

    def __init__(self, dtype: str, *, fails: bool = False, open_sizes: bool = False) -> None:
        self.types = {"x": dtype, "tenant_index": "int64", "generator_weight": dtype, "y": dtype}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.fails = fails
        self.open_sizes = open_sizes

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, -1, 8) if self.open_sizes else self.shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            return False
        x, index, weight = (self._array(name) for name in ("x", "tenant_index", "generator_weight"))
        result = x.astype(np.float32) @ weight[index].astype(np.float32)
        self._array("y")[...] = result.astype(self.types["y"])
        return True

    def _array(self, name: str) -> np.ndarray:
        shape = self.shapes["x" if name == "y" else name]
        kind = np.dtype(self.types[name])
        memory = (ctypes.c_char * (int(np.prod(shape)) * kind.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(shape)


class OnnxContext:
    """Computes what an ONNX graph says, by ONNX Runtime, in "device" memory."""

    def __init__(self, path: Path, spec: GraphSpec) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.spec = spec
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (tensor,) = (tensor for tensor in self.spec.outputs if tensor.name == name)
        batch = self.shapes["input_ids"][0]
        return tuple(batch if size == "batch" else int(size) for size in tensor.shape)

    def execute_async_v3(self, stream: int) -> bool:
        for name, address in self.addresses.items():  # what TensorRT's KV-cache-update layer demands
            if name.startswith("present.") and address != self.addresses[name.replace("present", "past_key_values")]:
                return False
        feeds = {tensor.name: self._array(tensor, self.shapes[tensor.name]) for tensor in self.spec.inputs}
        made = self.session.run([tensor.name for tensor in self.spec.outputs], feeds)
        for tensor, array in zip(self.spec.outputs, made, strict=True):
            self._array(tensor, self.get_tensor_shape(tensor.name))[...] = array
        return True

    def _array(self, tensor: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
        kind = numpy_type(tensor.dtype)
        memory = (ctypes.c_char * (math.prod(shape) * kind.itemsize)).from_address(self.addresses[tensor.name])
        return np.frombuffer(memory, kind).reshape(shape)


class GpuBinding:
    """An IO binding of ONNX Runtime's GPU build: "device" memory is host memory, and host arrays are copied at once."""

    def __init__(self, binding: Any, session: GpuSession) -> None:
        self.binding = binding
        self.session = session
        self.kept: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device: str, number: int, kind: Any, shape: Any, address: int) -> None:
        if device == "cpu":
            size = math.prod(shape) * (2 if isinstance(kind, int) else np.dtype(kind).itemsize)
            self.kept[name] = np.frombuffer(ctypes.string_at(address, size), np.uint8)
            address = self.kept[name].ctypes.data
            self.session.uploads.append(name)
        self.binding.bind_input(name, "cpu", number, kind, shape, address)

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.session.uploads.append(name)
        self.kept[name] = array.copy()
        self.binding.bind_cpu_input(name, self.kept[name])

    def bind_output(self, name: str, device: str = "cpu", *place: Any) -> None:
        self.session.bound_outputs.append((name, device))
        self.binding.bind_output(name, "cpu", *place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.binding, name)


class GpuSession:
    """``onnxruntime.InferenceSession`` of the GPU build, which computes on the CPU and counts what travels."""

    last: list[GpuSession]
    falls_back = False
    """Play a machine on which the provider's libraries do not load."""

    def __init__(self, path: Any, options: Any, providers: Any) -> None:
        self.asked = providers
        self.real = REAL_SESSION(path, options, providers=["CPUExecutionProvider"])
        self.uploads: list[str] = []
        self.bound_outputs: list[tuple[str, str]] = []
        GpuSession.last.append(self)

    def get_providers(self) -> list[str]:
        named = [] if GpuSession.falls_back else [provider for provider, _ in self.asked]
        return [*named, "CPUExecutionProvider"]

    def io_binding(self) -> GpuBinding:
        return GpuBinding(self.real.io_binding(), self)

    def run_with_iobinding(self, binding: GpuBinding) -> None:
        self.real.run_with_iobinding(binding.binding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


REAL_SESSION = onnxruntime.InferenceSession


def play_gpu_build(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Let ONNX Runtime have its CUDA provider, and CUDA's bindings be there."""
    cuda = FakeCuda()
    monkeypatch.setattr(cuda_memory, "load_cuda", lambda: cuda)
    monkeypatch.setattr(GpuSession, "last", [], raising=False)

    def session(path: Any, options: Any, providers: Any) -> Any:
        asked_for_gpu = providers[0][0] == "CUDAExecutionProvider"
        return (GpuSession if asked_for_gpu else REAL_SESSION)(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    return cuda


def fake_tensorrt(version: str, context: Any) -> types.SimpleNamespace:
    """A module ``tensorrt_rtx`` whose engines have that context, or the one under their bytes; None refuses them."""

    class Logger:
        ERROR, INTERNAL_ERROR = 1, 0

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            own = context.get(data) if isinstance(context, dict) else context
            if own is None:
                self.logger.log(Logger.ERROR, "Error Code 1: the plan is of another GPU")
                return None
            return types.SimpleNamespace(create_execution_context=lambda: own)

    return types.SimpleNamespace(__version__=version, ILogger=Logger, Runtime=Runtime)
