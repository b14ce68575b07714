"""A CUDA stream with named buffers, through ``cuda.bindings``, NVIDIA's own Python package: no torch needed."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array in a GPU's memory, which somebody else owns."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> DeviceArray:
        """A part of its first axis."""
        width = self.num_bytes // self.shape[0]
        return DeviceArray(self.address + first * width, (count, *self.shape[1:]), self.dtype)


class CudaStream:
    """Copies arrays to the GPU and back on one stream.

    Buffers only grow, because CUDA's allocation is slow next to a decode step. Copies are queued:
    arrays must not change, and downloaded ones hold nothing yet, until `synchronize`.
    """

    def __init__(self, device: int = 0) -> None:
        self._cuda = load_cuda()
        self._buffers: dict[str, tuple[int, int]] = {}  # name to address and bytes
        self._in_flight: list[np.ndarray] = []
        self._call("cudaSetDevice", device)
        self._stream = self._call("cudaStreamCreate")

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
        """Queue the copy of a contiguous array into its buffer; returns the address."""
        address = self.reserve(name, array.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, array.ctypes.data, array, kind)
        return address

    def download(self, name: str, array: np.ndarray) -> None:
        """Queue the copy of a buffer into a contiguous array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, self._buffers[name][0], array, kind)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Queue the clearing of the buffer of that name, as an array."""
        size = math.prod(shape) * dtype.itemsize
        made = DeviceArray(self.reserve(name, size), shape, dtype)
        self.clear(made)
        return made

    def clear(self, array: DeviceArray) -> None:
        """Queue the clearing of an array."""
        self._call("cudaMemsetAsync", array.address, 0, array.num_bytes, self._stream)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queue a copy on the GPU between arrays of one size that do not overlap."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target.address, source.address, source.num_bytes, kind, self._stream)

    def fetch(self, source: DeviceArray, array: np.ndarray) -> None:
        """Queue the copy of an array on the GPU into a contiguous one of its size here."""
        self._copy(array.ctypes.data, source.address, array, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        self._call("cudaStreamSynchronize", self._stream)
        self._in_flight.clear()

    def close(self) -> None:
        """Free all buffers and the stream; a second call does nothing."""
        for address, _ in self._buffers.values():
            self._call("cudaFree", address)
        self._buffers.clear()
        if self._stream is not None:
            self._call("cudaStreamDestroy", self._stream)
            self._stream = None

    def _copy(self, target: int, source: int, array: np.ndarray, kind: Any) -> None:
        if array.nbytes:
            self._in_flight.append(array)  # the copy reads or writes it after this returns
            self._call("cudaMemcpyAsync", target, source, array.nbytes, kind, self._stream)

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
