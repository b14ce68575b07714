"""JSON from outside: parsed as its standard has it, then read into dataclasses, every problem told at once.

Standard library only. ``engines/cpp/src/json_fields.h`` takes and refuses the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

from iapt_export.contract.errors import BundleError, shown

DEEPEST = 64
"""Lists and objects inside each other, at most."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_INT64 = range(-(2**63), 2**63)


def parse_json(data: bytes | str) -> Any:
    """Parse JSON strictly: UTF-8, no NaN or infinity, no half surrogates, no name twice, at most `DEEPEST` levels.

    Raises:
        ValueError: it is none, with the reason.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    depth = 0
    for mark in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if mark in "[{" else -1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    value = json.loads(
        text, parse_constant=_refuse, parse_float=_finite, parse_int=_finite_int, object_pairs_hook=_once
    )
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate pair
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the name {shown(_first_double(pairs))} is given twice in one object")
    return fields


def _first_double(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:80]} is too large")
    return value


def _finite_int(text: str) -> int:
    if len(text) > 300:
        _finite(text)
    return int(text)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file, parsed as `parse_json` has it.

    Args:
        path: the file.
        remedy: what to try where it holds something else, such as ``build the bundle again``.

    Raises:
        BundleError: it is no JSON, or no object.
        OSError: it cannot be read.
    """
    try:
        fields = parse_json(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}; {remedy}") from error
    if not isinstance(fields, dict):
        raise BundleError(f"{path} holds a {type(fields).__name__}; expected a JSON object; {remedy}")
    return fields


def read_fields(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Turn parsed JSON into the annotated type, adding a line to ``problems`` for each thing that does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where, problems)
    if origin in (types.UnionType, typing.Union):
        fits = any(isinstance(value, option) and not isinstance(value, bool) for option in arguments)
        if not fits or (isinstance(value, int) and value not in _INT64):
            problems.append(f"{where} is {shown(value)}, expected {hint}")
        return value
    if origin is list and isinstance(value, list):
        return [read_fields(arguments[0], item, f"{where}[{index}]", problems) for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: read_fields(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    wrong_int = hint is int and (isinstance(value, bool) or (isinstance(value, int) and value not in _INT64))
    if hint is not Any and (not isinstance(value, origin or hint) or wrong_int):
        problems.append(f"{where} is {shown(value)}, expected {getattr(origin or hint, '__name__', hint)}")
    return value


@functools.cache
def _shape(cls: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """A dataclass's fields with their types, and those without a default; a manifest asks hundreds of times."""
    required = (
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    )
    return typing.get_type_hints(cls), frozenset(required)


def _dataclass(cls: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where} is {shown(value)}, expected an object")
        return None
    hints, required = _shape(cls)
    problems += [f"{where}.{name} is missing" for name in sorted(required - set(value))]
    problems += [f"{where}.{name} is not a known field" for name in sorted(set(value) - set(hints))]
    before = len(problems)
    fields = {
        name: read_fields(hints[name], item, f"{where}.{name}", problems)
        for name, item in value.items()
        if name in hints
    }
    if len(problems) > before or not required <= set(value):
        return None
    try:
        return cls(**fields)
    except BundleError as error:
        problems.append(f"{where}: {error}")
        return None
