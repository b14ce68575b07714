"""Learnable rational activations (Pade activation units, Molina et al. 2019, arXiv 1907.06732).

    R(x) = P(x) / Q(x),  P(x) = sum_{j=0..m} a_j x^j
    form A: Q(x) = 1 + sum_{k=1..n} |b_k x^k|
    form B: Q(x) = 1 + |sum_{k=1..n} b_k x^k|

Both denominators are at least 1, so no input divides by zero. Evaluation is in fp32 by Horner's
rule whatever the tensor's type: x^5 leaves the fp16 range at |x| > 9.2.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erf, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iapt_export.contract.errors import IaptError

COEFFICIENTS = ("numerator", "denominator")
"""Parameters of a method that are a rational activation's."""
FIT_INTERVAL = (-3.0, 3.0)
"""The interval on which the published coefficients were fitted, and on which ours are."""
FIT_STARTS = (0.1, 1.0, 3.0, 10.0)
"""Weights of the denominators from which a fit starts, beside the linearised solution."""

# Initial coefficients published with ml-research/rational_activations (MIT), degrees (5, 4), ascending powers.
PUBLISHED: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("B", "gelu"): (
        (-4.22107e-4, 0.49999956, 0.40270535, 0.07366977, -0.01295479, -0.00374140),
        (4.95854e-5, 0.14729774, 1.16458e-5, -0.00748387),
    ),
    ("B", "relu"): (
        (0.03389713, 0.49999854, 1.67013636, 1.99010216, 0.94130896, 0.15091334),
        (-2.10402e-5, 3.98024785, -3.16634e-5, 0.30183382),
    ),
    ("B", "silu"): (
        (3.2597e-7, 0.50000001, 0.25001695, 0.05327520, 0.00580458, 0.00027530),
        (3.91729e-5, 0.10653084, 3.79915e-6, 0.00055031),
    ),
    ("B", "leaky_relu"): (
        (0.03355816, 0.50500592, 1.65346973, 2.01005016, 0.91931956, 0.15242646),
        (4.81283e-5, 3.98024791, 1.58376e-5, 0.30183383),
    ),
    ("B", "tanh"): (
        (2.117e-9, 0.99999425, 6.276e-7, 0.10770865, 2.947e-8, 0.00087112),
        (6.377e-7, 0.44101418, 2.275e-7, 0.01458104),
    ),
    ("A", "gelu"): (
        (-0.00124236, 0.50804971, 0.41586363, 0.13022719, 0.02435590, 0.00290284),
        (-0.06675016, 0.17927646, 0.03746683, 1.656e-10),
    ),
    ("A", "relu"): (
        (0.02996380, 0.61689784, 2.37534760, 3.06599005, 1.52468319, 0.25280709),
        (-1.19155012, 4.40804877, 0.91103571, 0.34884978),
    ),
    ("A", "leaky_relu"): (
        (0.02979278, 0.61837353, 2.32330906, 3.05193624, 1.48542033, 0.25102450),
        (-1.14195484, 4.39315997, 0.87147123, 0.34719662),
    ),
    ("A", "silu"): (
        (3.0549e-7, 0.50000079, 0.24999783, 0.05326628, 0.00580303, 0.00027520),
        (-4.11155e-6, 0.10652899, -1.26900e-6, 0.00055023),
    ),
}

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * 0.5 * (1.0 + np.array([erf(v / sqrt(2.0)) for v in x])),
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "tanh": np.tanh,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """Evaluate ``R(x)`` elementwise in fp32.

    Args:
        x: any shape, any floating type.
        numerator: ``[..., m+1]`` ascending powers; each ``numerator[..., j:j+1]`` broadcasts against ``x``.
        denominator: ``[..., n]``, powers 1 to n, broadcast alike.
        form: ``"A"`` or ``"B"``.

    Returns:
        ``R(x)``, shape and type of ``x``.

    Raises:
        IaptError: ``form`` is neither A nor B.
    """
    v = x.float()
    top = _horner(v, numerator.float())
    if form == "A":
        size = v.abs()
        bottom = 1.0 + size * _horner(size, denominator.float().abs())
    elif form == "B":
        bottom = 1.0 + (v * _horner(v, denominator.float())).abs()
    else:
        raise IaptError(f"rational form {form!r} is not known; use 'A' or 'B'")
    return (top / bottom).to(x.dtype)


def _horner(x: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_j coefficients[..., j] x^j``, broadcast as in `rational`."""
    terms = coefficients.split(1, dim=-1)
    value = terms[-1]
    for term in reversed(terms[:-1]):
        value = value * x + term
    return value.expand_as(x) if len(terms) == 1 else value


def initial_coefficients(
    function: str, numerator_degree: int, denominator_degree: int, form: str
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients with which ``R`` approximates ``function`` on `FIT_INTERVAL`.

    Published values where they exist (degrees (5, 4)), a least-squares fit otherwise. The identity is
    ``(x + x^3 / 10) / (1 + |x^2 / 10|)``: a denominator of zeros could never learn, as ``|0|`` has no slope.

    Returns:
        ``(numerator [m+1], denominator [n])``, float64, ascending powers.

    Raises:
        IaptError: unknown function or form, or degrees too low for the identity.
    """
    if function == "identity":
        numerator, denominator = np.eye(numerator_degree + 1)[1], np.zeros(denominator_degree)
        if numerator_degree < 3 or denominator_degree < 2:
            raise IaptError(
                f"init_function 'identity' needs degrees of at least 3 and 2, got {numerator_degree} and "
                f"{denominator_degree}"
            )
        numerator[3] = denominator[1] = 0.1
        return numerator, denominator
    if function not in FUNCTIONS:
        raise IaptError(f"init_function {function!r} is not known; use one of {', '.join(sorted(FUNCTIONS))}, identity")
    published = PUBLISHED.get((form, function))
    if published and (numerator_degree, denominator_degree) == (5, 4):
        return np.array(published[0]), np.array(published[1])
    return fit_coefficients(function, numerator_degree, denominator_degree, form)


def random_coefficients(num_layers: int, degree: int, lowest: int) -> Tensor:
    """Coefficients of the powers from ``lowest`` to ``degree``, drawn from torch's random state.

    At the ends of `FIT_INTERVAL` each term spreads by one, so that no power outweighs the others from the start.

    Returns:
        ``[num_layers, degree - lowest + 1]``, fp32, ascending powers.
    """
    powers = torch.arange(lowest, degree + 1)
    return torch.randn(num_layers, len(powers)) / FIT_INTERVAL[1] ** powers


def fit_coefficients(
    function: str, numerator_degree: int, denominator_degree: int, form: str
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares fit of ``R`` to ``function`` on `FIT_INTERVAL` (Levenberg-Marquardt, float64).

    The problem has several local minima, so it is solved from a few fixed starts and the best one is kept: the
    solution of the linearised problem ``P - f S = f`` (``Q = 1 + S``), and denominators of different weight.

    Returns:
        ``(numerator [m+1], denominator [n])``, float64, ascending powers.

    Raises:
        IaptError: unknown form.
    """
    if form not in ("A", "B"):
        raise IaptError(f"rational form {form!r} is not known; use 'A' or 'B'")
    x = np.linspace(*FIT_INTERVAL, 601)
    target = FUNCTIONS[function](x)
    size = numerator_degree + 1
    powers = x[:, None] ** np.arange(size)  # [points, m+1]
    base = np.abs(x) if form == "A" else x
    lower = base[:, None] ** np.arange(1, denominator_degree + 1)  # [points, n]
    linear, *_ = np.linalg.lstsq(np.hstack([powers, -target[:, None] * lower]), target, rcond=None)
    order = np.arange(1, denominator_degree + 1)
    starts = [linear[size:], *(weight * np.exp(-order / 2.0) for weight in FIT_STARTS)]
    fits = [_levenberg_marquardt(_Problem(powers, lower, target, form), start) for start in starts]
    _, best = min(fits, key=lambda fit: fit[0])
    return best[:size], best[size:]


class _Problem(NamedTuple):
    """What is fitted: monomials ``powers [points, m+1]`` and ``lower [points, n]``, ``target [points]``, the form."""

    powers: np.ndarray
    lower: np.ndarray
    target: np.ndarray
    form: str

    def residual(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``R - target`` and its Jacobian in ``theta = (a, b)``."""
        a, b = theta[: self.powers.shape[1]], theta[self.powers.shape[1] :]
        inner = self.lower @ (np.abs(b) if self.form == "A" else b)
        top, bottom = self.powers @ a, 1.0 + np.abs(inner)
        slope = self.lower * (np.sign(b) if self.form == "A" else np.sign(inner)[:, None])
        jacobian = np.hstack([self.powers / bottom[:, None], -(top / bottom**2)[:, None] * slope])
        return top / bottom - self.target, jacobian

    def with_numerator(self, b: np.ndarray) -> np.ndarray:
        """``theta`` with the numerator that is best for ``b``: for a fixed denominator the problem is linear."""
        bottom = 1.0 + np.abs(self.lower @ (np.abs(b) if self.form == "A" else b))
        a, *_ = np.linalg.lstsq(self.powers / bottom[:, None], self.target, rcond=None)
        return np.concatenate([a, b])


def _levenberg_marquardt(problem: _Problem, denominator: np.ndarray) -> tuple[float, np.ndarray]:
    """Squared error and ``theta`` after damped Gauss-Newton steps from a denominator."""
    theta = problem.with_numerator(denominator)
    residual, jacobian = problem.residual(theta)
    damping = 1e-3
    for _ in range(500):
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), -jacobian.T @ residual)
        trial, trial_jacobian = problem.residual(theta + step)
        if trial @ trial < residual @ residual:
            converged = residual @ residual - trial @ trial < 1e-14 * (residual @ residual)
            theta, residual, jacobian, damping = theta + step, trial, trial_jacobian, damping / 3
            if converged:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return float(residual @ residual), theta
