"""The rule of ``--quantise auto``: what is worth measuring, and what is chosen of what was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iapt_export
from iapt_export.building.rounding_choice import (
    FEWEST,
    MARGIN,
    RECORD_FILE,
    TIE,
    Measured,
    Search,
    Z,
    candidates,
    judge,
    loss_bounds,
)
from iapt_export.contract.errors import IaptError
from tests.tiny import tiny_llama

ROOT = Path(iapt_export.__file__).resolve().parent.parent
ENOUGH = 400
OTHERS = ["block=64", "block=64,head=4", "block=64,narrow=4", "block=64,head=4,narrow=4"]
IN_32 = ["", "head=4", "narrow=4", "head=4,narrow=4"]


@pytest.mark.parametrize(
    ("dtype", "shapes", "expected"),
    [
        ("int4", {"hidden_size": 64, "intermediate_size": 128}, ["", *OTHERS]),
        ("int4", {"hidden_size": 128, "intermediate_size": 256}, ["", "block=64", "block=128", *OTHERS[1:]]),
        ("int4", {"hidden_size": 96, "intermediate_size": 192}, IN_32),
        # no product has more inputs than outputs
        ("int4", {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}, ["", *OTHERS[:2]]),
        ("int8", {"hidden_size": 64, "intermediate_size": 128}, ["", "block=64"]),
    ],
)
def test_only_what_the_shapes_allow_is_measured(dtype: str, shapes: dict[str, int], expected: list[str]) -> None:
    assert candidates(dtype, tiny_llama(num_hidden_layers=1, **shapes)) == expected


def test_nothing_to_choose_is_refused() -> None:
    said = r"shapes allow int8 in blocks of 32 alone, so there is nothing to choose; leave it out"
    with pytest.raises(IaptError, match=said):
        candidates("int8", tiny_llama(num_hidden_layers=1))


def test_the_bounds_are_those_of_the_score_interval() -> None:
    """Where none differs the upper bound has a closed form; else the score of the bound is the quantile.

    The likeliest share of gains, given the loss, is looked for on a grid here.
    """
    none = [True] * 98
    assert loss_bounds(none, none) == pytest.approx((-(Z**2) / (98 + Z**2), Z**2 / (98 + Z**2)))
    own, other = [True] * 92 + [False] * 8, [True] * 86 + [False] * 6 + [True] * 2 + [False] * 6
    lower, upper = loss_bounds(own, other)
    assert lower < 0.04 < upper
    gains = np.linspace(1e-6, 0.2, 50_001)
    for bound, score in ((upper, -Z), (lower, Z)):
        shares = gains[(gains + bound > 0) & (2 * gains + bound < 1)]
        likelihood = 6 * np.log(shares + bound) + 2 * np.log(shares) + 92 * np.log(1 - 2 * shares - bound)
        gain = shares[likelihood.argmax()]
        error = np.sqrt(100 * (2 * gain + bound - bound**2))
        assert (4 - 100 * bound) / error == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(("count", "lost", "gained"), [(150, 0.02, 0.0), (200, 0.05, 0.02), (600, 0.02, 0.005)])
def test_a_loss_is_seldom_beyond_its_bound(count: int, lost: float, gained: float) -> None:
    """Drawn 2,000 times with a loss that is known, the bound holds in about 19 of 20 cases."""
    draw, held = np.random.default_rng(0), 0
    for _ in range(2000):
        kind = draw.choice(3, count, p=[lost, gained, 1 - lost - gained])
        own, other = (kind != 1).tolist(), (kind != 0).tolist()
        held += loss_bounds(own, other)[1] >= lost - gained
    assert 0.93 < held / 2000 <= 0.99


def measured(quantise: str, step: float, *, lost: int = 0, count: int = ENOUGH, **fields: Any) -> Measured:
    """A setting whose steps take so long, and which loses so many of the tokens that agree otherwise."""
    agreed = {"a": [False] * lost + [True] * (count // 2 - lost), "b": [True] * (count - count // 2)}
    made = Measured(quantise, 10**6, {1: [step, step], 8: [2 * step, 2 * step]}, agreed, 0.01 * (1 + lost))
    return dataclasses.replace(made, **fields)


def chosen(*settings: Measured) -> str:
    return Search("int4", 20, list(settings)).chosen


def test_the_fastest_is_chosen_where_all_answer_alike() -> None:
    found = [measured("", 1.0), measured("block=64", 0.9), measured("block=64,narrow=4", 0.7)]
    assert chosen(*found) == "block=64,narrow=4" and chosen(*found[:2]) == "block=64" and chosen(found[0]) == ""
    assert judge(found[0], found[2]).speed == pytest.approx(1 / 0.7)


def test_a_slower_one_is_not() -> None:
    assert chosen(measured("", 1.0), measured("block=64", 1.2)) == ""


def test_what_answers_otherwise_is_not_chosen_however_fast() -> None:
    far = measured("block=64,narrow=4", 0.5, lost=16)
    assert not judge(measured("", 1.0), far).is_accepted
    assert chosen(measured("", 1.0), measured("block=64", 0.9, lost=1), far) == "block=64"


def test_one_tenant_that_suffers_is_seen_among_many_others() -> None:
    others = {f"tenant {number}": [True] * 200 for number in range(20)}
    own = measured("", 1.0, agreed={"a": [True] * 40, **others})
    fast = measured("block=64", 0.5, agreed={"a": [True] * 34 + [False] * 6, **others})
    judged = judge(own, fast)
    assert judged.max_loss <= MARGIN and judged.worse == ("a",) and not judged.is_accepted
    assert chosen(own, fast) == "" and "(a worse)" in Search("int4", 20, [own, fast]).text()


def test_of_two_that_are_as_fast_the_nearer_one_is_chosen() -> None:
    near, far = measured("block=64", 0.9, kl=0.02), measured("block=64,head=4", 0.9 / (1 + TIE / 2), kl=0.05)
    assert chosen(measured("", 1.0), near, far) == "block=64"
    clearly = measured("block=64,head=4", 0.9 / (1 + 2 * TIE), kl=0.05)
    assert chosen(measured("", 1.0), near, clearly) == "block=64,head=4"


def test_one_slow_round_decides_nothing() -> None:
    """Rounds are compared one by one, so that what slows all of a round does not count, nor does a single outlier."""
    own = measured("", 1.0, seconds={1: [1.0, 5.0, 1.0]})
    assert judge(own, measured("block=64", 1.0, seconds={1: [0.8, 4.0, 9.0]})).speed == pytest.approx(1.25)


def test_what_is_no_number_is_not_chosen() -> None:
    assert chosen(measured("", 1.0), measured("block=64", 0.5, kl=None)) == ""
    assert "no number" in Search("int4", 20, [measured("", 1.0), measured("block=64", 0.5, kl=None)]).text()


@pytest.mark.parametrize(("count", "expected"), [(FEWEST - 1, ""), (FEWEST, "block=64")])
def test_with_few_tokens_nothing_else_is_chosen_and_that_is_said(count: int, expected: str) -> None:
    search = Search("int4", 20, [measured("", 1.0, count=count), measured("block=64", 0.5, count=count)])
    assert search.chosen == expected
    assert ("give the adapters more example prompts" in search.doubt) == (expected == "")
    assert expected or f"had {FEWEST - 1} answer tokens to compare" in search.doubt
    assert f"below {FEWEST} tokens of answers" in (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    search = Search("int4", 20, [measured("", 1.0), measured("block=64", 0.8, lost=3, kl=None)])
    search.save(tmp_path)
    assert Search.load(tmp_path) == Search.found(tmp_path) == search
    assert Search.found(tmp_path / "none") is None and Search.found(None) is None
    (tmp_path / RECORD_FILE).write_text("{}", encoding="utf-8")
    assert Search.found(tmp_path) is None


def test_the_table_says_what_was_found_and_chosen() -> None:
    text = Search(
        "int4", 20, [measured("", 0.01), measured("block=64", 0.008), measured("head=4", 0.005, lost=9)]
    ).text()
    first, head, own, taken, left, last = text.split("\n")
    assert first == "int4 beside PyTorch in fp32: 400 answer tokens of 20 example prompts"
    assert head.split("  ")[0] == "--quantise" and "tokens/s, 8 rows" in head
    assert own.split() == ["(int4's", "own)", "1.0", "100.0", "400.0", "1.00", "1.000", "0.0100"]
    assert taken.split() == ["*", "block=64", "1.0", "125.0", "500.0", "1.25", "1.000", "0.0100", "at", "most", "0.7"]
    assert left.startswith("  head=4") and "0.978" in left
    assert last == (
        "chosen: int4 (block=64), the fastest that with 95 % confidence loses at most 2 points of agreement"
    )
    kept = Search("int4", 20, [measured("", 1.0), measured("block=64", 2.0)]).text()
    assert kept.endswith(
        "chosen: int4 as it is: nothing faster with 95 % confidence loses at most 2 points of agreement"
    )
