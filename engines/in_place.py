"""The stepper of ``serve.onnx``: a cache of fixed capacity that ONNX Runtime writes in place.

The cache is one buffer ``[rows, H, C, K]`` for each layer's keys and values. A step is bound to the part of it that its
rows occupy, as input and as output at the same address, so nothing is concatenated or copied between steps.
A row stands at ``[its prompt slots | its tokens]`` from entry 0 on: position is place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.onnxruntime_runner import OnnxRuntimeRunner
from engines.runner import NUMPY_TYPES, Arrays, Runner
from engines.stepper import Instruction, RowCache, Stepper
from engines.tenants import TenantBank
from iapt_export.manifest import READS_INSTRUCTION, BundleManifest, TargetSpec

PAST, PRESENT = "past_key_values.", "present."


class InPlaceStepper(Stepper):
    """Over ``serve``, on the CPU."""

    def __init__(
        self, manifest: BundleManifest, target: TargetSpec, bank: TenantBank, runners: dict[str, Runner]
    ) -> None:
        super().__init__(manifest, target, bank, runners)
        runner = runners["serve"]
        assert isinstance(runner, OnnxRuntimeRunner)
        self.runner = runner
        self.names = [tensor.name for tensor in runner.spec.inputs]
        self.buffers: Arrays = {}
        self.lengths: list[int] = []
        """Entries of each row."""
        self._bound: dict[tuple[int, int], Any] = {}
        self._stacks: Arrays = {}

    def activate(self) -> None:
        """Load the graph and reserve the cache; the system gives the memory as it is written."""
        if self.buffers:
            return
        for name in ("encoder", "serve"):
            if name in self.runners:
                self.runners[name].activate()
        for tensor in self.runner.spec.inputs:
            if tensor.name.startswith(PAST):
                _, heads, _, width = tensor.shape
                shape = (self.max_rows, int(heads), self.capacity, int(width))
                self.buffers[tensor.name] = np.zeros(shape, NUMPY_TYPES[tensor.dtype])
        (logits,) = (tensor for tensor in self.runner.spec.outputs if tensor.name == "logits")
        self.logits = np.empty((self.max_rows, 1, int(logits.shape[2])), NUMPY_TYPES[logits.dtype])

    def deactivate(self) -> None:
        """Give the memory back."""
        super().deactivate()
        self.buffers, self.lengths, self._bound, self._stacks = {}, [], {}, {}

    def read(self, rows: Sequence[Instruction]) -> np.ndarray:
        """See `Stepper.read`; rows are padded on the right to one length."""
        first = self.num_rows
        slots = [row.tenant.prompt_length for row in rows]
        lengths = [count + len(row.tokens) for count, row in zip(slots, rows, strict=True)]
        ids = np.full((len(rows), max(lengths)), self.manifest.backbone.pad_token_id, dtype=np.int64)
        for n, row in enumerate(rows):
            ids[n, slots[n] : lengths[n]] = row.tokens
        places = np.broadcast_to(np.arange(max(lengths)), ids.shape)
        encoded = self.encoded(rows)
        self.tenants += [row.tenant for row in rows]
        self.lengths += lengths
        return self._run(first, ids, places, reads=True, encoded=encoded)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """See `Stepper.step`."""
        ids = np.array(tokens, dtype=np.int64)[:, None]
        places = np.array(self.lengths, dtype=np.int64)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        return self._run(0, ids, places, reads=False, encoded={})

    def leave(self, row: int) -> None:
        """See `Stepper.leave`."""
        last = self.num_rows - 1
        if row != last:
            used = self.lengths[last]
            for buffer in self.buffers.values():
                buffer[row, :, :used] = buffer[last, :, :used]
        self.tenants[row], self.lengths[row] = self.tenants[last], self.lengths[last]
        self.tenants.pop()
        self.lengths.pop()

    def row_cache(self, row: int) -> RowCache:
        """See `Stepper.row_cache`."""
        arrays = [buffer[row, :, : self.lengths[row]].copy() for buffer in self.buffers.values()]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def _run(self, first: int, ids: np.ndarray, places: np.ndarray, *, reads: bool, encoded: Arrays) -> np.ndarray:
        """One step of the rows from ``first`` on."""
        binding = self._binding(first)
        lengths = np.array(self.lengths[first:], dtype=np.int32)
        feeds = {
            "input_ids": ids,
            "position_ids": np.ascontiguousarray(places, dtype=np.int64),
            "seqlens_k": lengths - 1,
            "total_sequence_length": lengths.max(),
            READS_INSTRUCTION: np.array(reads),
            **self.bank.indices(self.tenants[first:]),
            **(encoded or self._no_prompts(len(ids))),
        }
        for name, array in feeds.items():
            if name in self.names:
                binding.bind_cpu_input(name, np.asarray(array))
        self.runner.run_bound(binding)
        return self.logits[first : self.num_rows, 0]

    def _binding(self, first: int) -> Any:
        """What stays the same between steps of the same rows: the cache, the logits, the tenants' weights."""
        if any(self._stacks.get(name) is not array for name, array in self.bank.stacks.items()):
            self._bound, self._stacks = {}, dict(self.bank.stacks)  # a stack has grown to another place
        key = first, self.num_rows
        if key not in self._bound:
            binding = self.runner.new_binding()
            for name, buffer in self.buffers.items():
                rows = buffer[first : self.num_rows]
                self.runner.bind(binding, name, rows)
                self.runner.bind_output(binding, name.replace(PAST, PRESENT), rows)
            for name, array in self._stacks.items():
                if name in self.names:
                    self.runner.bind(binding, name, array)
            self.runner.bind_output(binding, "logits", self.logits[first : self.num_rows])
            self._bound[key] = binding
        return self._bound[key]

    def _no_prompts(self, rows: int) -> Arrays:
        """What a method that takes prompts gets in steps that read no instruction."""
        spec = self.sent_prompts
        if spec is None:
            return {}
        return {spec.name: np.zeros((rows, *map(int, spec.shape[1:])), NUMPY_TYPES[spec.dtype])}
