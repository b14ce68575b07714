"""The default run takes the wanted cases of a matrix, and no case is lost."""

from __future__ import annotations

import pytest

from tests.thorough import default_for

SLOW = pytest.param("c", 3, id="third", marks=pytest.mark.slow)


def test_all_but_the_wanted_cases_are_marked_and_keep_what_they_had() -> None:
    first, second, third = default_for(lambda case: case == ("a", 1), [("a", 1), ("b", 2), SLOW])
    assert first == ("a", 1)
    assert (second.values, [mark.name for mark in second.marks]) == (("b", 2), ["thorough"])
    assert (third.values, third.id, [mark.name for mark in third.marks]) == (("c", 3), "third", ["slow", "thorough"])


@pytest.mark.parametrize(("wanted", "taken"), [("abc", 3), ("", 0)])
def test_a_choice_that_chooses_nothing_is_refused(wanted: str, taken: int) -> None:
    with pytest.raises(ValueError, match=f"the default run takes {taken} of 3 cases; it should take some"):
        default_for(wanted.__contains__, "abc")
