"""The stepper over a cache that graphs write in place, see `engines.serving.cache`.

A row stands at ``[its prompt slots | its tokens]`` from entry 0 on: position is place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.runner import NUMPY_TYPES, Arrays, Runner
from engines.serving.cache import Cache
from engines.serving.stepper import Instruction, RowCache, Stepper
from engines.serving.tenants import TenantBank
from iapt_export.contract.graphs import ENCODER, step_graphs
from iapt_export.contract.manifest import READS_INSTRUCTION, BundleManifest, TargetSpec


class InPlaceStepper(Stepper):
    """Over ``serve``, or over ``serve_prefill`` and ``serve_decode``."""

    def __init__(
        self,
        manifest: BundleManifest,
        target: TargetSpec,
        bank: TenantBank,
        runners: dict[str, Runner],
        cache: Cache,
    ) -> None:
        super().__init__(manifest, target, bank, runners)
        self.cache = cache
        self.lengths: list[int] = []
        """Entries of each row."""
        self._is_active = False

    def activate(self) -> None:
        """Load the graphs and reserve the cache."""
        if self._is_active:
            return
        try:
            for name in (ENCODER, *step_graphs(self.target.graphs, in_place=True)):
                if name in self.runners:
                    self.runners[name].activate()
            self.cache.reserve(self.max_rows, self.capacity)
        except BaseException:
            self.deactivate()
            raise
        self._is_active = True

    def deactivate(self) -> None:
        """Give the memory back."""
        self.cache.release()
        super().deactivate()
        self.lengths, self._is_active = [], False

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
            self.cache.move(last, row, self.lengths[last])
        self.tenants[row], self.lengths[row] = self.tenants[last], self.lengths[last]
        self.tenants.pop()
        self.lengths.pop()

    def clear(self, row: int) -> None:
        """See `Stepper.clear`: attention of standard operators multiplies masked entries by 0, and NaN stays NaN."""
        self.cache.clear(row)

    def row_cache(self, row: int) -> RowCache:
        """See `Stepper.row_cache`."""
        arrays = self.cache.read(row, self.lengths[row])
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def _run(self, first: int, ids: np.ndarray, places: np.ndarray, *, reads: bool, encoded: Arrays) -> np.ndarray:
        """One step of the rows from ``first`` on."""
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
        return self.cache.run(first, len(ids), feeds, self.bank, reads=reads)

    def _no_prompts(self, rows: int) -> Arrays:
        """What a method that takes prompts gets in steps that read no instruction."""
        spec = self.sent_prompts
        if spec is None:
            return {}
        return {spec.name: np.zeros((rows, *map(int, spec.shape[1:])), NUMPY_TYPES[spec.dtype])}
