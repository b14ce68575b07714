"""Every row of the table lets honest rounding pass and stops an output that is deliberately wrong."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from iapt_export.errors import IaptError
from validation.metrics import relative
from validation.stages import Errors
from validation.tolerances import STAGES, TABLE, Tolerance, rows_for, tolerance

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
LAYERS = 30
RELATIVE = [row for row in TABLE if row.metric == "relative"]
SHARES = [row for row in TABLE if row.metric != "relative"]


def name(row: Tolerance) -> str:
    return f"{row.stage}, {row.dtype}"


def residual_sums(dtype: str) -> np.ndarray:
    """A stream ``[tokens, width]`` that 30 layers add to, rounded to ``dtype`` after each, as a decoder's is."""
    source = np.random.default_rng(0)
    stream = np.zeros((16, 64), np.float32)
    for _ in range(LAYERS):
        update = source.normal(size=stream.shape).astype(np.float32)
        stream = (stream + update.astype(DTYPES[dtype]).astype(np.float32)).astype(DTYPES[dtype]).astype(np.float32)
    return stream


def exact_sums() -> np.ndarray:
    source = np.random.default_rng(0)
    return np.sum([source.normal(size=(16, 64)) for _ in range(LAYERS)], axis=0)


def passes(row: Tolerance, value: float) -> bool:
    errors = Errors()
    errors.judge(row.stage, "case", row.dtype, {row.metric: value})
    (check,) = errors.checks
    assert check.limits == {row.metric: row.limit}
    return check.passed


def wrong_outputs(honest: np.ndarray, row: Tolerance) -> dict[str, np.ndarray]:
    """Outputs as real mistakes make them."""
    spiked = honest.copy()
    spiked[3, 5] += 3 * row.limit * np.abs(honest).max()
    unknown = honest.copy()
    unknown[0, 0] = math.nan
    return {
        "nothing was computed": np.zeros_like(honest),
        "tokens moved by one": np.roll(honest, 1, axis=0),
        "a sign": -honest,
        "rows swapped": honest[::-1],
        "half again too large": honest * 1.5,
        "one element": spiked,
        "NaN": unknown,
        "a token is missing": honest[1:],
    }


@pytest.mark.parametrize("row", RELATIVE, ids=name)
def test_honest_rounding_passes(row: Tolerance) -> None:
    assert passes(row, relative(residual_sums(row.dtype), exact_sums()))


@pytest.mark.parametrize("row", RELATIVE, ids=name)
def test_wrong_outputs_fail(row: Tolerance) -> None:
    reference = exact_sums()
    for mistake, output in wrong_outputs(residual_sums(row.dtype), row).items():
        assert not passes(row, relative(output, reference)), mistake


@pytest.mark.parametrize("row", RELATIVE, ids=name)
def test_rounding_of_the_next_coarser_type_does_not_pass_for_free(row: Tolerance) -> None:
    """The limits keep the types apart: fp16 noise is no fp32 result, and eight bits are nobody's."""
    if row.dtype == "fp32":
        assert not passes(row, relative(residual_sums("fp16"), exact_sums()))
    coarse = exact_sums()
    step = np.abs(coarse).max() / 2
    assert not passes(row, relative(np.round(coarse / step) * step, exact_sums()))


@pytest.mark.parametrize("row", SHARES, ids=name)
def test_shares_are_lower_limits(row: Tolerance) -> None:
    assert passes(row, 1.0) and passes(row, row.limit)
    for share in (0.0, row.limit - 0.01, 0.8, math.nan):
        assert not passes(row, share)


@pytest.mark.parametrize("row", TABLE, ids=name)
def test_nan_never_passes(row: Tolerance) -> None:
    assert not row.holds(math.nan)
    if row.metric == "relative":
        assert not row.holds(math.inf)
        assert row.holds(row.limit) and not row.holds(np.nextafter(row.limit, 1))


def test_the_table_is_complete() -> None:
    """Each judged stage has a limit in each type, once, with a reason; looser types have looser limits."""
    keys = [(row.stage, row.dtype) for row in TABLE]
    assert len(set(keys)) == len(keys)
    judged = set(STAGES) - {"interface"}
    assert {key for key in keys if key[1] == "fp32"} == {(stage, "fp32") for stage in judged}
    for dtype in ("fp16", "bf16"):
        assert {stage for stage, mine in keys if mine == dtype} == judged - {"greedy tokens"}
    assert all(len(row.reason) > 20 for row in TABLE)
    for stage in {row.stage for row in RELATIVE}:
        limits = [tolerance(stage, dtype) for dtype in DTYPES]
        assert [limit.limit for limit in limits if limit] == sorted(limit.limit for limit in limits if limit)


def test_looking_up() -> None:
    limit = tolerance("prefill logits", "fp16")
    assert limit is not None and (limit.stage, limit.dtype, limit.metric) == ("prefill logits", "fp16", "relative")
    assert tolerance("greedy tokens", "fp16") is None
    for stage, dtype in (("prefill", "fp32"), ("generator", "int8")):
        with pytest.raises(IaptError, match=f"there is no tolerance for stage '{stage}' in '{dtype}'"):
            tolerance(stage, dtype)


def test_rows_for_the_report() -> None:
    rows = rows_for({"fp16"})
    assert {row["dtype"] for row in rows} == {"fp16"} and len(rows) == 6
    assert set(rows[0]) == {"stage", "dtype", "metric", "limit", "reason"}
