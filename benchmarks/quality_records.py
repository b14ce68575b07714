"""The data splits of `benchmarks/quality.py`, and what its records say: scores and chosen learning rates."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_plan import MAX_CHARACTERS, VARIANTS, Budget, Run, Variant, rates, runs_of

SPLIT_SEED = 20
SYSTEM_MESSAGE = "Answer briefly."
Records = Mapping[str, Mapping[str, Any]]
"""A run's key to its record: `Run.summary`, ``accuracy`` or ``loss`` (nats per token) or ``error``, and more."""


def score(record: Mapping[str, Any] | None) -> float | None:
    """Accuracy of a classification record, loss per token of a generation record; None if missing or failed."""
    return None if record is None else record.get("accuracy", record.get("loss"))


def rate_scores(variant: Variant, budget: Budget, records: Records) -> dict[float, float | None]:
    """Learning rate to validation accuracy, of a variant; None where the run is missing or failed."""
    runs = [run for run in runs_of("rates", budget, {}) if run.label == variant.label]
    return {run.learning_rate: score(records.get(run.key)) for run in runs}


def chosen_rates(budget: Budget, records: Records) -> dict[str, float]:
    """Label of a variant to the rate with the best validation accuracy, once all its rates were tried.

    Among equals the one nearest to the middle wins, and of two equally near the smaller; the smallest where all
    diverged.
    """
    missing = {run.label for run in runs_of("rates", budget, {}) if run.key not in records}
    chosen = {}
    for variant in VARIANTS:
        order = rates(variant, budget)
        good = {rate: value for rate, value in rate_scores(variant, budget, records).items() if value is not None}
        if variant.label not in missing:
            equals = [rate for rate, value in good.items() if value == max(good.values())] or [order[0]]
            chosen[variant.label] = min(equals, key=lambda rate: (abs(order.index(rate) - len(order) // 2), rate))
    return chosen


def make_splits(training: Path, held_out: Path, folder: Path, budget: Budget) -> dict[str, Path]:
    """Cut a task's prepared files into ``train``, ``validation`` and ``test``, disjoint by construction.

    Validation comes from the training file, test from the held-out one. Sizes and `SPLIT_SEED` decide, not the
    run's seed, so that every run of a plan is measured on the same examples.

    Returns:
        Split name to its JSONL file.
    """
    rows = {path: path.read_text(encoding="utf-8").splitlines() for path in (training, held_out)}
    for lines in rows.values():
        random.Random(SPLIT_SEED).shuffle(lines)
    # A small task keeps most of its rows for training.
    validation = min(budget.validation_rows, len(rows[training]) // 4)
    parts = {
        "validation": rows[training][:validation],
        "train": rows[training][validation:][: budget.train_rows or None],
        "test": rows[held_out][: budget.test_rows or None],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{training.name.split('.')[0]}.{name}.jsonl" for name in parts}
    for name, lines in parts.items():
        paths[name].write_text("".join(f"{as_messages(line)}\n" for line in lines), encoding="utf-8")
    return paths


def as_messages(line: str) -> str:
    """A JSONL row as messages with a short system message.

    The default one of the backbone's chat template has three times as many tokens as a headline, and would take the
    comparison as much longer.
    """
    row = json.loads(line)
    question, text = row["instruction"], row.get("input", "")
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS].rpartition(" ")[0] or text[:MAX_CHARACTERS]
    contents = {"system": SYSTEM_MESSAGE, "user": f"{question}\n\n{text}".strip(), "assistant": row["output"]}
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in contents.items()]})


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
