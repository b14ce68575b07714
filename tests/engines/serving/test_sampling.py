"""Choosing a token: greedy, temperature, nucleus, seeds."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engines.serving.sampling import Sampling, _draw, choose
from iapt_export.contract.errors import IaptError

LOGITS = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
DRAWS = 4000


def draws(sampling: Sampling, logits: np.ndarray = LOGITS, number: int = DRAWS) -> list[int]:
    random = np.random.default_rng(sampling.seed)
    return [choose(logits, sampling, random) for _ in range(number)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_greedy_takes_the_best_and_the_first_of_equals(dtype: type) -> None:
    assert set(draws(Sampling(), LOGITS.astype(dtype), 5)) == {1}
    assert set(draws(Sampling(), np.array([1.0, 2.0, 2.0], dtype), 5)) == {1}
    assert set(draws(Sampling(top_p=0.1, seed=3), number=5)) == {1}, "greedy needs neither nucleus nor seed"


def test_frequencies_follow_the_probabilities() -> None:
    counts = Counter(draws(Sampling(temperature=1.0)))
    for token, probability in enumerate((0.1, 0.5, 0.15, 0.25)):
        assert counts[token] / DRAWS == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    cold, hot = Counter(draws(Sampling(temperature=0.25))), Counter(draws(Sampling(temperature=50.0)))
    # (0.5 / 0.25) ** 4 = 16 times as often
    assert cold[1] / DRAWS == pytest.approx(0.5**4 / (0.1**4 + 0.5**4 + 0.15**4 + 0.25**4), abs=0.02)
    assert all(hot[token] / DRAWS == pytest.approx(0.25, abs=0.03) for token in range(4))


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.01, {1}), (0.49, {1}), (0.51, {1, 3}), (0.76, {1, 2, 3}), (0.91, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_the_nucleus_is_the_smallest_set_that_covers_top_p(top_p: float, nucleus: set[int]) -> None:
    assert set(draws(Sampling(temperature=1.0, top_p=top_p), number=500)) == nucleus


def test_a_nucleus_keeps_its_proportions() -> None:
    counts = Counter(draws(Sampling(temperature=1.0, top_p=0.6)))
    assert counts[1] / DRAWS == pytest.approx(0.5 / 0.75, abs=0.03)


def test_seeds() -> None:
    assert draws(Sampling(temperature=1.0, seed=1), number=50) == draws(Sampling(temperature=1.0, seed=1), number=50)
    assert draws(Sampling(temperature=1.0, seed=1), number=50) != draws(Sampling(temperature=1.0, seed=2), number=50)


@given(
    logits=arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    temperature=st.floats(1e-3, 1e3),
    top_p=st.floats(1e-6, 1.0),
)
def test_any_finite_logits_give_a_token(logits: np.ndarray, temperature: float, top_p: float) -> None:
    token = choose(logits, Sampling(temperature, top_p), np.random.default_rng(0))
    assert 0 <= token < len(logits)
    if top_p < 1 / len(logits):
        assert logits[token] == logits.max()


def by_definition(logits: np.ndarray, sampling: Sampling, drawn: float) -> int:
    """The token with everything sorted, the way that papers write it."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    probabilities /= probabilities.sum()
    inside = probabilities.cumsum() - probabilities < sampling.top_p
    tokens, places = order[inside], np.argsort(order[inside])  # one is drawn in the order of their ids
    nucleus = probabilities[inside][places].cumsum()
    return int(tokens[places][np.searchsorted(nucleus / nucleus[-1], drawn, side="right")])


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999, 1.0])
def test_sorting_some_gives_what_sorting_all_gives(spread: float, top_p: float) -> None:
    """From flat logits, of which all must be sorted, to such with a single likely token."""
    logits = (np.random.default_rng(0).standard_normal(2000) * spread).astype(np.float32)
    sampling = Sampling(0.9, top_p)
    draws = np.random.default_rng(1).random(200)
    random = np.random.default_rng(1)
    assert [choose(logits, sampling, random) for _ in draws] == [by_definition(logits, sampling, u) for u in draws]


@pytest.mark.parametrize("top_k", [1, 7, 600, 1999, 2000, 5000])
@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_top_k_leaves_the_likeliest_and_the_first_of_equals(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).integers(0, 40, 2000).astype(np.float32)  # many equals
    left = np.full(2000, -np.inf, np.float32)
    first = np.argsort(-logits, kind="stable")[:top_k]
    left[first] = logits[first]
    draws = np.random.default_rng(1).random(200)
    random = np.random.default_rng(1)
    sampling = Sampling(2.0, top_p, top_k=top_k)
    assert [choose(logits, sampling, random) for _ in draws] == [by_definition(left, sampling, u) for u in draws]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e40, 1e300])
def test_temperatures_that_fp32_cannot_hold(temperature: float) -> None:
    logits = np.array([1.0, -np.inf, 3.0, 3.0, 2.0], np.float32)
    drawn = set(draws(Sampling(temperature), logits, 200))
    assert drawn == ({2, 3} if temperature < 1 else {0, 2, 3, 4})


@pytest.mark.parametrize("drawn", [0.0, 0.25, 0.5, np.nextafter(1, 0)])
def test_a_draw_never_ends_at_a_token_without_weight(drawn: float) -> None:
    weights = np.zeros(3 * 512 + 5, np.float32)
    weights[[700, 701, 1100]] = 0.1, 0.3, 0.7
    assert _draw(weights, drawn) == (700 if drawn == 0 else 701 if drawn == 0.25 else 1100)


@pytest.mark.parametrize("logit", [-np.inf, -1e30])
def test_a_forbidden_token_is_never_drawn(logit: float) -> None:
    assert 1 not in draws(Sampling(temperature=2.0), np.array([0.0, logit, 0.0]), 200)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is negative; use 0 for greedy, or a positive number"),
        ({"temperature": float("nan")}, "temperature nan is"),
        ({"temperature": True}, "temperature"),
        ({"seed": True}, "seed"),
        ({"temperature": float("inf")}, "temperature inf is"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range; expected more than 0 and at most 1"),
        ({"top_p": 1.01}, "top_p 1.01 is out of range"),
        ({"top_p": float("nan")}, "top_p nan is out of range"),
        ({"seed": -1}, "seed -1 is negative"),
    ],
)
def test_values_out_of_range(fields: dict[str, float], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        Sampling(**fields)  # type: ignore[arg-type]
    assert text in str(caught.value)
