"""Settings as frozen dataclasses: read from files, checked when they are made, explained by the text below each field.

Standard library only.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from typing import Any, get_args

from iapt_export.contract.errors import IaptError

NAMES_TYPE = "tuple[str, ...]"
"""Type of the fields that hold names; one text with commas on the command line."""


def field_help(cls: type[Any]) -> dict[str, str]:
    """Field name to the string that stands below the field in the source, inherited ones first: its help text."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {
        name: text
        for base in cls.__bases__
        if dataclasses.is_dataclass(base)
        for name, text in field_help(base).items()
    }
    for field, text in itertools.pairwise(body.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[field.target.id] = str(text.value.value)
    return texts


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
    lists = {field.name for field in dataclasses.fields(cls) if field.type == NAMES_TYPE}
    listed = {name: tuple(value) for name, value in fields.items() if name in lists and isinstance(value, list)}
    return cls(**{**getattr(cls, "older", {}), **fields, **listed})


def choice_problems(config: Any) -> list[str]:
    """One line for each ``Literal`` field whose value is not among its choices, each boolean that is none."""
    problems = []
    names = {**vars(sys.modules[type(config).__module__]), "bool": bool}
    hints = {field.name: names.get(str(field.type)) for field in dataclasses.fields(config)}
    for name, hint in hints.items():
        value, choices = getattr(config, name), get_args(hint)
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            problems.append(f"{name}={value!r} is not one of {', '.join(choices)}")
        if hint is bool and not isinstance(value, bool):
            problems.append(f"{name}={value!r} is not true or false")
    return problems


def range_problems(config: Any, **ranges: tuple[int, int]) -> list[str]:
    """One line for each named field that is no integer from its lowest to its highest value."""
    problems = []
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            problems.append(f"{name}={value!r} is not an integer from {low} to {high}")
    return problems


def raise_problems(subject: str, problems: list[str]) -> None:
    """Raise one `IaptError` that lists every problem, or return when there is none."""
    if problems:
        raise IaptError(f"{subject}: " + "; ".join(problems))
