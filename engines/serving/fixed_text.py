"""What a JSON schema writes as it stands, where llguidance would write something else and say nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

VALUES = ("const", "enum", "required", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
"""Keywords whose values are written, or compared with what is written."""
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords with a schema for each name."""
TOLD = ("default", "examples", "title", "description", "$comment")
"""Keywords that only tell something."""
EXACT = 2**53
"""Whole numbers up to it are exact in 64-bit floating point, which llguidance 1.9 reads every number in."""
EXACT_POWER = 22
"""A number of no more digits than `EXACT` times or over a power of ten up to this one is read exactly there; of others,
many come out one digit apart."""
_UNWRITTEN = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
"""Control characters that JSON has no short escape for."""


def problem_of(schema: Any, special: re.Pattern[str]) -> str | None:
    """The first thing that a schema fixes and that no answer could hold, in words; None where all can be written.

    Args:
        schema: JSON, as far as it was read.
        special: finds the tokenizer's special tokens, see `problem_of_text`.
    """
    for value in _fixed(schema):
        if isinstance(value, int | float) and not isinstance(value, bool) and not _is_exact(value):
            return (
                f"the number {json.dumps(value)} would be written as another one: expected at most 15 digits and 22 "
                "places; write it as a text, or let a pattern of digits say what may stand there"
            )
        if isinstance(value, str):
            if found := _UNWRITTEN.search(value):
                return f"the text {json.dumps(value)} has the control character {json.dumps(found[0])}, never written"
            if problem := problem_of_text(value, special):
                return problem
    return None


def problem_of_text(text: str, special: re.Pattern[str]) -> str | None:
    """Why a fixed text cannot be answered; None where it can.

    llguidance makes tokens of fixed text, and of a special token's text the token itself, which its grammar refuses.
    """
    if found := special.search(text):
        return f"the text {json.dumps(text)} holds {found[0]}, which is a token of its own and no text to this model"
    return None


def _fixed(schema: Any) -> Iterator[Any]:
    """Texts and numbers that a schema fixes; of names, those of properties."""
    if isinstance(schema, list):
        for each in schema:
            yield from _fixed(each)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in NAMED and isinstance(value, dict):
                yield from value if key == "properties" else ()
                yield from _fixed(list(value.values()))
            elif key in VALUES:
                yield from _leaves(value)
            elif key not in TOLD:
                yield from _fixed(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _is_exact(value: float) -> bool:
    number = Decimal(json.dumps(value)).as_tuple()
    power = number.exponent
    return isinstance(power, int) and abs(power) <= EXACT_POWER and int("".join(map(str, number.digits))) <= EXACT
