"""Rational activations: published values, fits, both forms against NumPy, low precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iapt_export.contract.errors import IaptError
from trainers.methods.rational import (
    FIT_INTERVAL,
    FUNCTIONS,
    PUBLISHED,
    fit_coefficients,
    initial_coefficients,
    rational,
)

GRID = np.linspace(*FIT_INTERVAL, 2001)


def numpy_rational(x: np.ndarray, a: np.ndarray, b: np.ndarray, form: str) -> np.ndarray:
    """The definition, with powers written out."""
    top = sum(a[j] * x**j for j in range(len(a)))
    terms = [b[k - 1] * x**k for k in range(1, len(b) + 1)]
    return np.asarray(top / (1 + (sum(abs(t) for t in terms) if form == "A" else abs(sum(terms)))))


def rms(function: str, a: np.ndarray, b: np.ndarray, form: str) -> float:
    return float(np.sqrt(np.mean((numpy_rational(GRID, a, b, form) - FUNCTIONS[function](GRID)) ** 2)))


@pytest.mark.parametrize(("form", "function"), sorted(PUBLISHED))
def test_fit_is_no_worse_than_published(form: str, function: str) -> None:
    a, b = (np.array(values) for values in PUBLISHED[form, function])
    assert rms(function, *fit_coefficients(function, 5, 4, form), form) <= rms(function, a, b, form) * 1.001 + 1e-9


@pytest.mark.parametrize("form", ["A", "B"])
@pytest.mark.parametrize("degrees", [(2, 2), (3, 2), (5, 4), (6, 5), pytest.param((8, 8), marks=pytest.mark.thorough)])
@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_every_degree_and_function_is_fitted(function: str, degrees: tuple[int, int], form: str) -> None:
    a, b = initial_coefficients(function, *degrees, form)
    assert (len(a), len(b)) == (degrees[0] + 1, degrees[1])
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert rms(function, a, b, form) < (0.15 if degrees[0] == 2 else 0.05)


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_identity_is_exact_and_has_a_denominator_that_can_learn(form: str) -> None:
    for degrees in ((3, 2), (5, 4), (8, 8)):
        a, b = initial_coefficients("identity", *degrees, form)
        assert (len(a), len(b)) == (degrees[0] + 1, degrees[1]) and b.any()
        assert np.abs(numpy_rational(GRID, a, b, form) - GRID).max() < 1e-12
    with pytest.raises(IaptError, match="'identity' needs degrees of at least 3 and 2, got 2 and 2"):
        initial_coefficients("identity", 2, 2, form)


def test_published_values_start_the_default() -> None:
    a, b = initial_coefficients("gelu", 5, 4, "B")
    assert (tuple(a), tuple(b)) == PUBLISHED["B", "gelu"]
    assert np.abs(numpy_rational(GRID, a, b, "B") - FUNCTIONS["gelu"](GRID)).max() < 1e-3


def test_fit_is_deterministic() -> None:
    first, second = fit_coefficients("gelu", 6, 5, "B"), fit_coefficients("gelu", 6, 5, "B")
    assert all((one == two).all() for one, two in zip(first, second, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from("AB"),
    st.integers(0, 2**32 - 1),
    st.floats(0.1, 20.0),
)
def test_agrees_with_numpy(m: int, n: int, form: str, seed: int, spread: float) -> None:
    source = np.random.default_rng(seed)
    x = source.normal(0, spread, (3, 4, 5)).astype(np.float32)
    a, b = source.normal(size=m + 1).astype(np.float32), source.normal(size=n).astype(np.float32)
    value = rational(torch.from_numpy(x), torch.from_numpy(a), torch.from_numpy(b), form)
    wide = [array.astype(np.float64) for array in (x, a, b)]
    expected = numpy_rational(*wide, form)
    # Rounding is relative to the terms that are summed, not to what is left of them.
    scale = numpy_rational(np.abs(wide[0]), np.abs(wide[1]), np.zeros(n), form)
    bottom = numpy_rational(wide[0], np.ones(1), wide[2], form)  # 1 / Q
    q_scale = 1 + sum(np.abs(wide[2][k]) * np.abs(wide[0]) ** (k + 1) for k in range(n))
    tolerance = 2e-6 * (scale * bottom + np.abs(expected) * q_scale * bottom) + 1e-6
    assert (np.abs(value.numpy() - expected) <= tolerance).all()


@pytest.mark.parametrize("form", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_evaluated_in_fp32(dtype: torch.dtype, form: str) -> None:
    a, b = (torch.tensor(values) for values in PUBLISHED[form, "relu"])
    x = torch.linspace(-200, 200, 401).to(dtype)  # the fifth power overflows fp16 beyond 9.2
    value = rational(x, a.to(dtype), b.to(dtype), form)
    assert value.dtype == dtype and torch.isfinite(value).all()
    assert torch.equal(value, rational(x.float(), a.to(dtype).float(), b.to(dtype).float(), form).to(dtype))


def test_coefficients_per_row() -> None:
    x = torch.randn(2, 3, 4)
    a, b = torch.randn(2, 1, 6), torch.randn(2, 1, 4)
    value = rational(x, a, b, "B")
    for row in range(2):
        assert torch.allclose(value[row], rational(x[row], a[row, 0], b[row, 0], "B"))


def test_gradients_reach_input_and_coefficients() -> None:
    x = torch.randn(7, dtype=torch.float32, requires_grad=True)
    a, b = (torch.tensor(values, requires_grad=True) for values in PUBLISHED["A", "gelu"])
    rational(x, a, b, "A").sum().backward()
    for tensor in (x, a, b):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


def test_unknown_names() -> None:
    with pytest.raises(IaptError, match="rational form 'C' is not known; use 'A' or 'B'"):
        rational(torch.ones(1), torch.ones(2), torch.ones(1), "C")
    with pytest.raises(IaptError, match="rational form 'C' is not known"):
        fit_coefficients("gelu", 5, 4, "C")
    with pytest.raises(IaptError, match="'elu' is not known; use one of gelu, leaky_relu, relu, silu, tanh, identity"):
        initial_coefficients("elu", 5, 4, "B")
