"""A tokenizer's chat template, rendered byte for byte as transformers renders it, without transformers."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from iapt_export.contract.errors import BundleError

CPU_SECONDS = 0.5
"""What a template may compute for one conversation, or while it is compiled; a real one takes a thousandth of it."""
WALL_SECONDS = 10.0
"""The same on a machine that has no time for it."""
LONGEST_TEXT = 2**24
"""Characters that a template may make of a conversation."""


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
            self._template = _limited(lambda: environment.from_string(source))
        except BundleError:
            raise
        except Exception as error:  # it is the author's code, constants of which are computed here
            raise BundleError(f"the bundle's chat template is not valid: {_told(error)}") from error

    def render(self, messages: Sequence[Mapping[str, str]], date: str | None = None) -> str:
        """The conversation up to where the answer begins; templates that write the date get ``date``, or today's.

        Raises:
            BundleError: the template refuses the conversation, fails, or takes too long.
        """
        fields: dict[str, Any] = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": lambda pattern: date or datetime.now().strftime(pattern),
        }
        try:
            text = _limited(lambda: self._template.render(fields))
        except BundleError:
            raise
        except Exception as error:  # whatever the author's code raises
            raise BundleError(f"the bundle's chat template failed: {_told(error)}") from error
        if len(text) > LONGEST_TEXT:
            raise BundleError(
                f"the bundle's chat template made {len(text)} characters, expected at most {LONGEST_TEXT}"
            )
        return text


class _Stopped(BaseException):
    """Raised in a template that takes too long; none of its own ``except`` catches it."""


def _limited(work: Callable[[], Any]) -> Any:
    """The result of ``work``, or what it raises, or a `BundleError` when it takes too long.

    It runs in a thread of its own, into which an exception can be thrown. One operation of Python cannot be stopped;
    it then ends on its own, and nobody waits for it.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="iapt-template", daemon=True)
    end = time.monotonic() + WALL_SECONDS
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if thread.is_alive() and (_cpu_seconds(thread) > CPU_SECONDS or time.monotonic() > end):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
            raise BundleError(
                f"the bundle's chat template was stopped after {CPU_SECONDS} s of computing; it does not end, or does "
                "too much. Give token ids, or build the bundle with another template"
            )
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _cpu_seconds(thread: threading.Thread) -> float:
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    except OSError:  # it has just ended
        return 0.0


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


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
