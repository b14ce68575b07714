"""Which cases of a check the default run takes; `make test-thorough`, and CI, take the others.

A matrix over methods, families, faults or places checks one piece of code many times. Some of its cases stay in the
default run, so that this stays short enough to be run before every commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def default_for(wanted: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test, all but the wanted ones marked as ``thorough``.

    Args:
        wanted: says of a case whether the default run takes it.
        cases: as `pytest.mark.parametrize` takes them; a tuple is a case of several arguments.

    Raises:
        ValueError: no case is wanted, or all are.
    """
    found = list(cases)
    chosen = [wanted(case) for case in found]
    if all(chosen) or not any(chosen):
        raise ValueError(f"the default run takes {sum(chosen)} of {len(found)} cases; it should take some")
    return [case if taken else _marked(case) for case, taken in zip(found, chosen, strict=True)]


def _marked(case: Any) -> Any:
    if hasattr(case, "marks"):  # of pytest.param
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.thorough])
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough)
