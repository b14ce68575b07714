"""Show what a long command is doing: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

LOGGER = logging.getLogger("iapt_export.progress")
"""Hears of each step; only a log file listens to it."""
LOGGER.propagate = False


class Steps:
    """Reports named steps on stderr, so that stdout stays clean for data.

    A step with a known fraction shows a bar. Repeating a step's text only keeps its line alive.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._started = time.monotonic()
        self._text = ""
        self._live: Progress | None = None
        if not quiet and self._console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )

    def __call__(self, text: str, fraction: float | None = None) -> None:
        """Say what is going on, and how far it is (0 to 1) if that is known."""
        if text != self._text:
            LOGGER.info(text)
        if self._live is not None:
            self._update(text, fraction)
        elif text != self._text and not self._quiet:
            print(f"[{time.monotonic() - self._started:6.1f}s] {text}", file=sys.stderr, flush=True)
        self._text = text

    def line(self, text: str) -> None:
        """Say something that stays: a line as it is."""
        LOGGER.info(text)
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def _update(self, text: str, fraction: float | None) -> None:
        assert self._live is not None
        if text != self._text:
            for task in self._live.task_ids:
                self._live.remove_task(task)
            if self._text:
                self._console.print(f"[green]done[/green] {self._text}")
            self._live.add_task(text, total=None)
        if fraction is not None:
            self._live.update(self._live.task_ids[-1], total=1.0, completed=fraction)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
