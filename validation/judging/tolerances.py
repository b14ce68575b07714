"""The one table of limits: stage and dtype to the largest error that passes, each with its reason.

Figures are relative: the largest absolute difference of a tensor over the largest absolute value of
the reference's, so that one limit serves layers whose keys differ a hundredfold in size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from iapt_export.contract.errors import IaptError

ANY = "any"
"""The dtype of limits that do not depend on it."""
STAGES = (
    "interface",
    "generator",
    "prefill logits",
    "prefill cache",
    "decode logits",
    "decode cache",
    "typical logits",
    "top-1 agreement",
    "greedy tokens",
    "refusal",
    "hidden states",
    "module",
)


CEILINGS = ("relative", "kl")
"""Metrics that must not be larger than their limit."""

OUTLIERS = {"int8": 0.01, "int4": 0.01, "fp8": 0.01, "nvfp4": 0.01}
"""Share of a case's rows and steps, and of a row's cache entries, that coarse weights may get wrong by any finite
amount, one at least of eight or more: places at which a rounding decides where attention goes, or which of two classes
an adapter names."""
COMPARED_FOR_A_SHARE = 64
"""Rows and steps that a case compares at least before coarse weights' median errors are judged, and top-1 agreement in
every type but fp32, whose ties are excused. Of two short rows of coarse weights one may be an outlier throughout."""


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


_ORT = "ONNX Runtime against PyTorch on SmolLM2-135M (results/tolerances/fp32*.json): worst"
_SINK = (
    "where a prompt becomes the attention sink its huge hidden state cancels out in the last layers: 1.1e-4 for a "
    "LAMP adapter, where PyTorch itself is 2e-5 from fp64; five times that"
)
_RAW = "a hardly trained IAPT adapter that reads raw hidden states"
_STAND_IN = "PyTorch in the type against fp32, SmolLM2-135M"
_BITS = "ONNX Runtime against PyTorch in fp32, SmolLM2-135M with adapters of every method, three seeds: worst"
_FLOATS = (
    "TensorRT's graphs in ONNX Runtime against PyTorch in fp32, SmolLM2-135M, the shipped adapters, two seeds: worst"
)
_TAIL = "half again or more: the tail is long, so this finds gross faults; typical logits finds the others"
_TIES = "near ties change sides under rounding"

TABLE = (
    Tolerance("greedy tokens", ANY, "answered", 1.0, "a prompt of a tenant's own that gets no answer is no rounding"),
    Tolerance("refusal", ANY, "refused", 1.0, "what is out of range must be refused in words, never answered"),
    Tolerance(
        "generator",
        "fp32",
        "relative",
        2e-5,
        f"{_ORT} 1.9e-7, but 6.3e-6 for {_RAW}, where PyTorch itself is 4.2e-6 from fp64; three times that",
    ),
    Tolerance(
        "prefill logits",
        "fp32",
        "relative",
        1.6e-4,
        f"{_ORT} 2.5e-6, but 1.0e-4 for one token read with int4's weights; half again: half precision must fail",
    ),
    Tolerance(
        "prefill logits",
        "fp32",
        "kl",
        1e-7,
        f"{_ORT} 7.2e-11 nats, but 1.8e-8 for {_RAW}; five times that",
    ),
    Tolerance("prefill cache", "fp32", "relative", 5e-4, f"{_ORT} 1.9e-5, but {_SINK}"),
    Tolerance("decode logits", "fp32", "relative", 3e-4, f"{_ORT} 9.1e-5, at 256 random steps; three times that"),
    Tolerance("decode logits", "fp32", "kl", 3e-7, f"{_ORT} 5.7e-8 nats, at 256 random steps; five times that"),
    Tolerance("decode cache", "fp32", "relative", 5e-4, f"{_ORT} 1.9e-5, but {_SINK}"),
    Tolerance("top-1 agreement", "fp32", "agreement", 0.999, "1.0 measured; ties within the logits' limit count"),
    Tolerance("greedy tokens", "fp32", "identical", 1.0, "every row identical, or its first difference an excused tie"),
    Tolerance("hidden states", "fp32", "relative", 5e-4, f"{_ORT} 2.2e-5, but {_SINK}"),
    Tolerance("module", "fp32", "relative", 2e-5, f"{_ORT} 2.4e-6 on the module's own input; ten times that"),
    Tolerance("generator", "fp16", "relative", 3e-3, f"{_STAND_IN}: worst 7.1e-4; four times that"),
    Tolerance(
        "prefill logits", "fp16", "relative", 3e-2, f"{_STAND_IN}: worst 2.2e-3, 5.4e-3 in decode; five times that"
    ),
    Tolerance("prefill logits", "fp16", "kl", 1e-3, f"{_STAND_IN}: worst 1.9e-4 nats; five times that"),
    Tolerance("prefill cache", "fp16", "relative", 2e-2, f"{_STAND_IN}: worst 4.2e-3; five times that"),
    Tolerance("decode logits", "fp16", "relative", 3e-2, f"{_STAND_IN}: worst 5.4e-3; over five times that"),
    Tolerance("decode logits", "fp16", "kl", 1e-3, f"{_STAND_IN}: worst 1.8e-4 nats; five times that"),
    Tolerance("decode cache", "fp16", "relative", 2e-2, f"{_STAND_IN}: worst 4.1e-3; five times that"),
    Tolerance("top-1 agreement", "fp16", "agreement", 0.97, f"{_STAND_IN}: all of 48 agree; {_TIES}"),
    Tolerance("hidden states", "fp16", "relative", 1e-1, f"{_STAND_IN}: worst 3.2e-2; three times that"),
    Tolerance("module", "fp16", "relative", 5e-3, f"{_STAND_IN}: worst 1.6e-3 on its own input; three times that"),
    Tolerance("generator", "bf16", "relative", 2e-2, f"{_STAND_IN}: worst 5.2e-3; four times that"),
    Tolerance("prefill logits", "bf16", "relative", 2e-1, f"{_STAND_IN}: worst 3.5e-2; five times that"),
    Tolerance(
        "prefill logits", "bf16", "kl", 1e-1, f"{_STAND_IN}: worst 2.4e-3 nats, 2.5e-2 in decode; four times that"
    ),
    Tolerance("prefill cache", "bf16", "relative", 2e-1, f"{_STAND_IN}: worst 3.7e-2; five times that"),
    Tolerance("decode logits", "bf16", "relative", 2e-1, f"{_STAND_IN}: worst 5.9e-2; over three times that"),
    Tolerance("decode logits", "bf16", "kl", 1e-1, f"{_STAND_IN}: worst 2.5e-2 nats; four times that"),
    Tolerance("decode cache", "bf16", "relative", 2e-1, f"{_STAND_IN}: worst 4.9e-2; four times that"),
    Tolerance("top-1 agreement", "bf16", "agreement", 0.9, f"{_STAND_IN}: 0.99 agree; {_TIES}"),
    Tolerance("hidden states", "bf16", "relative", 4.5e-1, f"{_STAND_IN}: worst 0.28; half again too large must fail"),
    Tolerance("module", "bf16", "relative", 3e-2, f"{_STAND_IN}: worst 8.5e-3 on its own input; over three times that"),
    Tolerance("prefill logits", "int8", "relative", 0.5, f"{_BITS} 0.18, median 0.035; {_TAIL}"),
    Tolerance("prefill cache", "int8", "relative", 0.7, f"{_BITS} 0.30, median 0.055; {_TAIL}"),
    Tolerance("decode logits", "int8", "relative", 0.8, f"{_BITS} 0.36, median 0.063; {_TAIL}"),
    Tolerance("decode cache", "int8", "relative", 0.7, f"{_BITS} 0.30, median 0.056; {_TAIL}"),
    Tolerance("typical logits", "int8", "relative", 0.07, f"{_BITS} 0.041; over half again"),
    Tolerance("typical logits", "int8", "kl", 0.02, f"{_BITS} 0.010 nats; twice that"),
    Tolerance("top-1 agreement", "int8", "agreement", 0.8, f"{_BITS} 58 of 64; {_TIES}"),
    Tolerance(
        "prefill logits", "int4", "relative", 1.5, f"{_BITS} 0.70 (0.94 in a bundle tried before), median 0.17; {_TAIL}"
    ),
    Tolerance("prefill cache", "int4", "relative", 1.6, f"{_BITS} 1.0, median 0.27; {_TAIL}"),
    Tolerance("decode logits", "int4", "relative", 1.7, f"{_BITS} 1.1, median 0.34; {_TAIL}"),
    Tolerance("decode cache", "int4", "relative", 1.6, f"{_BITS} 1.0, median 0.27; {_TAIL}"),
    Tolerance("typical logits", "int4", "relative", 0.4, f"{_BITS} 0.24; over half again"),
    Tolerance("typical logits", "int4", "kl", 0.4, f"{_BITS} 0.24 nats; over half again"),
    Tolerance("top-1 agreement", "int4", "agreement", 0.5, f"{_BITS} 79 of 128; {_TIES}"),
    Tolerance("prefill logits", "fp8", "relative", 0.35, f"{_FLOATS} 0.12, median 0.066; {_TAIL}"),
    Tolerance("prefill cache", "fp8", "relative", 0.9, f"{_FLOATS} 0.46, median 0.070; {_TAIL}"),
    Tolerance("decode logits", "fp8", "relative", 0.6, f"{_FLOATS} 0.22, median 0.097; {_TAIL}"),
    Tolerance("decode cache", "fp8", "relative", 0.9, f"{_FLOATS} 0.19, but 0.46 in prefill; {_TAIL}"),
    Tolerance("typical logits", "fp8", "relative", 0.12, f"{_FLOATS} 0.068; over half again"),
    Tolerance("typical logits", "fp8", "kl", 0.06, f"{_FLOATS} 0.030 nats; twice that"),
    Tolerance("top-1 agreement", "fp8", "agreement", 0.75, f"{_FLOATS} 112 of 128; {_TIES}"),
    Tolerance("prefill logits", "nvfp4", "relative", 0.8, f"{_FLOATS} 0.28, median 0.13; {_TAIL}"),
    Tolerance("prefill cache", "nvfp4", "relative", 1.2, f"{_FLOATS} 0.35, median 0.19; {_TAIL}"),
    Tolerance("decode logits", "nvfp4", "relative", 1.2, f"{_FLOATS} 0.55, median 0.17; {_TAIL}"),
    Tolerance("decode cache", "nvfp4", "relative", 1.2, f"{_FLOATS} 0.35, median 0.22; {_TAIL}"),
    Tolerance("typical logits", "nvfp4", "relative", 0.2, f"{_FLOATS} 0.11; over half again"),
    Tolerance("typical logits", "nvfp4", "kl", 0.25, f"{_FLOATS} 0.115 nats; twice that"),
    Tolerance("top-1 agreement", "nvfp4", "agreement", 0.55, f"{_FLOATS} 94 of 128; {_TIES}"),
)


def tolerance(stage: str, dtype: str) -> Tolerance | None:
    """The limit for a stage and dtype; None where it has none of its own (greedy tokens below fp32).

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
