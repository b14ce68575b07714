"""Run a session over rows with forced tokens, step by step: the one file that knows how a session keeps its cache."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.runner import Arrays, Runner
from engines.serving.loading import open_runners, stepper_over
from engines.serving.session import Session
from engines.serving.stepper import Instruction, RowCache, Stepper
from iapt_export.contract.graphs import PAST, PRESENT, step_graphs
from iapt_export.contract.manifest import BundleManifest, TargetSpec
from trainers.decoder.importance import load_importance
from trainers.decoder.rounded import Importance


@dataclass(frozen=True)
class Row:
    """One row of a batch: what is read, for whom, and the tokens that are fed afterwards."""

    tenant: str
    tokens: tuple[int, ...]
    """The instruction's token ids."""
    forced: tuple[int, ...]
    """The reference's tokens, fed one a step whatever the target would choose."""


@dataclass
class Step:
    """A batch after one step."""

    number: int
    """0 is prefill."""
    logits: np.ndarray
    """``[B, V]`` fp32."""
    mask: np.ndarray
    """``[B, S]``: which cache entries are a row's own; the same for the hidden states that prefill computed."""
    read_mask: np.ndarray
    """``[B, S-1]``: which of the entries that the step found are a row's own."""
    stepper: Stepper
    scales: Importance
    """Of a cache in 8 bits, by its buffers' names."""

    def caches(self) -> list[RowCache]:
        """Every row's cache in fp32."""
        rows = [self.stepper.row_cache(row) for row in range(len(self.mask))]
        return [
            [(self._restored(layer, "key", key), self._restored(layer, "value", value)) for layer, (key, value) in row]
            for row in map(enumerate, rows)
        ]

    def present(self) -> Arrays:
        """``present.N.*`` to ``[B, H, S, K]``: the cache as the mask says."""
        return {PRESENT + name.removeprefix(PAST): array for name, array in self.stepper.present().items()}

    def _restored(self, layer: int, part: str, array: np.ndarray) -> np.ndarray:
        """``[H, S, K]`` in fp32."""
        if array.dtype != np.int8:
            return array.astype(np.float32, copy=False)
        return array * self.scales[f"{PAST}{layer}.{part}"].reshape(len(array), 1, -1)


def run_steps(session: Session, rows: Sequence[Row], num_steps: int) -> Iterator[Step]:
    """Prefill, then up to ``num_steps - 1`` decode steps over the rows' forced tokens.

    Args:
        session: active, with nothing under way.
        rows: the batch; all have at least ``num_steps - 1`` forced tokens.
        num_steps: steps in all, prefill included.

    Yields:
        The batch after each step; a step's caches are those of the moment, so read them before going on.
    """
    stepper = session.stepper
    rounding = session.target.rounding
    scales = load_importance(session.bundle) if rounding and rounding.cache_type else {}
    try:
        logits = stepper.read([Instruction(stepper.bank.get(row.tenant), row.tokens) for row in rows])
        yield Step(0, logits.astype(np.float32), *stepper.masks(), stepper, scales)
        for number in range(1, num_steps):
            logits = stepper.step([row.forced[number - 1] for row in rows])
            yield Step(number, logits.astype(np.float32), *stepper.masks(), stepper, scales)
    finally:
        while stepper.num_rows:
            stepper.leave(stepper.num_rows - 1)


def graph_of(graphs: Container[str], step: int, in_place: bool) -> str:
    """Which of these graphs computes a step."""
    reading, continuing = step_graphs(graphs, in_place=in_place)
    return continuing if step else reading


def session_with(
    bundle: Path, manifest: BundleManifest, target: TargetSpec, runners: dict[str, Runner], in_place: bool
) -> Session:
    """A session on a target some of whose graphs run on ``runners`` instead; not yet active."""
    stepper = stepper_over(bundle, manifest, target, {**open_runners(bundle, target), **runners}, in_place=in_place)
    return Session(bundle, manifest, target, stepper)
