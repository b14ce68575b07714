"""The plots of reports, drawn once by each process of a run for equal figures: many tests build or validate one bundle.

A test of the plots calls `validation.reporting.report.target_plots`, which stays as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import validation.reporting.report
from validation.judging.result import TargetResult
from validation.reporting.report import Plot, target_plots


class SharedPlots:
    """Stands for `target_plots` in reports: draws what no test of this process has drawn yet."""

    def __init__(self) -> None:
        self.known: dict[str, list[Plot]] = {}

    def __call__(self, target: TargetResult) -> list[Plot]:
        key = repr(dataclasses.replace(target, seconds=0.0))
        if key not in self.known:
            self.known[key] = target_plots(target)
        return list(self.known[key])


@pytest.fixture(scope="session", autouse=True)
def shared_plots() -> Any:
    """Reports of this process with equal figures draw them once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation.reporting.report, "target_plots", SharedPlots())
        yield
