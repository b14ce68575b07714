"""A CUDA stream with named buffers, through ``cuda.bindings``, NVIDIA's own Python package: no torch needed."""

from __future__ import annotations

import ctypes
import importlib
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from iapt_export.contract.errors import IaptError, NotRunnableError


def load_cuda() -> Any:
    """Import CUDA's runtime API.

    Raises:
        NotRunnableError: the package is not installed, or does not load.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError, RuntimeError) as error:
        raise NotRunnableError(
            f"CUDA's Python bindings do not load ({error}); try: pip install cuda-bindings, "
            "in the major version of your CUDA"
        ) from error


Plane = tuple[int, int, int]
"""Bytes from row to row, bytes of a row, and rows, as CUDA's two-dimensional copies take them."""


class DeviceArray:
    """An array in a GPU's memory, which its stream owns; see `engines.runner.Array`.

    Parts may have gaps along their first axis. Copies are done when the call returns.
    """

    def __init__(
        self,
        stream: CudaStream,
        address: int,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        strides: Sequence[int] | None = None,
    ) -> None:
        self.stream = stream
        self.address = address
        self.shape = tuple(shape)
        self.dtype = dtype
        self.strides = tuple(strides) if strides is not None else _contiguous_strides(self.shape, dtype.itemsize)
        """Bytes between neighbours along each axis."""

    @property
    def is_contiguous(self) -> bool:
        """Whether it has no gaps."""
        return self.strides == _contiguous_strides(self.shape, self.dtype.itemsize)

    def __getitem__(self, key: Any) -> DeviceArray:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > len(self.shape):
            raise IndexError(f"{len(keys)} indices for an array of shape {self.shape}")
        address, shape, strides = self.address, [], []
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            part = keys[axis] if axis < len(keys) else slice(None)
            if isinstance(part, slice):
                first, last, step = part.indices(size)
                if step != 1:
                    raise IndexError(f"a part of a GPU's array takes neighbours only, got step {step}")
                shape.append(max(last - first, 0))
                strides.append(stride)
            else:
                first = range(size)[part]
            address += first * stride
        return DeviceArray(self.stream, address, shape, self.dtype, strides)

    def __setitem__(self, key: Any, value: DeviceArray | int) -> None:
        part = self[key]
        if isinstance(value, DeviceArray):
            self.stream.copy(value, part)
        elif value == 0:
            self.stream.clear(part)
        else:
            raise ValueError(f"a GPU's array can be set to another one or to 0, not to {value!r}")
        self.stream.synchronize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        self.stream.fetch(self, array)
        self.stream.synchronize()
        return array if dtype is None else array.astype(dtype, copy=False)

    def plane(self) -> Plane:
        """Its bytes as rows with gaps between them."""
        axes = [(size, stride) for size, stride in zip(self.shape, self.strides, strict=True) if size != 1]
        width = self.dtype.itemsize
        while axes and axes[-1][1] == width:
            width *= axes.pop()[0]
        if len(axes) > 1:
            raise ValueError("a part of a GPU's array has gaps along its first axis only")
        height, pitch = axes[0] if axes else (1, width)
        return pitch, width, height


def _contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class CudaStream:
    """Copies arrays to the GPU and back on one stream, which the runners of a target may share.

    Buffers only grow, because CUDA's allocation is slow next to a decode step. Copies are queued:
    arrays must not change, and downloaded ones hold nothing yet, until `synchronize`.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self._users = 0
        self._buffers: dict[str, tuple[int, int]] = {}  # name to address and bytes
        self._kept: dict[str, np.ndarray] = {}
        self._zeros: list[int] = []
        self._in_flight: list[np.ndarray] = []
        self._stream: Any = None

    def open(self) -> None:
        """Make the stream, once for all who open it."""
        if self._users == 0:
            self._cuda = load_cuda()
            self._call("cudaSetDevice", self.device)
            self._stream = self._call("cudaStreamCreate")
        self._users += 1

    def close(self) -> None:
        """Free all buffers and the stream once everybody who opened it has closed it."""
        self._users -= 1
        if self._users:
            return
        for address in (*(address for address, _ in self._buffers.values()), *self._zeros):
            self._call("cudaFree", address)
        self._buffers, self._kept, self._zeros = {}, {}, []
        stream, self._stream = self._stream, None
        self._call("cudaStreamDestroy", stream)

    @property
    def handle(self) -> int:
        """The stream's address, as TensorRT takes it."""
        return int(self._stream)

    def reserve(self, name: str, num_bytes: int) -> int:
        """Address of the buffer of that name, of at least that size."""
        address, size = self._buffers.get(name, (0, 0))
        if size < num_bytes or not address:
            if address:
                self._call("cudaFree", address)
                del self._buffers[name]
            size = max(num_bytes, 1)  # an empty tensor needs an address too
            address = int(self._call("cudaMalloc", size))
            self._buffers[name] = (address, size)
        return address

    def upload(self, name: str, array: np.ndarray) -> int:
        """Queue the copy of an array into its buffer; returns the address.

        A read-only array stays as it is (see `engines.runner.Runner.infer`), so the same one is copied once.
        """
        if self._kept.get(name) is array:
            return self._buffers[name][0]
        self._kept.pop(name, None)
        source = np.ascontiguousarray(array)
        address = self.reserve(name, source.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, source.ctypes.data, source, kind)
        if not array.flags.writeable:
            self._kept[name] = array
        return address

    def download(self, name: str, array: np.ndarray) -> None:
        """Queue the copy of a buffer into a contiguous array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, self._buffers[name][0], array, kind)

    def zeros(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """An array of zeros, which lives until the stream is closed."""
        address = int(self._call("cudaMalloc", max(math.prod(shape) * dtype.itemsize, 1)))
        self._zeros.append(address)
        array = DeviceArray(self, address, shape, dtype)
        self.clear(array)
        self.synchronize()
        return array

    def pinned(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """An array on the host that the GPU copies to and from directly; its content is unknown.

        Its memory goes back when nothing refers to it any more, also after the stream is closed.
        """
        size = max(math.prod(shape) * dtype.itemsize, 1)
        address = int(self._call("cudaHostAlloc", size, 0))
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address).atexit = False
        return np.frombuffer(memoryview(memory), dtype, math.prod(shape)).reshape(shape)

    def clear(self, array: DeviceArray) -> None:
        """Queue the clearing of an array."""
        pitch, width, height = array.plane()
        if width * height:
            self._call("cudaMemset2DAsync", array.address, pitch, 0, width, height, self._stream)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queue a copy on the GPU between arrays of one shape that do not overlap."""
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise ValueError(f"an array {source.shape} {source.dtype} does not fit {target.shape} {target.dtype}")
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy_plane(target.address, target.plane(), source.address, source.plane(), kind)

    def fetch(self, source: DeviceArray, array: np.ndarray) -> None:
        """Queue the copy of an array on the GPU into a contiguous one of its shape here."""
        _, width, height = source.plane()
        self._in_flight.append(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy_plane(array.ctypes.data, (width, width, height), source.address, source.plane(), kind)

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        self._call("cudaStreamSynchronize", self._stream)
        self._in_flight.clear()

    def _copy(self, target: int, source: int, array: np.ndarray, kind: Any) -> None:
        if array.nbytes:
            self._in_flight.append(array)  # the copy reads or writes it after this returns
            self._call("cudaMemcpyAsync", target, source, array.nbytes, kind, self._stream)

    def _copy_plane(
        self,
        target: int,
        target_plane: Plane,
        source: int,
        source_plane: Plane,
        kind: Any,
    ) -> None:
        """Queue the copy of rows of bytes; one without gaps is a single row, which is cut as the other one is."""
        width = min(target_plane[1], source_plane[1])
        pitches = [pitch if row_bytes == width else width for pitch, row_bytes, _ in (target_plane, source_plane)]
        height = target_plane[1] * target_plane[2] // width if width else 0
        if height:
            self._call("cudaMemcpy2DAsync", target, pitches[0], source, pitches[1], width, height, kind, self._stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime, which returns its status first.

        Raises:
            IaptError: the status is an error.
        """
        status, *results = getattr(self._cuda, function)(*arguments)
        if int(status):
            advice = "see nvidia-smi and iapt-export doctor"
            if status.name == "cudaErrorMemoryAllocation":
                advice = "use a smaller batch or shorter inputs, or free the GPU's memory; see nvidia-smi"
            raise IaptError(f"{function} fails with {status.name}; {advice}")
        return results[0] if results else None
