"""Requests and conversations from files, checked whole before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines.serving.request import Request
from engines.serving.sampling import Sampling
from iapt_export.contract.errors import IaptError
from iapt_export.contract.schema import parse_json

MAX_PROBLEMS = 10
"""Bad lines that are named; the rest are counted."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tenant": (_is_text, "a tenant's name"),
    "prompt": (_is_text, "text"),
    "messages": (_list_of(lambda value: isinstance(value, dict)), "a list of {role, content}"),
    "tokens": (_list_of(_is_whole), "a list of token ids"),
    "system": (lambda value: value is None or _is_text(value), "text or null"),
    "max_new_tokens": (lambda value: _is_whole(value) and value >= 1, "a whole number of at least 1"),
    "temperature": (_is_number, "a number"),
    "top_p": (_is_number, "a number"),
    "seed": (_is_whole, "a whole number"),
    "stop": (_list_of(_is_text), "a list of texts"),
    "stop_token_ids": (_list_of(_is_whole), "a list of token ids"),
    "ignore_eos": (lambda value: isinstance(value, bool), "true or false"),
}
"""What a line may say: the fields of `Request` and of its `Sampling`, each with what it takes."""
INSTRUCTION = ("prompt", "messages", "tokens")
SAMPLING = ("temperature", "top_p", "seed")


def read_messages(path: Path) -> list[dict[str, str]]:
    """A conversation from a JSON file; who may speak, and in which order, is checked by the session.

    Raises:
        IaptError: there is no such file, or it is no list of objects.
    """
    try:
        messages = parse_json(_text_of(path, "JSON, a list of {role, content}"))
    except ValueError as error:
        raise IaptError(f"{path} is not JSON ({error}); expected a list of {{role, content}}") from error
    if not messages or not FIELDS["messages"][0](messages):
        raise IaptError(f"{path}: expected a list of {{role, content}}, found {_shown(messages)}")
    return list(messages)


def read_requests(path: Path, max_new_tokens: int, sampling: Sampling) -> dict[int, Request]:
    """Requests from a file of JSON lines.

    Args:
        path: one object a line with the names of `FIELDS`; empty lines are skipped.
        max_new_tokens: of lines that do not say.
        sampling: likewise.

    Returns:
        The number of each request's line, from 1, to the request.

    Raises:
        IaptError: there is no such file, or no request in it, or lines that are none: each with its number, the
            field, what was expected and what was found.
    """
    defaults = {"max_new_tokens": max_new_tokens, **{name: getattr(sampling, name) for name in SAMPLING}}
    requests: dict[int, Request] = {}
    problems: list[str] = []
    for number, line in enumerate(_text_of(path, "one JSON object a line").split("\n"), 1):
        if line.strip():
            try:
                requests[number] = _request(line, defaults)
            except (IaptError, ValueError) as error:
                problems.append(f"line {number}: {error}")
    refuse_lines(path, problems)
    if not requests:
        raise IaptError(f"{path} holds no request; expected one JSON object a line, such as " + _EXAMPLE)
    return requests


def refuse_lines(path: Path, problems: list[str]) -> None:
    """Raise one `IaptError` for all bad lines of a file, or return where there are none."""
    if problems:
        more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        shown = "\n  ".join(problems[:MAX_PROBLEMS])
        raise IaptError(f"{path}: {len(problems)} request(s) cannot be answered, so none was:\n  {shown}{more}")


def check_named(tenant: str | None, tenants: Sequence[str]) -> None:
    """Refuse a request that names nobody where it could mean a tenant; an empty name asks the backbone.

    Raises:
        IaptError: it says nothing of whose adapter answers.
    """
    if tenant is None and tenants:
        raise IaptError(f"--tenant is missing: whose adapter answers; this bundle has {', '.join(tenants)}")


_EXAMPLE = '{"tenant": "reviews", "prompt": "A fine film."}'


def _text_of(path: Path, expected: str) -> str:
    if not path.is_file():
        raise IaptError(f"{path} is no file; expected {expected}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise IaptError(f"{path} is not UTF-8 text: {error}; expected {expected}") from error


def _request(line: str, defaults: dict[str, Any]) -> Request:
    """One line's request.

    Raises:
        IaptError: what is wrong with it.
        ValueError: it is no JSON, or one with numbers that Python does not read.
    """
    try:
        fields = parse_json(line)
    except json.JSONDecodeError as error:
        raise IaptError(
            f"not JSON ({error.msg} at column {error.colno}); expected an object such as {_EXAMPLE}"
        ) from error
    if not isinstance(fields, dict):
        raise IaptError(f"expected {_EXAMPLE} or the like, found {_shown(fields)}")
    unknown = sorted(fields.keys() - FIELDS.keys())
    are = f"fields {', '.join(unknown)} are" if len(unknown) > 1 else f"field {''.join(unknown)} is"
    problems = [f"{are} not known; expected {', '.join(FIELDS)}"] if unknown else []
    for name, (is_right, expected) in FIELDS.items():
        if name in fields and not is_right(fields[name]):
            problems.append(f"field {name}: expected {expected}, found {_shown(fields[name])}")
    if "tenant" not in fields:
        problems.append("field tenant is missing; expected whose adapter answers")
    given = [name for name in INSTRUCTION if name in fields]
    if len(given) != 1:
        problems.append(f"expected one of the fields {', '.join(INSTRUCTION)}, found {' and '.join(given) or 'none'}")
    if problems:
        raise IaptError("; ".join(sorted(problems)))
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in (defaults | fields).items()}
    sampling = Sampling(**{name: fields.pop(name) for name in SAMPLING})
    return Request(**fields, sampling=sampling)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
