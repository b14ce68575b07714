"""What the records of `benchmarks/quality.py` say: scores and chosen learning rates."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality_plan import COMPARED, Budget, Run, Variant, rates, runs_of

Records = Mapping[str, Mapping[str, Any]]
"""A run's key to its record: `Run.summary`, ``accuracy`` or ``loss`` (nats per token) or ``error``, and more."""


def score(record: Mapping[str, Any] | None) -> float | None:
    """Accuracy of a classification record, loss per token of a generation record; None if missing or failed."""
    return None if record is None else record.get("accuracy", record.get("loss"))


def rate_scores(variant: Variant, budget: Budget, records: Records) -> dict[float, float | None]:
    """Learning rate to validation accuracy, of a variant; None where the run is missing or failed."""
    runs = [run for phase in COMPARED for run in runs_of(phase, budget, {}) if run.label == variant.label]
    return {run.learning_rate: score(records.get(run.key)) for run in runs}


def chosen_rates(budget: Budget, records: Records) -> dict[str, float]:
    """Label of a variant to the rate with the best validation accuracy, once all its rates were tried.

    Among equals the one nearest to the centre wins, and of two equally near the smaller; the smallest where all
    diverged.
    """
    missing = {run.label for phase in COMPARED for run in runs_of(phase, budget, {}) if run.key not in records}
    chosen = {}
    for variant in itertools.chain(*COMPARED.values()):
        order = rates(variant, budget)
        good = {rate: value for rate, value in rate_scores(variant, budget, records).items() if value is not None}
        if variant.label not in missing:
            equals = [rate for rate, value in good.items() if value == max(good.values())] or [order[0]]
            middle = order.index(variant.centre)
            chosen[variant.label] = min(equals, key=lambda rate: (abs(order.index(rate) - middle), rate))
    return chosen


@dataclass(frozen=True)
class Cell:
    """The scores of one line of a table on one task, a seed each; accuracy, or loss per token."""

    scores: tuple[float, ...]
    is_loss: bool
    num_examples: int = 0
    """Test examples behind each score."""
    num_failed: int = 0
    """Seeds whose training diverged."""

    @classmethod
    def of(cls, runs: Iterable[Run], records: Records, is_loss: bool) -> Cell:
        """The scores of the runs that are done."""
        found = [records[run.key] for run in runs if run.key in records]
        scores = tuple(value for record in found if (value := score(record)) is not None)
        return cls(scores, is_loss, max((r.get("count", 0) for r in found), default=0), len(found) - len(scores))

    @property
    def mean(self) -> float:
        """Over seeds; NaN if there are none."""
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 with fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean: the test sample's, for accuracy, and the seeds'; infinite where unknown."""
        if not self.scores or (self.is_loss and len(self.scores) < 2):
            return math.inf
        sampling = 0.0 if self.is_loss or not self.num_examples else self.mean * (1 - self.mean) / self.num_examples
        return math.sqrt(sampling + self.spread**2 / len(self.scores))

    def __str__(self) -> str:
        """Percent for accuracy, nats for loss, with the spread where there is one."""
        failed = f" ({self.num_failed} diverged)" if self.num_failed else ""
        if not self.scores:
            return failed.strip(" ()") or "–"
        scale, digits = (1.0, 3) if self.is_loss else (100.0, 1)
        spread = f" ± {self.spread * scale:.{digits}f}" if len(self.scores) > 1 else ""
        return f"{self.mean * scale:.{digits}f}{spread}{failed}"
