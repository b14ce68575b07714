"""Every row of the table lets honest rounding pass and stops an output that is deliberately wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from iapt_export.contract.errors import IaptError
from validation.judging.metrics import kl, relative
from validation.judging.stages import Errors
from validation.judging.tolerances import ANY, CEILINGS, STAGES, TABLE, Tolerance, rows_for, tolerance, tolerances

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
BITS = {"int8": 8, "fp8": 6, "nvfp4": 5, "int4": 4}
"""Coarse weights, to the bits of integers that are about as far from fp32. Their limits of the worst are wide: they are
held against gross mistakes only."""
GROSS = {
    "int8": ("nothing was computed", "tokens moved by one", "a sign", "rows swapped", "NaN", "a token is missing"),
    "fp8": ("nothing was computed", "tokens moved by one", "a sign", "rows swapped", "NaN", "a token is missing"),
    "nvfp4": ("a sign", "NaN", "a token is missing"),
    "int4": ("a sign", "NaN", "a token is missing"),
}
LOCATING = ("hidden states", "module")
"""Stages that decide where to look; graphs of int8 and int4 are looked into with fp32's limits."""
LAYERS = 30
RELATIVE = [row for row in TABLE if row.metric == "relative"]
SHARES = [row for row in TABLE if row.metric not in CEILINGS]
KL = [row for row in TABLE if row.metric == "kl"]


def name(row: Tolerance) -> str:
    return f"{row.stage}, {row.dtype}, {row.metric}"


def residual_sums(dtype: str) -> np.ndarray:
    """A stream ``[tokens, width]`` that 30 layers add to, rounded to ``dtype`` after each, as a decoder's is."""
    source = np.random.default_rng(0)
    stream = np.zeros((16, 64), np.float32)
    for _ in range(LAYERS):
        update = source.normal(size=stream.shape).astype(np.float32)
        stream = rounded(stream + rounded(update, dtype), "fp32" if dtype in BITS else dtype)
    return stream


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype not in BITS:
        return array.astype(DTYPES[dtype]).astype(np.float32)
    step = np.abs(array).max() / (2 ** (BITS[dtype] - 1) - 1)
    return (np.round(array / step) * step).astype(np.float32)


def exact_sums() -> np.ndarray:
    source = np.random.default_rng(0)
    return np.sum([source.normal(size=(16, 64)) for _ in range(LAYERS)], axis=0)


def passes(row: Tolerance, value: float) -> bool:
    errors = Errors()
    dtype = "fp32" if row.dtype == ANY else row.dtype
    others = {other.metric: 0.0 if other.metric in CEILINGS else 1.0 for other in tolerances(row.stage, dtype)}
    errors.judge(row.stage, "case", dtype, others | {row.metric: value})
    (check,) = errors.checks
    assert check.limits[row.metric] == row.limit
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
        is_wide = row.dtype in BITS and row.stage != "typical logits"
        assert (is_wide and mistake not in GROSS[row.dtype]) or not passes(row, relative(output, reference)), mistake


@pytest.mark.parametrize("row", RELATIVE, ids=name)
def test_rounding_of_the_next_coarser_type_does_not_pass_for_free(row: Tolerance) -> None:
    """The limits keep the types apart: fp16 noise is no fp32 result, and eight bits are nobody's."""
    if row.dtype == "fp32":
        assert not passes(row, relative(residual_sums("fp16"), exact_sums()))
    if row.dtype in BITS or (row.stage == "hidden states" and row.dtype == "bf16"):
        return
    coarse = exact_sums()
    step = np.abs(coarse).max() / 2
    assert not passes(row, relative(np.round(coarse / step) * step, exact_sums()))


@pytest.mark.parametrize("row", KL, ids=name)
def test_divergence_passes_honest_rounding_and_stops_wrong_logits(row: Tolerance) -> None:
    logits, reference = residual_sums(row.dtype)[0], exact_sums()[0]
    assert passes(row, kl(logits, reference))
    for wrong in (np.roll(logits, 1), -logits, np.full_like(logits, math.nan)):
        assert not passes(row, kl(wrong, reference))
    if row.dtype in BITS:
        return
    for wrong in (np.zeros_like(logits), logits * 1.5):
        assert not passes(row, kl(wrong, reference))
    swapped = logits.copy()
    best, second = np.argsort(logits)[[-1, -2]]
    swapped[[best, second]] = swapped[[second, best]]
    assert not passes(row, kl(swapped, reference))


@pytest.mark.parametrize("row", SHARES, ids=name)
def test_shares_are_lower_limits(row: Tolerance) -> None:
    assert passes(row, 1.0) and passes(row, row.limit)
    for share in (0.0, row.limit - 0.01, row.limit - 0.01 if row.dtype in BITS else 0.8, math.nan):
        assert not passes(row, share)


@pytest.mark.parametrize("row", TABLE, ids=name)
def test_nan_never_passes(row: Tolerance) -> None:
    assert not row.holds(math.nan)
    if row.metric == "relative":
        assert not row.holds(math.inf)
        assert row.holds(row.limit) and not row.holds(np.nextafter(row.limit, math.inf))


def test_the_table_is_complete() -> None:
    """Each judged stage has its limits in each type, once, with a reason that quotes a measurement."""
    keys = [(row.stage, row.dtype, row.metric) for row in TABLE]
    assert len(set(keys)) == len(keys)
    judged = set(STAGES) - {"interface", "refusal", "typical logits"}
    assert {row.stage for row in TABLE if row.dtype == "fp32"} == judged
    for dtype in ("fp16", "bf16"):
        assert {row.stage for row in TABLE if row.dtype == dtype} == judged - {"greedy tokens"}
    for dtype in BITS:
        quantised = judged - {"greedy tokens", "generator", *LOCATING} | {"typical logits"}
        assert {row.stage for row in TABLE if row.dtype == dtype} == quantised
    assert all(len(row.reason) > 20 for row in TABLE)
    for stage in {row.stage for row in RELATIVE}:
        limits = [tolerance(stage, dtype) for dtype in (BITS if stage == "typical logits" else DTYPES)]
        assert [limit.limit for limit in limits if limit] == sorted(limit.limit for limit in limits if limit)


RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "tolerances"
RECORDS = {"fp32": ("fp32", "fp32-cases")}
"""Files that say what was measured in a type; the type's own by default."""


def worst(row: Tolerance, *names: str) -> float:
    """The largest figure that the records have for a row's stage and metric."""
    stages = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["stages"] for name in names]
    found = [each[row.stage] for each in stages if row.stage in each]
    few = (row.stage, row.dtype) == ("generator", "fp32")  # one batch through the graph of the generators alone
    # a quick validation has one case of so many rows and steps
    least = 2 if (row.stage, row.dtype) in (("typical logits", "fp8"), ("typical logits", "nvfp4")) else 5
    assert sum(stage["samples"] for stage in found) >= (1 if few else least)
    return max(stage[row.metric]["worst"] for stage in found)


@pytest.mark.parametrize("row", [row for row in TABLE if row.metric in CEILINGS], ids=name)
def test_what_was_measured_passes_with_room_to_spare(row: Tolerance) -> None:
    """The recorded noise of real hidden states stays below the limit, and not a hundredfold below."""
    figure = worst(row, *RECORDS.get(row.dtype, (row.dtype,)))
    assert figure < row.limit / 1.5
    if row.metric == "relative":
        assert figure > row.limit / 500, "so wide a limit was not measured but guessed"


FP32 = [row for row in TABLE if row.dtype == "fp32" and row.metric in CEILINGS and row.stage != "generator"]
"""Bundles of int8 and int4 have no graph of generators alone."""


@pytest.mark.parametrize("row", FP32, ids=name)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rounded_weights_on_both_sides_need_no_more_than_fp32(row: Tolerance, dtype: str) -> None:
    assert worst(row, f"{dtype}-unrounded") < row.limit / 1.5


def test_looking_up() -> None:
    limit = tolerance("prefill logits", "fp16")
    assert limit is not None and (limit.stage, limit.dtype, limit.metric) == ("prefill logits", "fp16", "relative")
    assert [row.metric for row in tolerances("decode logits", "bf16")] == ["relative", "kl"]
    assert tolerance("greedy tokens", "fp16") is None
    assert [row.metric for row in tolerances("greedy tokens", "fp16")] == ["answered"]
    assert [row.dtype for row in tolerances("refusal", "fp16")] == [ANY]
    for stage, dtype in (("prefill", "fp32"), ("generator", "int2"), ("generator", ANY)):
        with pytest.raises(IaptError, match=f"there is no tolerance for stage '{stage}' in '{dtype}'"):
            tolerance(stage, dtype)


def test_rows_for_the_report() -> None:
    rows = rows_for({"fp16"})
    assert {row["dtype"] for row in rows} == {"fp16", ANY} and len(rows) == 12
    assert set(rows[0]) == {"stage", "dtype", "metric", "limit", "reason"}
