"""Grammars over the tokens themselves: what an answer can hold is what was asked for, or the grammar is refused."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="needs the extra grammar")

from engines.serving.grammar import Grammar, GrammarCompiler
from iapt_export.contract.errors import IaptError
from tests.native.tokenizers_of import gemma, llama2
from tests.tiny import tiny_tokenizer


class Speaker:
    """Answers at random, but for what a grammar forbids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_vocab_size()
        special = [token for token in json.loads(tokenizer.to_str())["added_tokens"] if token["special"]]
        self.end = special[-1]["id"]
        self.special = special[-1]["content"]
        self.compiler = GrammarCompiler(tokenizer.to_str(), self.vocabulary, [self.end])

    def answer(self, seed: int = 0, **fields: Any) -> str:
        matcher, draw = self.compiler.compile(Grammar(**fields)), np.random.default_rng(seed)
        tokens: list[int] = []
        while not matcher.is_complete and len(tokens) < 300:
            logits = draw.normal(size=self.vocabulary).astype(np.float32)
            matcher.forbid(logits)
            tokens.append(int(logits.argmax()))
            matcher.took(tokens[-1])
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def takes(self, text: str, schema: Any) -> bool:
        """Whether a grammar lets a text through."""
        matcher = self.compiler.compile(Grammar(json_schema=schema))
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            logits = np.zeros(self.vocabulary, np.float32)
            matcher.forbid(logits)
            if logits[token] < 0:
                return False
            matcher.took(token)
        return True


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker(tiny_tokenizer().backend_tokenizer)


def test_numbers_come_out_as_they_are_or_are_refused(speaker: Speaker) -> None:
    """llguidance reads them in 64-bit floating point, and not always to the nearest."""
    draw, refused = random.Random(0), []
    for _ in range(300):
        digits, power = draw.choice((1, 3, 8, 12, 15, 17)), draw.randint(-24, 24)
        text = f"{draw.choice(('', '-'))}{draw.uniform(1, 10):.{digits - 1}f}e{power}"
        value = int(float(text)) if draw.random() < 0.3 else float(text)
        try:
            found = speaker.answer(json_schema={"const": value})
        except IaptError as error:
            refused.append(error)
        else:
            assert Decimal(found) == Decimal(json.dumps(value))
    assert 50 < len(refused) < 150
    assert all("would be written as another one" in str(error) and error.field == "grammar" for error in refused)
    assert speaker.answer(json_schema={"const": 2**53}) == str(2**53)


BEYOND = 2**53 + 1


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [1234567890123456789, 1234567890123456790]},
        {"type": "object", "properties": {"id": {"const": BEYOND}}},
        {"type": "array", "items": {"maximum": BEYOND}},
        {"anyOf": [{"const": {"deep": [0.30000000000000004e-3]}}, {"type": "null"}]},
        {"$defs": {"const": {"const": 10**400}}, "type": "null"},
        {"const": "a\u0001"},
    ],
)
def test_what_cannot_be_written_is_refused_wherever_it_stands(speaker: Speaker, schema: Any) -> None:
    with pytest.raises(IaptError, match=r"the answer's grammar: the (number|text) .*(as another one|never written)"):
        speaker.compiler.compile(Grammar(json_schema=schema))


def test_what_only_tells_something_is_not(speaker: Speaker) -> None:
    told = {"default": BEYOND, "examples": [BEYOND], "description": speaker.special, "title": "\u0001"}
    assert speaker.answer(json_schema={"type": "null", **told}) == "null"
    properties = {"const": {"type": "null"}, "default": {"const": "\n\t"}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    assert json.loads(speaker.answer(json_schema=schema)) == {"const": None, "default": "\n\t"}


def test_a_special_tokens_text_is_no_text(speaker: Speaker) -> None:
    """llguidance makes the token of it, which its grammar then refuses in the middle of an answer."""
    said = speaker.special
    schemas = [{"const": f"a {said} b"}, {"type": "object", "properties": {said: {}}, "required": [said]}]
    grammars = [
        Grammar(choice=["yes", said]),
        Grammar(regex=f"a{said.replace('|', chr(92) + '|')}b"),
        *(Grammar(json_schema=schema) for schema in schemas),
    ]
    for grammar in grammars:
        with pytest.raises(IaptError, match="which is a token of its own and no text to this model"):
            speaker.compiler.compile(grammar)


def test_a_text_is_written_in_one_way(speaker: Speaker) -> None:
    """Or what is one name to a reader would be two to the grammar."""
    assert speaker.takes('"x\\n\\"', {"type": "string"})
    assert not speaker.takes('"x\\u0062', {"type": "string"})


@pytest.mark.parametrize("make", [llama2, gemma])
@pytest.mark.parametrize(
    "fields", [{"choice": [" yes", " no"]}, {"choice": ["yes", "no"]}, {"regex": "( a|b)[0-9]/"}], ids=str
)
def test_spaces_at_the_beginning_are_those_that_were_asked_for(make: Any, fields: dict[str, Any]) -> None:
    """Llama 2's decoder drops an answer's first space, Gemma's does not."""
    speaker = Speaker(make())
    found = {speaker.answer(seed, **fields) for seed in range(20)}
    if "choice" in fields:
        assert found == set(fields["choice"])
    else:
        assert {text[:-2] for text in found} == {" a", "b"} and all(text.endswith("/") for text in found)
