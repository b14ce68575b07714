"""Run a session over rows with forced tokens, step by step: the one file that knows how a session keeps its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.loading import open_runners
from engines.runner import Runner
from engines.session import Batch, Session
from iapt_export.manifest import BundleManifest, TargetSpec

STEP_GRAPHS = ("prefill", "decode")
"""The graphs that a session steps through."""

RowCache = list[tuple[np.ndarray, np.ndarray]]
"""One row's keys and values by layer, ``[H, entries, K]``, padding left out."""


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
    batch: Batch

    def caches(self) -> list[RowCache]:
        """Every row's cache in fp32."""
        num_layers = len(self.batch.cache) // 2
        return [[self._entries(row, layer) for layer in range(num_layers)] for row in range(len(self.mask))]

    def _entries(self, row: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        real = self.mask[row].astype(bool)
        names = (f"past_key_values.{layer}.{part}" for part in ("key", "value"))
        key, value = (self.batch.cache[name][row][:, real].astype(np.float32) for name in names)
        return key, value


def run_steps(session: Session, rows: Sequence[Row], num_steps: int) -> Iterator[Step]:
    """Prefill, then up to ``num_steps - 1`` decode steps over the rows' forced tokens.

    Args:
        session: active.
        rows: the batch; all have at least ``num_steps - 1`` forced tokens.
        num_steps: steps in all, prefill included.

    Yields:
        The batch after each step; a step's caches are those of the moment, so read them before going on.
    """
    logits, batch = session.prefill([list(row.tokens) for row in rows], [row.tenant for row in rows])
    yield Step(0, logits.astype(np.float32), batch.mask, batch)
    for number in range(1, num_steps):
        fed = np.array([row.forced[number - 1] for row in rows], np.int64)
        logits = session.decode(fed, batch)
        yield Step(number, logits.astype(np.float32), batch.mask, batch)


def graph_of(step: int) -> str:
    """The graph that computes a step."""
    return "decode" if step else "prefill"


def session_with(bundle: Path, manifest: BundleManifest, target: TargetSpec, runners: dict[str, Runner]) -> Session:
    """A session on a target some of whose graphs run on ``runners`` instead; not yet active."""
    return Session(bundle, manifest, target, {**open_runners(bundle, target), **runners})
