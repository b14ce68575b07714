"""The one table of limits: stage and dtype to the largest error that passes, each with its reason.

Figures are relative: the largest absolute difference of a tensor over the largest absolute value of
the reference's, so that one limit serves layers whose keys differ a hundredfold in size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from iapt_export.errors import IaptError

ANY = "any"
"""The dtype of limits that do not depend on it."""
STAGES = (
    "interface",
    "generator",
    "prefill logits",
    "prefill cache",
    "decode logits",
    "decode cache",
    "top-1 agreement",
    "greedy tokens",
    "refusal",
    "hidden states",
    "module",
)


CEILINGS = ("relative", "kl")
"""Metrics that must not be larger than their limit."""


@dataclass(frozen=True)
class Tolerance:
    """A limit for one metric of one stage in one dtype."""

    stage: str
    dtype: str
    metric: str
    """Those of `CEILINGS` are upper limits; ``agreement``, ``identical`` and ``refused`` are lower ones."""
    limit: float
    reason: str

    def holds(self, value: float) -> bool:
        """Whether a measured value passes; NaN never does."""
        return value <= self.limit if self.metric in CEILINGS else value >= self.limit


_FP32 = "summation order differs between runtimes; 30 layers leave a few 1e-6, the limit is about ten times that"
_FP32_CACHE = (
    "as above, but where a prompt becomes the attention sink its huge hidden state cancels out in the last layers: "
    "1.1e-4 for a LAMP adapter on SmolLM2, where PyTorch itself is 2e-5 from fp64; the limit is five times that"
)
_FP16 = "11 significant bits, rounded once an operator over 30 layers of residual sums"
_BF16 = "8 significant bits, rounded once an operator over 30 layers of residual sums"

TABLE = (
    Tolerance("refusal", ANY, "refused", 1.0, "what is out of range must be refused in words, never answered"),
    Tolerance("hidden states", "fp32", "relative", 2e-3, "to be measured"),
    Tolerance("module", "fp32", "relative", 1e-4, "to be measured"),
    Tolerance("hidden states", "fp16", "relative", 2e-1, "to be measured"),
    Tolerance("module", "fp16", "relative", 2e-2, "to be measured"),
    Tolerance("hidden states", "bf16", "relative", 5e-1, "to be measured"),
    Tolerance("module", "bf16", "relative", 1e-1, "to be measured"),
    Tolerance("generator", "fp32", "relative", 2e-5, "two projections and a softmax; fp32 rounding only"),
    Tolerance("prefill logits", "fp32", "relative", 1e-4, _FP32),
    Tolerance("prefill cache", "fp32", "relative", 5e-4, _FP32_CACHE),
    Tolerance("decode logits", "fp32", "relative", 1e-4, _FP32),
    Tolerance("decode cache", "fp32", "relative", 5e-4, _FP32_CACHE),
    Tolerance("top-1 agreement", "fp32", "agreement", 0.999, "only ties within the logits' tolerance may differ"),
    Tolerance("greedy tokens", "fp32", "identical", 1.0, "every row identical, or its first difference an excused tie"),
    Tolerance("generator", "fp16", "relative", 2e-2, _FP16),
    Tolerance("prefill logits", "fp16", "relative", 5e-2, _FP16),
    Tolerance("prefill cache", "fp16", "relative", 5e-2, _FP16),
    Tolerance("decode logits", "fp16", "relative", 5e-2, _FP16),
    Tolerance("decode cache", "fp16", "relative", 5e-2, _FP16),
    Tolerance("top-1 agreement", "fp16", "agreement", 0.95, "near ties change sides under rounding"),
    Tolerance("generator", "bf16", "relative", 1e-1, _BF16),
    Tolerance("prefill logits", "bf16", "relative", 2e-1, _BF16),
    Tolerance("prefill cache", "bf16", "relative", 2e-1, _BF16),
    Tolerance("decode logits", "bf16", "relative", 2e-1, _BF16),
    Tolerance("decode cache", "bf16", "relative", 2e-1, _BF16),
    Tolerance("top-1 agreement", "bf16", "agreement", 0.85, "near ties change sides under rounding"),
)


def tolerance(stage: str, dtype: str) -> Tolerance | None:
    """The limit for a stage and dtype; None where a stage is reported but not judged (greedy tokens below fp32).

    Raises:
        IaptError: no such stage or dtype.
    """
    if stage not in STAGES or dtype not in {row.dtype for row in TABLE} - {ANY}:
        raise IaptError(f"there is no tolerance for stage {stage!r} in {dtype!r}")
    return next((row for row in TABLE if (row.stage, row.dtype) == (stage, dtype)), None)


def tolerances(stage: str, dtype: str) -> list[Tolerance]:
    """Every limit for a stage and dtype, one a metric; none where a stage is reported but not judged.

    Raises:
        IaptError: no such stage or dtype.
    """
    tolerance(stage, dtype)
    return [row for row in TABLE if row.stage == stage and row.dtype in (dtype, ANY)]


def rows_for(dtypes: set[str]) -> list[dict[str, Any]]:
    """The table's rows for these dtypes, as plain dictionaries for the report."""
    return [dataclasses.asdict(row) for row in TABLE if row.dtype in dtypes | {ANY}]
