"""Begin a long command soon, and show what it is doing: a live line on a terminal, lines in a log, all in a file."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

LOGGER = logging.getLogger("iapt_export.progress")
"""Hears of each step; only a log file listens to it."""
LOGGER.propagate = False
OURS = ("iapt_export", "engines", "trainers", "validation")
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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


@contextmanager
def listening(*, quiet: bool, verbose: bool, file: Path | None) -> Iterator[None]:
    """Send what this project, its libraries and Python's warnings note to where it is wanted, while this is open.

    Args:
        quiet: nothing below an error on stderr.
        verbose: also what passes changed.
        file: a file to add everything to, steps and the trace of an error included; None for none.
    """
    stderr = logging.StreamHandler()
    stderr.setFormatter(logging.Formatter("%(message)s"))
    stderr.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    handlers: list[logging.Handler] = [stderr]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter(LINE))
        LOGGER.addHandler(handlers[-1])
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in OURS]
    before = [logger.level for logger in loggers]
    for handler in handlers:
        root.addHandler(handler)
    for logger in loggers if verbose or file else []:
        logger.setLevel(logging.INFO)
    LOGGER.setLevel(logging.INFO)
    if quiet or file:
        logging.captureWarnings(True)
    try:
        yield
    except Exception:
        if file is not None:
            LOGGER.exception("the command failed")
        raise
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            LOGGER.removeHandler(handler)
            handler.close()


@contextmanager
def large_imports() -> Iterator[None]:
    """Import in this context without collecting garbage, of which imports make next to none.

    torch, transformers and onnxscript make a million objects, which Python looks through again and again meanwhile:
    for about one of a build's 8 seconds before its first step. What was imported stays out of later collections, too,
    among them those at the interpreter's end, which took 2 seconds.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
