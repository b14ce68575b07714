"""How far a target's arrays are from the reference's: pure NumPy, no judgement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HISTOGRAM_EDGES = np.arange(-9.0, 3.0, 0.5)
"""Bins of log10 of the absolute error."""
ENOUGH = 8
"""Errors of which one at least may be left out."""


def relative(target: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the reference's largest absolute value; infinite for NaN or another shape."""
    if target.shape != reference.shape or not np.isfinite(target).all():
        return float("inf")
    scale = float(np.abs(reference).max(initial=0.0))
    error = max_abs(target, reference)
    return error / scale if scale else error


def entry_errors(target: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`relative` of each cache entry alone ``[S]``, of ``[H, S, K]``; the scale is that of all entries."""
    if target.shape != reference.shape:
        return np.full(reference.shape[1], np.inf)
    scale = float(np.abs(reference).max(initial=0.0)) or 1.0
    errors = np.abs(target.astype(np.float64) - reference).max(axis=(0, 2), initial=0.0) / scale
    return np.where(np.isfinite(errors), errors, np.inf)


def worst_but(errors: Sequence[float] | np.ndarray, share: float) -> float:
    """The largest error, once the worst ``share`` is left out: one at least of `ENOUGH` or more, none of fewer.

    Infinite when any is: NaN is a fault wherever it stands, and no rounding.
    """
    ordered = np.sort(np.asarray(errors, np.float64))
    if not np.isfinite(ordered).all():
        return float("inf")
    left_out = max(int(ordered.size * share), 1) if share and ordered.size >= ENOUGH else 0
    return float(ordered[-1 - left_out]) if ordered.size else 0.0


def max_abs(target: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference; infinite for NaN or another shape."""
    if target.shape != reference.shape or not np.isfinite(target).all():
        return float("inf")
    return float(np.abs(target.astype(np.float64) - reference).max(initial=0.0))


def cosine(target: np.ndarray, reference: np.ndarray) -> float:
    """Cosine of the angle between two arrays taken as vectors; 0 where either is all zero or not finite."""
    a, b = target.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if a.shape != b.shape or not np.isfinite(a).all():
        return 0.0
    # einsum and not `@`: after BLAS, ONNX Runtime's next step took twice as long, perhaps because of BLAS' threads
    inner, square_a, square_b = (float(np.einsum("i,i->", *pair)) for pair in ((a, b), (a, a), (b, b)))
    length = (square_a * square_b) ** 0.5
    return inner / length if length else 0.0


def kl(target: np.ndarray, reference: np.ndarray) -> float:
    """Kullback-Leibler divergence ``sum p log(p / q)`` in nats, p and q the softmax of reference and target logits.

    Infinite for NaN or another shape.
    """
    if target.shape != reference.shape or not np.isfinite(target).all():
        return float("inf")
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (reference, target))
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def quantiles(target: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Median and 99th percentile of the absolute errors, and of the errors over each element's own value.

    Infinite for NaN or another shape. Elements of the reference that are zero count for the absolute ones alone.
    """
    if target.shape != reference.shape or not np.isfinite(target).all():
        return dict.fromkeys(("abs_p50", "abs_p99", "rel_p50", "rel_p99"), float("inf"))
    errors = np.abs(target.astype(np.float64) - reference).ravel()
    size = np.abs(reference.astype(np.float64)).ravel()
    ratios = errors[size > 0] / size[size > 0]
    figures: dict[str, float] = {}
    for name, values in (("abs", errors), ("rel", ratios)):
        for share in (50, 99):
            place = values.size * share // 100
            figure = float(np.partition(values, place)[place]) if values.size else 0.0
            figures[f"{name}_p{share}"] = figure
    return figures


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def error_counts(target: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How many elements' absolute errors fall into each bin of `HISTOGRAM_EDGES`, as log10; ends are open."""
    errors = np.abs(target.astype(np.float64) - reference).ravel()
    exponents = np.log10(np.maximum(errors, 1e-300))
    counts, _ = np.histogram(np.clip(exponents, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)
    return counts


def worst_vector(target: np.ndarray, reference: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """Largest error of any vector along the last axis, relative to that vector's own largest value.

    A decoder's first token has hidden states a thousand times as large as the others'; one scale for the whole tensor
    would hide errors everywhere else. Vectors that are far smaller than most are measured by a tenth of the median.

    Returns:
        The error, infinite for NaN or another shape, and the vector's index.
    """
    if target.shape != reference.shape or not target.size:
        return (0.0 if target.shape == reference.shape else float("inf")), ()
    difference = np.abs(target.astype(np.float64) - reference).max(axis=-1)
    scale = np.abs(reference).max(axis=-1).astype(np.float64)
    scale = np.maximum(scale, max(0.1 * float(np.median(scale)), 1e-30))
    errors = np.where(np.isfinite(difference), difference / scale, np.inf)
    where = np.unravel_index(int(errors.argmax()), errors.shape) if errors.ndim else ()
    return float(errors.max()), tuple(int(index) for index in where)
