"""Settings as frozen dataclasses: read from files, checked when they are made.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from iapt_export.contract.errors import IaptError


def summary_of(cls: type[Any]) -> str:
    """The first line of a configuration's docstring: what a method is, in a sentence."""
    return (inspect.getdoc(cls) or cls.__name__).splitlines()[0].replace("``", "")


def config_from_dict(cls: type[Any], fields: dict[str, Any], source: str) -> Any:
    """Build a config dataclass from a mapping that a file holds, refusing unknown names.

    Fields that the file is too old to have take the values of the class's ``older``, if it has such.

    Args:
        cls: the dataclass.
        fields: field name to value.
        source: what the mapping was read from, for the error text.

    Raises:
        IaptError: unknown fields, or values that ``cls`` refuses.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise IaptError(f"{source}: unknown field {', '.join(unknown)}; known fields are {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    listed = {
        name: tuple(value)
        for name, value in fields.items()
        if isinstance(value, list) and get_origin(hints[name]) is tuple
    }
    raise_problems(source, type_problems(cls, fields | listed))
    return cls(**{**getattr(cls, "older", {}), **fields, **listed})


def computing_fields(config: Any) -> tuple[tuple[str, Any], ...]:
    """A configuration's fields that change what is computed, without those that matter in training alone."""
    skipped = getattr(config, "training_fields", ())
    fields = ((name, value) for name, value in dataclasses.asdict(config).items() if name not in skipped)
    # names, such as those of LoRA's layers, count in whatever order they were given
    return tuple(sorted((name, tuple(sorted(value)) if isinstance(value, tuple) else value) for name, value in fields))


def type_problems(cls: type[Any], fields: Mapping[str, Any]) -> list[str]:
    """One line for each value that is no text where text belongs: of numbers and choices, their ranges tell.

    Args:
        cls: the dataclass.
        fields: values of some of its fields.
    """
    problems, hints = [], get_type_hints(cls)
    for name, value in fields.items():
        hint = hints[name]
        kinds = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
        if get_origin(hint) is tuple and get_args(hint)[0] is str:
            if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
                problems.append(f"{name}={value!r} is no list of texts")
        elif (str in kinds or kinds == (int, types.NoneType)) and (
            not isinstance(value, kinds) or isinstance(value, bool)
        ):
            problems.append(f"{name}={value!r} is not {' or '.join(_NAMES[kind] for kind in kinds)}")
    return problems


_NAMES = {str: "text", int: "an integer", types.NoneType: "null", Path: "a path"}


def choice_problems(config: Any) -> list[str]:
    """One line for each ``Literal`` field whose value is not among its choices, each boolean that is none."""
    problems = []
    hints = get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        value, choices = getattr(config, name), get_args(hints[name])
        if types.NoneType in choices:  # a field that may be left out
            choices = sum(map(get_args, choices), ()) if value is not None else ()
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            problems.append(f"{name}={value!r} is not one of {', '.join(choices)}")
        if hints[name] is bool and not isinstance(value, bool):
            problems.append(f"{name}={value!r} is not true or false")
    return problems


def range_problems(config: Any, **ranges: tuple[float, float]) -> list[str]:
    """One line for each named field outside its lowest and highest value: of integers unless they are floats."""
    problems = []
    for name, (low, high) in ranges.items():
        value, (kinds, form) = getattr(config, name), (int, "") if isinstance(low, int) else (int | float, "g")
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            span = f"of at least {low}" if high == math.inf else f"from {low:{form}} to {high:{form}}"
            problems.append(f"{name}={value!r} is not {'a number' if form == 'g' else 'an integer'} {span}")
    return problems


def raise_problems(subject: str, problems: list[str]) -> None:
    """Raise one `IaptError` that lists every problem, or return when there is none."""
    if problems:
        raise IaptError(f"{subject}: " + "; ".join(problems))


def size_of(text: str) -> int:
    """A size such as 20GB or 500MB, in bytes.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) ?([kmgt]b)?", text.lower())
    if found is None:
        raise ValueError(f"{text!r} is no size; expected such as 20GB, 500MB, or 0")
    return int(float(found[1]) * 1000 ** ("", "kb", "mb", "gb", "tb").index(found[2] or ""))
