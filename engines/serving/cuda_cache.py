"""The KV cache in a GPU's memory, for TensorRT's engines."""

from __future__ import annotations

import numpy as np

from engines.cuda.memory import CudaStream, DeviceArray
from engines.runner import NUMPY_TYPES, Arrays
from engines.serving.cache import PAST, PRESENT, Cache, buffer_shape, cache_tensors
from engines.serving.tenants import TenantBank
from engines.tensorrt.runner import TensorRTRunner
from iapt_export.contract.errors import IaptError


class CudaCache(Cache):
    """Over ``serve_prefill`` and ``serve_decode``.

    TensorRT's KV-cache-update layer wants its output at its input's address, so both are bound to the rows' part of the
    buffers. The tenants' weights are uploaded when they change and not with every step.
    """

    def __init__(self, reader: TensorRTRunner, stepper: TensorRTRunner) -> None:
        self.runners = {True: reader, False: stepper}
        self.names = {reads: {tensor.name for tensor in runner.spec.inputs} for reads, runner in self.runners.items()}
        self.tensors = cache_tensors(reader.spec)
        self.buffers: dict[str, DeviceArray] = {}
        self._stream: CudaStream | None = None
        self._uploaded: dict[str, DeviceArray] = {}
        self._version = -1

    def reserve(self, rows: int, capacity: int) -> None:
        """See `Cache.reserve`.

        Raises:
            IaptError: the engines were built for another capacity, or the GPU has too little memory.
        """
        (built,) = {tensor.shape[2] for tensor in self.tensors}
        if built != capacity:
            raise IaptError(f"the engines hold {built} cache entries a row, the manifest says {capacity}; build again")
        self._stream = CudaStream(self.runners[True].device)
        for tensor in self.tensors:
            shape = buffer_shape(tensor, rows, capacity)
            self.buffers[tensor.name] = self._stream.zeros(tensor.name, shape, np.dtype(NUMPY_TYPES[tensor.dtype]))
        self._stream.synchronize()

    def run(self, first: int, rows: int, feeds: Arrays, bank: TenantBank, *, reads: bool) -> np.ndarray:
        """See `Cache.run`."""
        names = self.names[reads]
        resident = {name: array for name, array in self._weights(bank).items() if name in names}
        for name, buffer in self.buffers.items():
            resident[name] = resident[name.replace(PAST, PRESENT)] = buffer.rows(first, rows)
        own = {name: np.asarray(array) for name, array in feeds.items() if name in names}
        return self.runners[reads].infer(own, resident)["logits"][:, 0]

    def move(self, source: int, target: int, entries: int) -> None:
        """See `Cache.move`; a row is copied whole, in one piece."""
        assert self._stream is not None
        for buffer in self.buffers.values():
            self._stream.copy(buffer.rows(source, 1), buffer.rows(target, 1))
        self._stream.synchronize()

    def clear(self, row: int) -> None:
        """See `Cache.clear`."""
        assert self._stream is not None
        for buffer in self.buffers.values():
            self._stream.clear(buffer.rows(row, 1))
        self._stream.synchronize()

    def read(self, row: int, entries: int) -> list[np.ndarray]:
        """See `Cache.read`."""
        assert self._stream is not None
        arrays = [np.empty(buffer.shape[1:], buffer.dtype) for buffer in self.buffers.values()]
        for buffer, array in zip(self.buffers.values(), arrays, strict=True):
            self._stream.fetch(buffer.rows(row, 1), array)
        self._stream.synchronize()
        return [array[:, :entries] for array in arrays]

    def release(self) -> None:
        """See `Cache.release`."""
        self.buffers, self._uploaded, self._version = {}, {}, -1
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def _weights(self, bank: TenantBank) -> dict[str, DeviceArray]:
        assert self._stream is not None
        version, stacks = bank.version, bank.stacks  # in this order: what changes meanwhile is uploaded next time
        if version != self._version:
            self._uploaded = {
                name: DeviceArray(self._stream.upload(name, array), array.shape, array.dtype)
                for name, array in stacks.items()
            }
            self._stream.synchronize()
            self._version = version
        return self._uploaded
