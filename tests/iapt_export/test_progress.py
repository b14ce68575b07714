"""Progress goes to stderr: a line for each step in a log, one live line on a terminal, nothing when quiet."""

from __future__ import annotations

import gc
import io
import re
from contextlib import suppress

import pytest
from rich.console import Console

from iapt_export import progress
from iapt_export.progress import Steps, large_imports


def test_a_log_gets_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as steps:
        steps("loading")
        for fraction in (0.1, 0.5, 1.0):
            steps("building", fraction)
        steps("done [not markup]")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [re.sub(r"^\[ *[\d.]+s\] ", "", line) for line in shown.err.splitlines()]
    assert lines == ["loading", "building", "done [not markup]"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps(quiet=True) as steps:
        steps("loading")
        steps("building", 0.5)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_what_is_done_and_how_far_the_rest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    with Steps() as steps:
        steps("loading model")
        steps("building engine", 0.25)
        steps("building engine", 0.5)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "done loading model" in shown
    assert "building engine" in shown and "50%" in shown


def test_an_error_stops_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    steps = Steps()

    def fail() -> None:
        with steps:
            steps("loading")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert steps._live is not None and not steps._live.live.is_started


def test_large_imports_collect_no_garbage_and_are_left_out_of_later_collections() -> None:
    before = gc.get_freeze_count()
    try:
        with suppress(KeyError), large_imports():
            assert not gc.isenabled()
            imported = [{} for _ in range(100)]
            raise KeyError
        assert gc.isenabled() and gc.get_freeze_count() >= before + len(imported)
    finally:
        gc.enable()
