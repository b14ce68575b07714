"""Fields by their old names: the same values, and a warning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engines.serving.request import Answer, Request, Token

SENT = np.ones((4, 8))
HERE = __file__


def test_soft_prompts_by_their_old_name() -> None:
    with pytest.warns(DeprecationWarning, match=r"Request\.prompts is called soft_prompts") as caught:
        request = Request("taste", tokens=(3,), prompts=SENT)  # type: ignore[call-arg]
    assert request.soft_prompts is SENT and caught[0].filename == HERE
    with pytest.warns(DeprecationWarning, match=r"Request\.prompts is called soft_prompts"):
        assert request.prompts is SENT  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="got soft_prompts and its old name prompts"):
        Request("taste", prompts=SENT, soft_prompts=SENT)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "made", [Token(7, 0, 5, "x", None), Answer(7, [5], "x", "length")], ids=lambda made: type(made).__name__
)
def test_the_number_of_a_request_by_its_old_name(made: Token | Answer) -> None:
    with pytest.warns(DeprecationWarning, match=r"\.row is called index") as caught:
        assert made.row == made.index == 7  # type: ignore[union-attr]
    assert caught[0].filename == HERE


@pytest.mark.filterwarnings("error")
def test_new_names_warn_of_nothing() -> None:
    request = dataclasses.replace(Request("taste", soft_prompts=SENT), max_new_tokens=2)
    assert request.soft_prompts is SENT and request.max_new_tokens == 2
    assert Token(7, 0, 5, "x", None).index == Answer(index=7, tokens=[], text="", finish_reason="eos").index
