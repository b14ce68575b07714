"""Stop texts are found wherever an answer is cut into pieces, and long or many ones cost other rows nothing."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.serving.request import Request
from engines.serving.session import Session
from engines.serving.stop_texts import MAX_STOP_CHARACTERS, StopTexts, check_stops
from iapt_export.contract.errors import IaptError
from tests.bundles import TinyBuild

SHORT = st.text("ab", min_size=1, max_size=4)


def by_definition(answer: str, stops: list[str]) -> tuple[int | None, int]:
    """Where the first stop text begins in a piece-by-piece answer, and what its end may begin."""
    found = [place for stop in stops if (place := answer.find(stop)) >= 0]
    starts = [stop[:size] for stop in stops for size in range(1, len(stop) + 1)]
    return min(found, default=None), max((len(start) for start in starts if answer.endswith(start)), default=0)


@given(stops=st.lists(SHORT, min_size=1, max_size=4), pieces=st.lists(st.text("abc", max_size=5), max_size=8))
def test_any_pieces_give_what_searching_all_gives(stops: list[str], pieces: list[str]) -> None:
    finder, answer = StopTexts(stops), ""
    for piece in pieces:
        answer += piece
        cut = finder.find(piece)
        place, held = by_definition(answer, stops)
        assert cut == place
        if cut is not None:
            return
        assert finder.held == held


def test_answers_with_equal_stop_texts_share_what_is_built_for_them() -> None:
    """Else one request for 64 answers with the longest stop text that there may be holds a server up for seconds."""
    first, *others = (StopTexts(("END", "x" * 1000)) for _ in range(64))
    assert all(each._automaton is first._automaton for each in others)
    assert first.find("EN") is None and others[0].find("x END") == 2 and first.find("D") == 0
    built = weakref.ref(first._automaton)
    del first, others
    assert built() is None, "kept no longer than an answer needs it"


@pytest.mark.parametrize("stops", [["x" * 20_000], [f"stop text {number:08d}" for number in range(1_500)]])
def test_a_character_costs_the_same_however_many_are_sought(stops: list[str]) -> None:
    few, many = StopTexts(["END"]), StopTexts(stops)
    answer = "xxxxx stop text 0000 " * 400

    def seconds(finder: StopTexts) -> float:
        start = time.process_time()
        for character in answer:
            finder.find(character)
        return time.process_time() - start

    least = min(seconds(few) for _ in range(3))
    assert min(seconds(many) for _ in range(3)) < 10 * least


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"stop": 5}, "it: stop is int, expected a tuple"),
        ({"stop": "END"}, "it: stop is 'END', expected texts in a tuple"),
        ({"stop": (5,)}, "it: stop is (5,), expected texts in a tuple"),
        ({"stop": ("a", "")}, "it: a stop text is empty; leave it out"),
        ({"stop": ("x" * MAX_STOP_CHARACTERS, "y")}, "its stop texts have 32769 characters; expected at most 32768"),
        ({"stop_token_ids": 5}, "it: stop_token_ids is int, expected a tuple"),
        ({"stop_token_ids": (5,) * 65}, "it: 65 stop token ids are given, expected at most 64"),
    ],
)
def test_stops_that_are_none_or_too_many(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        check_stops("it", Request("t", **fields))
    assert text in str(caught.value) and caught.value.field == next(iter(fields))
    check_stops("it", Request("t", stop=("x" * MAX_STOP_CHARACTERS,), stop_token_ids=(5,) * 64))


def test_more_than_any_answer_needs_is_refused(tiny_build: TinyBuild) -> None:
    session = Session.open(tiny_build.bundle, verify=False)
    long = "x" * MAX_STOP_CHARACTERS
    session.check(Request("alpha", "yes", stop=(long,)), "it")
    with pytest.raises(IaptError, match="it: its stop texts have 32769 characters; expected at most 32768") as caught:
        session.check(Request("alpha", "yes", stop=(long, "x")), "it")
    assert caught.value.field == "stop"
