"""Answers of a form: JSON, a JSON schema, a regular expression, one of some texts. llguidance says which tokens fit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.serving.fixed_text import problem_of, problem_of_text
from iapt_export.contract.errors import IaptError, NotRunnableError

MAX_GRAMMAR_CHARACTERS = 65_536
LEXER_FUEL = 50_000
"""What a grammar may cost at first, and again for each token, because the other rows wait while it says which tokens
fit: about 50 ms once, where llguidance's own limits let ``(a{1000}){1000}`` take two seconds. A schema of 250 keys with
patterns stays below."""
WRITTEN = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
"""How JSON is written: in one line, as Python does. Where white space is free, small models write it without end. No
``\\u``: a text is written in one way, so that names which are equal to a reader are equal to the grammar."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must match; give one of the fields.

    Raises:
        IaptError: none or several are given, or one is no JSON, or too long.
    """

    json_object: bool = False
    """Any JSON object."""
    json_schema: Mapping[str, Any] | None = None
    """JSON that fits this schema."""
    regex: str | None = None
    """The whole answer, in the syntax of Rust's regex crate (no look-around, no back references)."""
    choice: Sequence[str] = ()
    """One of these texts."""

    def __post_init__(self) -> None:
        given = [name for name in ("json_object", "json_schema", "regex", "choice") if self._is_given(name)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise _wrong(f"expected one of json_object, json_schema, regex, choice, found {found}")
        if isinstance(self.choice, str) or not all(isinstance(text, str) and text for text in self.choice):
            raise _wrong(f"choice is {self.choice!r}, expected texts in a list, none of them empty")
        if len(self.source()) > MAX_GRAMMAR_CHARACTERS:
            raise _wrong(f"it has {len(self.source())} characters; expected at most {MAX_GRAMMAR_CHARACTERS}")

    def source(self) -> str:
        """The same as JSON, which two equal grammars share."""
        try:
            schema = {"type": "object"} if self.json_object else self.json_schema
            return json.dumps([schema, self.regex, list(self.choice)], sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise _wrong(f"json_schema is no JSON: {error}") from error

    def _is_given(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False and (name != "choice" or len(value) > 0)


class GrammarCompiler:
    """Makes matchers over one tokenizer; a few milliseconds once, fractions of one for each request."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: content of ``tokenizer.json``.
            vocabulary: width of the logits (V).
            ends: ids of the tokens that end an answer.

        Raises:
            NotRunnableError: llguidance is not installed.
            IaptError: it does not read this tokenizer, or there is no end token.
        """
        try:
            import llguidance
        except ImportError as error:
            raise NotRunnableError(
                "answers of a form need llguidance, which is not installed; try: pip install -e '.[grammar]'",
                field="grammar",
            ) from error
        self._vocabulary = vocabulary
        fields = json.loads(tokenizer)
        special = [re.escape(token["content"]) for token in fields.get("added_tokens") or () if token["special"]]
        self._special = re.compile("|".join(special) or "(?!)")
        self._drops_space = _drops_space(fields.get("decoder"))
        if not ends:
            raise _wrong("this bundle has no end token, so an answer of a form could not end")
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))
        except ValueError as error:
            raise _wrong(f"llguidance does not read this bundle's tokenizer: {error}") from error

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher for one answer.

        Raises:
            IaptError: the grammar is not valid, or says what llguidance does not support.
        """
        from llguidance import LLMatcher, LLParserLimits

        try:
            self._check(grammar)
            text = self._text_of(grammar)
        except (ValueError, RecursionError) as error:
            raise _wrong(_in_a_line(str(error))) from error
        limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, step_lexer_fuel=LEXER_FUEL)
        found = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if found.is_error():
            raise _wrong(_in_a_line(found.get_error()))
        return Matcher(found, self._vocabulary)

    def _check(self, grammar: Grammar) -> None:
        if grammar.json_schema is not None:
            problem = problem_of(json.loads(json.dumps(grammar.json_schema)), self._special)
        else:
            texts = [grammar.regex.replace("\\", "")] if grammar.regex else grammar.choice
            problem = next(filter(None, (problem_of_text(text, self._special) for text in texts)), None)
        if problem:
            raise _wrong(problem)

    def _text_of(self, grammar: Grammar) -> str:
        """The grammar as llguidance takes it.

        Where the tokenizer's decoder drops an answer's first space, as Llama 2's does, one stands before choices and
        regular expressions: an answer's first token has one there, and the text that is told is what was asked for.
        """
        from llguidance import grammar_from

        if grammar.choice:
            rules = " | ".join(json.dumps(each) for each in grammar.choice)
        elif grammar.regex is not None:
            made = json.loads(grammar_from("regex", grammar.regex))
            rules = made["grammars"][0]["lark_grammar"].removeprefix("start: ")
        else:
            schema = {"type": "object"} if grammar.json_object else dict(grammar.json_schema or {})
            return str(grammar_from("json_schema", json.dumps({**schema, "x-guidance": WRITTEN})))
        start = 'start: " " answer\nanswer: ' if self._drops_space else "start: "
        return str(grammar_from("lark", start + rules))


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        """Ask for the first tokens at once, which takes longest: no row waits for it here.

        Raises:
            IaptError: the grammar is too large.
        """
        from llguidance import numpy as masks

        self._matcher = matcher
        self._mask: np.ndarray = masks.allocate_token_bitmask(1, vocabulary)
        self._fill()

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def forbid(self, logits: np.ndarray) -> None:
        """Set the logits ``[V]`` of tokens that do not fit to minus infinity.

        Raises:
            IaptError: the grammar became too large on the way.
        """
        from llguidance import numpy as masks

        if not self._is_filled:
            self._fill()
        masks.apply_token_bitmask_inplace(logits[None], self._mask)

    def _fill(self) -> None:
        from llguidance import numpy as masks

        masks.fill_next_token_bitmask(self._matcher, self._mask)
        self._is_filled = True
        if self._matcher.is_error():
            raise _wrong(_in_a_line(self._matcher.get_error()))

    def took(self, token: int) -> None:
        """A token was chosen.

        Raises:
            IaptError: the grammar became too large on the way; the answer has not come to its end.
        """
        self._is_filled = False
        if not self._matcher.consume_token(token):
            raise _wrong(_in_a_line(self._matcher.get_error()))


def _drops_space(decoder: Any) -> bool:
    """Whether a decoder of ``tokenizer.json`` takes the first space from a text."""
    steps = (decoder or {}).get("decoders", [decoder or {}])
    return any(
        (step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _in_a_line(text: str) -> str:
    return " ".join(text.partition("<state>")[0].split())[:300]  # behind it stands what llguidance's authors want


def _wrong(text: str) -> IaptError:
    return IaptError(f"the answer's grammar: {text}", field="grammar")
