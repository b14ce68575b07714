"""A tokenizer's chat template, rendered byte for byte as transformers renders it, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from iapt_export.contract.errors import BundleError


class ChatTemplate:
    """A template is code of the model's author: sandboxed, with the settings and words that transformers gives it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: Jinja.
            special_tokens: name to text of the tokens that the template may write.

        Raises:
            BundleError: it is not valid.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _tojson
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"the bundle's chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]], date: str | None = None) -> str:
        """The conversation up to where the answer begins; templates that write the date get ``date``, or today's.

        Raises:
            BundleError: the template refuses the conversation, or fails.
        """
        try:
            return self._template.render(
                **{
                    **self._special_tokens,
                    "messages": [dict(message) for message in messages],
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": True,
                    "strftime_now": lambda pattern: date or datetime.now().strftime(pattern),
                },
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise BundleError(f"the bundle's chat template failed: {error}") from error


class GenerationTag(Extension):
    """``{% generation %}`` marks what a model answered, for training on it; what stands inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content, in a scope of its own as a call block has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
