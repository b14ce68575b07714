"""The stepper over a KV cache of fixed capacity that graphs write in place.

A row stands at ``[its prompt slots | its tokens]`` from entry 0 on: position is place. A step's graph gets the part of
the buffers that its rows occupy, as input and as output at the same address, so nothing is concatenated or copied
between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.runner import Array, Arrays, Runner, numpy_type
from engines.serving.stepper import Instruction, Reading, RowCache, Stepper
from engines.serving.tenants import TenantBank
from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import ENCODER, PAST, PRESENT, VERIFY, step_graphs
from iapt_export.contract.manifest import READS_INSTRUCTION, BundleManifest, TargetSpec

_log = logging.getLogger(__name__)


class InPlaceStepper(Stepper):
    """Over ``serve``, or over ``serve_prefill`` and ``serve_decode``."""

    in_place = True

    def __init__(
        self, manifest: BundleManifest, target: TargetSpec, bank: TenantBank, runners: dict[str, Runner]
    ) -> None:
        super().__init__(manifest, target, bank, runners)
        reading, continuing = step_graphs(target.graphs, in_place=True)
        self.reader, self.continuer = runners[reading], runners[continuing]
        self.verifier = runners.get(VERIFY)
        self.buffers: dict[str, Array] = {}
        """``past_key_values.N.key`` and ``.value`` to ``[R, H, C, K]``, where the runtime wants them."""
        self.lengths: list[int] = []
        """Entries of each row."""
        self._bound: tuple[int, dict[str, Array], dict[str, Array]] | None = None
        """What the last step was given: its number of rows, their part of the cache as inputs and as outputs."""
        self._bound_several: tuple[int, dict[str, Array], dict[str, Array]] | None = None
        """The same of the last step with drafts."""
        self._agrees: dict[int, bool] = {}
        """Number of rows to whether a step with drafts gave what single steps give, when it was first taken."""
        self._beside: Runner | None = None

    def activate(self) -> None:
        """Load the graphs and reserve the cache.

        Raises:
            IaptError: the graphs were built for another capacity, or there is too little memory.
        """
        if self.buffers:
            return
        try:
            for name in (ENCODER, *step_graphs(self.target.graphs, in_place=True)):
                if name in self.runners:
                    self.runners[name].activate()
            self.buffers = self._reserve()
            if self.drafts and self.verifier is not None:
                self.verifier.activate()
                (logits,) = (tensor for tensor in self.verifier.spec.outputs if tensor.name == "logits")
                shape = (self.max_rows, *map(int, logits.shape[1:]))
                self._logits_several = self.verifier.host_empty(logits.dtype, shape)
            self._beside = self.reader.beside()
            if self._beside is not None:
                self._logits_beside = np.empty_like(self._logits)
        except BaseException:
            self.deactivate()
            raise

    def deactivate(self) -> None:
        """Give the memory back."""
        self.buffers, self.lengths, self._beside = {}, [], None
        self._bound = self._bound_several = None
        super().deactivate()

    @property
    def reads_beside(self) -> bool:  # type: ignore[override]
        """See `Stepper.reads_beside`: where the reader's graph may run twice at a time."""
        return self._beside is not None

    def read(self, rows: Sequence[Instruction]) -> np.ndarray:
        """See `Stepper.read`."""
        reading = self._reading(rows, self.reader, self._logits)
        logits = reading.run()
        self.join(reading)
        return logits

    def begin(self, rows: Sequence[Instruction]) -> Reading:
        """See `Stepper.begin`."""
        assert self._beside is not None
        return self._reading(rows, self._beside, self._logits_beside)

    def join(self, reading: Reading) -> None:
        """See `Stepper.join`; rows before it may have left in the meantime, so that it moves up."""
        for place, (row, entries) in enumerate(zip(reading.rows, reading.lengths, strict=True), reading.place):
            if place != self.num_rows:
                for buffer in self.buffers.values():
                    buffer[self.num_rows, :, :entries] = buffer[place, :, :entries]
            self.tenants.append(row.tenant)
            self.lengths.append(entries)

    def _reading(self, rows: Sequence[Instruction], runner: Runner, logits: np.ndarray) -> Reading:
        """Rows are padded on the right to one length."""
        slots = [row.tenant.prompt_length for row in rows]
        lengths = [count + len(row.tokens) for count, row in zip(slots, rows, strict=True)]
        ids = np.full((len(rows), max(lengths)), self.manifest.backbone.pad_token_id, dtype=np.int64)
        for n, row in enumerate(rows):
            ids[n, slots[n] : lengths[n]] = row.tokens
        feeds = {
            "input_ids": ids,
            "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(max(lengths)), ids.shape), dtype=np.int64),
            READS_INSTRUCTION: np.array(True),
            **self.bank.indices([row.tenant for row in rows]),
            **self.bank.stacks,
        }
        cache, into = self._parts(self.num_rows, len(rows), logits)

        def run() -> np.ndarray:
            prompts = self.encoded(rows) or self._no_prompts(len(rows))
            return _run(runner, {**feeds, **_lengths(lengths), **prompts, **cache}, into)

        return Reading(rows, self.num_rows, lengths, run)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """See `Stepper.step`."""
        places = np.array(self.lengths, dtype=np.int64)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        if self._bound is None or self._bound[0] != self.num_rows:  # the same objects as long as the rows are the same
            self._bound = (self.num_rows, *self._parts(0, self.num_rows, self._logits))
        _, cache, into = self._bound
        feeds = {
            "input_ids": np.array(tokens, dtype=np.int64)[:, None],
            "position_ids": places,
            READS_INSTRUCTION: np.array(False),
            **_lengths(self.lengths),
            **self.bank.indices(self.tenants),
            **self.bank.stacks,
            **self._no_prompts(self.num_rows),
            **cache,
        }
        return _run(self.continuer, feeds, into)

    @property
    def can_verify(self) -> bool:
        """See `Stepper.can_verify`."""
        if self.drafts == 0 or not self._agrees.get(self.num_rows, True):
            return False
        return max(self.lengths) + self._logits_several.shape[1] <= self.capacity

    def verify(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Stepper.verify`.

        The first time for each number of rows single steps are taken too, and if a bit differs, these rows take no
        drafts any more: how kernels add up is the processor's business, and one row in 4 bits has one of its own.
        """
        length = self._logits_several.shape[1]
        ids = np.full((self.num_rows, length), self.manifest.backbone.pad_token_id, dtype=np.int64)
        for row, given in enumerate(tokens):
            ids[row, : len(given)] = given
        logits = self._step_of_several(ids)
        if self.num_rows in self._agrees:
            return logits
        before = list(self.lengths)
        single = np.stack([self.step(column.tolist()).copy() for column in ids.T], axis=1)
        self.lengths = before
        agrees = self._agrees[self.num_rows] = np.array_equal(single, logits, equal_nan=True)
        if not agrees:
            text = (
                "%s rows of %s take no drafts: a step of several tokens differs from single ones in the last bits here"
            )
            _log.warning(text, self.num_rows, self.target.dtype)
        return single

    def _step_of_several(self, ids: np.ndarray) -> np.ndarray:
        """``ids [B, T]`` behind what the rows have, to logits ``[B, T, V]``; the rows' lengths stay."""
        assert self.verifier is not None
        length = ids.shape[1]
        if self._bound_several is None or self._bound_several[0] != self.num_rows:
            cache, into = self._parts(0, self.num_rows, self._logits_several)
            present = {name: part for name, part in into.items() if name.startswith(PRESENT)}
            into |= {f"{name}.{step}": part for step in range(length - 1) for name, part in present.items()}
            self._bound_several = (self.num_rows, cache, into)
        _, cache, into = self._bound_several
        feeds = {
            "input_ids": ids,
            "position_ids": np.array(self.lengths, dtype=np.int64)[:, None] + np.arange(length),
            **_lengths([entries + length for entries in self.lengths]),
            **self.bank.indices(self.tenants),
            **self.bank.stacks,
            **cache,
        }
        logits: np.ndarray = self.verifier.infer(feeds, into)["logits"]
        return logits

    def keep(self, row: int, count: int) -> None:
        """See `Stepper.keep`."""
        self.lengths[row] += count

    def leave(self, row: int) -> None:
        """See `Stepper.leave`."""
        last = self.num_rows - 1
        if row != last:
            entries = self.lengths[last]
            for buffer in self.buffers.values():
                buffer[row, :, :entries] = buffer[last, :, :entries]
        self.tenants[row], self.lengths[row] = self.tenants[last], self.lengths[last]
        self.tenants.pop()
        self.lengths.pop()

    def clear(self, row: int) -> None:
        """See `Stepper.clear`: attention of standard operators multiplies masked entries by 0, and NaN stays NaN."""
        for buffer in self.buffers.values():
            buffer[row] = 0

    def row_cache(self, row: int) -> RowCache:
        """See `Stepper.row_cache`."""
        arrays = [np.array(buffer[row, :, : self.lengths[row]]) for buffer in self.buffers.values()]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Stepper.masks`."""
        lengths = np.array(self.lengths)[:, None]
        places = np.arange(lengths.max())
        return (places < lengths).astype(np.int64), (places[:-1] < lengths - 1).astype(np.int64)

    def present(self) -> Arrays:
        """See `Stepper.present`."""
        rows, entries = self.num_rows, max(self.lengths)
        return {name: np.asarray(buffer[:rows])[:, :, :entries] for name, buffer in self.buffers.items()}

    def _reserve(self) -> dict[str, Array]:
        """Make room for the cache and the logits; NaN that is masked is NaN still in some kernels, hence the zeros."""
        spec = self.reader.spec
        buffers = {}
        for tensor in spec.inputs:
            if not tensor.name.startswith(PAST):
                continue
            _, heads, built, width = tensor.shape
            if isinstance(built, int) and built != self.capacity:
                raise IaptError(
                    f"the engines hold {built} cache entries a row, the manifest says {self.capacity}; build again"
                )
            shape = (self.max_rows, int(heads), self.capacity, int(width))
            buffers[tensor.name] = self.reader.zeros(tensor.dtype, shape)
        (logits,) = (tensor for tensor in spec.outputs if tensor.name == "logits")
        one_each = (self.max_rows, 1, int(logits.shape[2]))
        self._logits = self.reader.host_empty(logits.dtype, one_each)
        return buffers

    def _parts(self, first: int, rows: int, logits: np.ndarray) -> tuple[dict[str, Array], dict[str, Array]]:
        """Some rows' part of the cache as inputs, and as outputs."""
        cache = {name: buffer[first : first + rows] for name, buffer in self.buffers.items()}
        into = {name.replace(PAST, PRESENT, 1): part for name, part in cache.items()}
        into["logits"] = logits[first : first + rows]
        return cache, into

    def _no_prompts(self, rows: int) -> Arrays:
        """What a method that takes prompts gets in steps that read no instruction."""
        spec = self.sent_prompts
        if spec is None:
            return {}
        return {spec.name: np.zeros((rows, *map(int, spec.shape[1:])), numpy_type(spec.dtype))}


def _lengths(lengths: Sequence[int]) -> Arrays:
    """How many entries each row has, as the graphs take it."""
    counted = np.array(lengths, dtype=np.int32)
    return {"seqlens_k": counted - 1, "total_sequence_length": np.array(counted.max())}


def _run(runner: Runner, feeds: dict[str, Any], into: dict[str, Array]) -> np.ndarray:
    """Run a graph over parts of the cache; logits ``[B, V]``."""
    logits: np.ndarray = runner.infer(feeds, into)["logits"][:, 0]
    return logits
