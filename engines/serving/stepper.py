"""Rows over a KV cache: read instructions, go on by a token each, leave. Two kinds of cache, one contract.

Rows are numbered 0 to n-1 in the order in which they stand in the cache. A row that leaves is followed in its place
by the last one, so a batch has no holes. What a row computes does not depend on the others.

Shapes: B rows, T tokens of a step, P prompt slots of a row, S cache entries, C the cache's capacity, H key/value heads,
K head width, D hidden width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engines.runner import Activated, Arrays, Runner
from engines.serving.tenants import Tenant, TenantBank, cast
from iapt_export.contract.graphs import ENCODER, KINDS, PAST, PRESENT, step_graphs
from iapt_export.contract.manifest import SENT_PROMPTS, BundleManifest, TargetSpec, TensorSpec

RowCache = list[tuple[np.ndarray, np.ndarray]]
"""One row's keys and values by layer, ``[H, entries, K]``, prompts first, padding left out."""


@dataclass(frozen=True)
class Instruction:
    """What a new row reads."""

    tenant: Tenant
    tokens: Sequence[int]
    soft_prompts: np.ndarray | None = None
    """``[P, D]``, which a client computed, for a tenant whose method takes them."""


@dataclass(frozen=True)
class Reading:
    """Instructions that are read into rows of their own, which are not among the others yet."""

    rows: Sequence[Instruction]
    place: int
    """The first one's place in the cache."""
    lengths: list[int]
    """Entries of each."""
    run: Callable[[], np.ndarray]
    """Reads them, in any thread, and gives logits ``[len(rows), V]``, valid until the next reading runs."""


class Stepper(Activated):
    """Steps the rows of one target's cache."""

    in_place: bool
    """Whether the graphs write the cache where it stands."""
    reads_beside = False
    """Whether another thread may run a `Reading` while rows step and leave."""

    drafts = 0
    """Drafted tokens of a row that `verify` is to take at most; 0 for none."""

    def __init__(
        self, manifest: BundleManifest, target: TargetSpec, bank: TenantBank, runners: dict[str, Runner]
    ) -> None:
        self.manifest = manifest
        self.target = target
        self.bank = bank
        self.runners = runners
        self.tenants: list[Tenant] = []
        """Each row's tenant."""

    @property
    def num_rows(self) -> int:
        """Rows in the cache."""
        return len(self.tenants)

    @property
    def max_rows(self) -> int:
        """Rows that the cache can hold."""
        return self.manifest.ranges.batch.max

    @property
    def capacity(self) -> int:
        """Entries that a row can have: prompts, instruction and all generated tokens but the last."""
        return self.manifest.ranges.past.max

    @abstractmethod
    def read(self, rows: Sequence[Instruction]) -> np.ndarray:
        """Let rows join and read their instructions; they come after those that are there.

        Returns:
            Logits ``[len(rows), V]`` for each new row's first token, valid until the next step.
        """

    def begin(self, rows: Sequence[Instruction]) -> Reading:
        """Prepare what `read` does at once, where `reads_beside`: one reading at a time, which `join` ends."""
        raise NotImplementedError

    def join(self, reading: Reading) -> None:
        """Let the rows of a reading that has run follow those that are there now."""
        raise NotImplementedError

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Give every row its next token.

        Returns:
            Logits ``[B, V]`` for the tokens after these, valid until the next step.
        """

    @property
    def can_verify(self) -> bool:
        """Whether `verify` may be called now: there are `drafts`, and every row has room for as many entries."""
        return False

    def verify(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Give every row its next token and the drafted ones behind it, which are not the row's before `keep`.

        Args:
            tokens: of each row, 1 to `drafts` + 1.

        Returns:
            Logits ``[B, T, V]`` for the token after each, to the bit what `step` by step gives; behind a row's last
            one anything. Valid until the next step.
        """
        raise NotImplementedError

    def keep(self, row: int, count: int) -> None:
        """Let the first ``count`` tokens that `verify` was given be the row's; the others are forgotten."""
        raise NotImplementedError

    @abstractmethod
    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""

    def clear(self, row: int) -> None:
        """Make sure that nothing of a row which is about to leave, such as NaN, reaches the next in its place."""

    @abstractmethod
    def row_cache(self, row: int) -> RowCache:
        """A copy of what a row has in the cache."""

    @abstractmethod
    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """``[B, S]`` and ``[B, S-1]`` int64: which entries of `present` are a row's own, now and before the last step.

        S counts the longest row's entries, which may have others of shorter rows among them.
        """

    @abstractmethod
    def present(self) -> Arrays:
        """``past_key_values.N.*`` to ``[B, H, S, K]``, the whole cache on the host; valid until the next step."""

    def deactivate(self) -> None:
        """Give the memory back."""
        for runner in self.runners.values():
            runner.deactivate()
        self.tenants = []

    def encoded(self, rows: Sequence[Instruction]) -> Arrays:
        """``METHOD.prompts [B, P, D]`` of a method whose prompts are computed beforehand: sent, or the encoder's."""
        spec = self.sent_prompts
        if spec is None:
            return {}
        method = spec.name.removesuffix(f".{SENT_PROMPTS}")
        prompts = np.zeros((len(rows), *map(int, spec.shape[1:])), dtype=np.float32)
        missing = [n for n, row in enumerate(rows) if row.tenant.method == method and row.soft_prompts is None]
        if missing:
            chosen = [rows[n] for n in missing]
            feeds = {**left_padded([row.tokens for row in chosen], self.manifest.backbone.pad_token_id)}
            feeds |= {**self.bank.indices([row.tenant for row in chosen]), **self.bank.stacks}
            prompts[missing] = self.runners[ENCODER].infer(feeds)[SENT_PROMPTS]
        for n, row in enumerate(rows):
            if row.soft_prompts is not None:
                prompts[n] = row.soft_prompts
        return {spec.name: cast(prompts, spec.dtype)}

    @property
    def sent_prompts(self) -> TensorSpec | None:
        """The input that takes prompts computed beforehand, if a method has one."""
        graph = next(spec for name, spec in self.target.graphs.items() if KINDS[name].reads)
        return next((tensor for tensor in graph.inputs if tensor.name.endswith(f".{SENT_PROMPTS}")), None)


class ConcatenatedStepper(Stepper):
    """Over ``prefill`` and ``decode``: each step takes the cache and returns a longer one. Runs on any runtime.

    Rows stand at the right end of the cache; the left of shorter ones is masked.
    """

    in_place = False
    mask: np.ndarray
    """``[B, S]`` int64, 1 at entries that are in use."""
    cache: Arrays
    """``past_key_values.N.*`` to ``[B, H, S, K]``."""

    def activate(self) -> None:
        """Load the graphs."""
        for name in (ENCODER, *step_graphs(self.target.graphs, in_place=False)):
            if name in self.runners:
                self.runners[name].activate()

    def deactivate(self) -> None:
        """Give the memory back."""
        super().deactivate()
        self.mask, self.cache = np.empty((0, 0), np.int64), {}

    def read(self, rows: Sequence[Instruction]) -> np.ndarray:
        """See `Stepper.read`."""
        tenants = [row.tenant for row in rows]
        feeds = left_padded([row.tokens for row in rows], self.manifest.backbone.pad_token_id)
        feeds |= {**self.bank.indices(tenants), **self.bank.stacks, **self.encoded(rows)}
        outputs = self.runners["prefill"].infer(feeds)
        lengths = np.array([tenant.prompt_length for tenant in tenants])
        slots = np.arange(self.manifest.num_slots)[None] >= self.manifest.num_slots - lengths[:, None]
        mask = np.concatenate([slots.astype(np.int64), feeds["attention_mask"]], axis=1)
        cache = past_from_present(outputs)
        if self.tenants:
            length = max(mask.shape[1], self.mask.shape[1])
            mask = np.concatenate([_widened(self.mask, 1, length), _widened(mask, 1, length)])
            cache = {
                name: np.concatenate([_widened(array, 2, length), _widened(cache[name], 2, length)])
                for name, array in self.cache.items()
            }
        self.mask, self.cache = mask, cache
        self.tenants += tenants
        return outputs["logits"][:, 0]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """See `Stepper.step`."""
        self.mask = np.concatenate([self.mask, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        feeds = {
            "input_ids": np.array(tokens, dtype=np.int64)[:, None],
            "attention_mask": self.mask,
            "position_ids": self.mask.sum(axis=1, keepdims=True) - 1,
            **self.cache,
            **self.bank.indices(self.tenants),
            **self.bank.stacks,
        }
        outputs = self.runners["decode"].infer(feeds)
        self.cache = past_from_present(outputs)
        return outputs["logits"][:, 0]

    def leave(self, row: int) -> None:
        """See `Stepper.leave`."""
        last = self.num_rows - 1
        for array in (self.mask, *self.cache.values()):
            array[row] = array[last]
        self.tenants[row] = self.tenants[last]
        self.tenants.pop()
        self.mask = self.mask[:last]
        self.cache = {name: array[:last] for name, array in self.cache.items()}
        self._trim()

    def row_cache(self, row: int) -> RowCache:
        """See `Stepper.row_cache`."""
        used = self.mask[row].astype(bool)
        arrays = [array[row][:, used] for array in self.cache.values()]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Stepper.masks`."""
        return self.mask, self.mask[:, :-1]

    def present(self) -> Arrays:
        """See `Stepper.present`."""
        return self.cache

    def _trim(self) -> None:
        """Drop the columns on the left that no row uses any more."""
        if self.tenants and (unused := int(self.mask.any(axis=0).argmax())):
            self.mask = self.mask[:, unused:]
            self.cache = {name: array[:, :, unused:] for name, array in self.cache.items()}


def left_padded(prompts: Sequence[Sequence[int]], pad_token: int) -> Arrays:
    """``input_ids`` and ``attention_mask`` ``[B, T]`` int64, padded on the left."""
    length = max(map(len, prompts))
    ids = np.full((len(prompts), length), pad_token, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, length - len(prompt) :] = prompt
        mask[index, length - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def past_from_present(outputs: Arrays) -> Arrays:
    """Rename a step's ``present.N.*`` to the next step's ``past_key_values.N.*``."""
    return {PAST + name.removeprefix(PRESENT): array for name, array in outputs.items() if name.startswith(PRESENT)}


def _widened(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Zeros added on the left of an axis."""
    missing = length - array.shape[axis]
    if not missing:
        return array
    return np.pad(array, [(missing if number == axis else 0, 0) for number in range(array.ndim)])
