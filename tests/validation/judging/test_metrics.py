"""The figures themselves: exact on small arrays, infinite where nothing can be compared."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from validation.judging.metrics import HISTOGRAM_EDGES, cosine, entry_errors, error_counts, max_abs, relative, worst_but

REFERENCE = np.array([[1.0, -4.0], [0.5, 2.0]], np.float32)


def changed(value: float) -> np.ndarray:
    array = REFERENCE.copy()
    array[1, 0] = value
    return array


def test_exact_figures() -> None:
    target = changed(0.75)
    assert max_abs(target, REFERENCE) == 0.25
    assert relative(target, REFERENCE) == 0.25 / 4.0
    assert relative(REFERENCE, REFERENCE) == 0.0
    assert cosine(REFERENCE, REFERENCE) == pytest.approx(1.0)
    assert cosine(-REFERENCE, REFERENCE) == pytest.approx(-1.0)
    assert cosine(2 * REFERENCE, REFERENCE) == pytest.approx(1.0), "cosine is blind to size; relative is not"
    assert relative(2 * REFERENCE, REFERENCE) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_wrong(value: float) -> None:
    assert relative(changed(value), REFERENCE) == math.inf
    assert max_abs(changed(value), REFERENCE) == math.inf
    assert cosine(changed(value), REFERENCE) == 0.0


def test_a_reference_that_is_not_finite_never_agrees() -> None:
    for metric in (relative, max_abs):
        assert not metric(REFERENCE, changed(math.nan)) <= 1e9


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2), (2, 1), (2, 3), (0, 2)])
def test_another_shape_is_infinitely_wrong(shape: tuple[int, ...]) -> None:
    target = np.ones(shape, np.float32)
    assert relative(target, REFERENCE) == max_abs(target, REFERENCE) == math.inf
    if target.size != REFERENCE.size:
        assert cosine(target, REFERENCE) == 0.0


def test_a_reference_of_zeros_is_compared_absolutely() -> None:
    zeros = np.zeros(3, np.float32)
    assert relative(zeros, zeros) == 0.0
    assert relative(np.array([0, 0, 0.5], np.float32), zeros) == 0.5
    assert cosine(zeros, zeros) == 0.0


def test_empty_arrays_agree() -> None:
    empty = np.zeros((0, 4), np.float32)
    assert relative(empty, empty) == max_abs(empty, empty) == 0.0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_compared_in_full(dtype: type) -> None:
    """60000 - (-60000) overflows fp16."""
    big = np.array([40000.0], dtype)
    assert max_abs(big, np.array([-40000.0], np.float32)) == float(big[0]) + 40000.0


def test_histogram_counts_every_element_once() -> None:
    reference = np.zeros(6)
    target = np.array([0.0, 1e-12, 3e-4, 3e-4, 0.5, 1e9])
    counts = error_counts(target, reference)
    assert counts.sum() == 6 and len(counts) == len(HISTOGRAM_EDGES) - 1
    assert (counts[0], counts[-1]) == (2, 1), "the ends are open"
    low = np.searchsorted(HISTOGRAM_EDGES, math.log10(3e-4)) - 1
    assert counts[low] == 2


def test_a_share_of_the_worst_is_left_out_where_there_are_enough() -> None:
    errors = [0.1] * 197 + [9.0, 8.0, 7.0]
    assert worst_but(errors, 0.0) == 9.0
    assert worst_but(errors, 0.01) == 7.0
    assert worst_but(errors, 0.02) == 0.1
    assert worst_but([0.1] * 7 + [5.0], 0.01) == 0.1, "of eight, one"
    assert worst_but([0.1] * 7 + [5.0], 0.0) == 5.0
    assert worst_but([0.1] * 6 + [5.0], 0.01) == 5.0, "of fewer, none"
    assert worst_but([], 0.01) == 0.0
    for value in (float("inf"), float("nan")):
        assert worst_but([0.1, value], 0.0) == float("inf")
        assert worst_but([*errors, value], 0.02) == float("inf"), "what is not finite is never left out"


def test_errors_of_cache_entries() -> None:
    reference = np.zeros((2, 3, 4), np.float32)
    reference[1, 0, 2] = -10.0
    target = reference.copy()
    target[0, 1, 3] = 5.0
    target[1, 2, 0] = float("nan")
    assert entry_errors(target, reference).tolist() == [0.0, 0.5, float("inf")]
    assert entry_errors(target[:, :2], reference).tolist() == [float("inf")] * 3
    assert entry_errors(reference[:, :0], reference[:, :0]).tolist() == []
