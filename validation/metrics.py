"""How far a target's arrays are from the reference's: pure NumPy, no judgement."""

from __future__ import annotations

import numpy as np

HISTOGRAM_EDGES = np.arange(-9.0, 3.0, 0.5)
"""Bins of log10 of the absolute error."""


def relative(target: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the reference's largest absolute value; infinite for NaN or another shape."""
    if target.shape != reference.shape or not np.isfinite(target).all():
        return float("inf")
    scale = float(np.abs(reference).max(initial=0.0))
    error = max_abs(target, reference)
    return error / scale if scale else error


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
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 0.0


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
