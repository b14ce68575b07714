"""Parsed JSON into dataclasses, every problem told at once. Standard library only."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from iapt_export.contract.errors import BundleError


def read_fields(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Turn parsed JSON into the annotated type, adding a line to ``problems`` for each thing that does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where, problems)
    if origin in (types.UnionType, typing.Union):
        if not any(isinstance(value, option) and not isinstance(value, bool) for option in arguments):
            problems.append(f"{where} is {value!r}, expected {hint}")
        return value
    if origin is list and isinstance(value, list):
        return [read_fields(arguments[0], item, f"{where}[{index}]", problems) for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: read_fields(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if hint is not Any and (not isinstance(value, origin or hint) or (hint is int and isinstance(value, bool))):
        problems.append(f"{where} is {value!r}, expected {getattr(origin or hint, '__name__', hint)}")
    return value


def _dataclass(cls: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where} is {value!r}, expected an object")
        return None
    hints = typing.get_type_hints(cls)
    required = {
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
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
