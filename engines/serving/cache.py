"""A KV cache of fixed capacity that graphs write in place: one buffer for each layer's keys, one for its values.

Shapes: R rows of the cache, B rows of one step, C capacity, H key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.runner import NUMPY_TYPES, Arrays
from engines.serving.tenants import TenantBank
from iapt_export.contract.manifest import GraphSpec, TensorSpec

PAST, PRESENT = "past_key_values.", "present."


class Cache(ABC):
    """The buffers ``past_key_values.N.key`` and ``.value`` ``[R, H, C, K]``, and the two graphs that work on them.

    One graph may serve for both kinds of step.
    """

    @abstractmethod
    def reserve(self, rows: int, capacity: int) -> None:
        """Make room; every entry is zero, because NaN that is masked is NaN still in some kernels."""

    @abstractmethod
    def run(self, first: int, rows: int, feeds: Arrays, bank: TenantBank, *, reads: bool) -> np.ndarray:
        """Step the rows from ``first`` on.

        Args:
            first: the first of them in the cache.
            rows: how many.
            feeds: the step's own inputs, of which a graph takes those that it has.
            bank: whose weights stay where they are between steps.
            reads: whether instructions are read.

        Returns:
            Logits ``[rows, V]``, valid until the next step.
        """

    @abstractmethod
    def move(self, source: int, target: int, entries: int) -> None:
        """Let a row's first entries replace another's."""

    @abstractmethod
    def clear(self, row: int) -> None:
        """Make a row's entries zero."""

    @abstractmethod
    def read(self, row: int, entries: int) -> list[np.ndarray]:
        """Copies ``[H, entries, K]``: layer 0's keys, its values, layer 1's keys, and so on."""

    @abstractmethod
    def release(self) -> None:
        """Give the memory back."""


def cache_tensors(spec: GraphSpec) -> list[TensorSpec]:
    """The inputs of a graph that are its cache."""
    return [tensor for tensor in spec.inputs if tensor.name.startswith(PAST)]


def buffer_shape(tensor: TensorSpec, rows: int, capacity: int) -> tuple[int, int, int, int]:
    """``(R, H, C, K)`` of the buffer for a cache input ``[batch, H, capacity, K]``."""
    _, heads, _, width = tensor.shape
    return rows, int(heads), capacity, int(width)


class HostCache(Cache):
    """In the host's memory, for ONNX Runtime on the CPU.

    A step is bound to the part of the buffers that its rows occupy, as input and as output at the same address, so
    nothing is concatenated or copied between steps.
    """

    def __init__(self, reader: OnnxRuntimeRunner, stepper: OnnxRuntimeRunner) -> None:
        self.runners = {True: reader, False: stepper}
        self.names = {reads: {tensor.name for tensor in runner.spec.inputs} for reads, runner in self.runners.items()}
        self.buffers: Arrays = {}
        self._bound: dict[tuple[int, int, bool], Any] = {}
        self._stacks: Arrays = {}

    def reserve(self, rows: int, capacity: int) -> None:
        """See `Cache.reserve`; the system gives the memory as it is written."""
        spec = self.runners[True].spec
        self.buffers = {
            tensor.name: np.zeros(buffer_shape(tensor, rows, capacity), NUMPY_TYPES[tensor.dtype])
            for tensor in cache_tensors(spec)
        }
        (logits,) = (tensor for tensor in spec.outputs if tensor.name == "logits")
        self.logits = np.empty((rows, 1, int(logits.shape[2])), NUMPY_TYPES[logits.dtype])

    def run(self, first: int, rows: int, feeds: Arrays, bank: TenantBank, *, reads: bool) -> np.ndarray:
        """See `Cache.run`."""
        binding = self._binding(first, rows, bank.stacks, reads)
        for name, array in feeds.items():
            if name in self.names[reads]:
                binding.bind_cpu_input(name, np.asarray(array))
        self.runners[reads].run_bound(binding)
        return self.logits[first : first + rows, 0]

    def move(self, source: int, target: int, entries: int) -> None:
        """See `Cache.move`."""
        for buffer in self.buffers.values():
            buffer[target, :, :entries] = buffer[source, :, :entries]

    def clear(self, row: int) -> None:
        """See `Cache.clear`."""
        for buffer in self.buffers.values():
            buffer[row] = 0

    def read(self, row: int, entries: int) -> list[np.ndarray]:
        """See `Cache.read`."""
        return [buffer[row, :, :entries].copy() for buffer in self.buffers.values()]

    def release(self) -> None:
        """See `Cache.release`."""
        self.buffers, self._bound, self._stacks = {}, {}, {}

    def _binding(self, first: int, rows: int, stacks: Arrays, reads: bool) -> Any:
        """What stays the same between steps of the same rows: the cache, the logits, the tenants' weights."""
        if any(self._stacks.get(name) is not array for name, array in stacks.items()):
            self._bound, self._stacks = {}, dict(stacks)  # a stack has grown to another place
        key = first, rows, reads
        if key not in self._bound:
            runner = self.runners[reads]
            binding = runner.new_binding()
            for name, buffer in self.buffers.items():
                own = buffer[first : first + rows]
                runner.bind(binding, name, own)
                runner.bind_output(binding, name.replace(PAST, PRESENT), own)
            for name, array in self._stacks.items():
                if name in self.names[reads]:
                    runner.bind(binding, name, array)
            runner.bind_output(binding, "logits", self.logits[first : first + rows])
            self._bound[key] = binding
        return self._bound[key]
