"""What a command notes beside its result: on stderr as --quiet and --verbose want it, and in a file on request."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iapt_export.progress import LOGGER as PROGRESS
from iapt_export.showing import check_folders

OURS = ("iapt_export", "engines", "trainers", "validation")
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def listening(*, quiet: bool, verbose: bool, file: Path | None) -> Iterator[None]:
    """Send what this project, its libraries and Python's warnings note to where it is wanted, while this is open.

    Args:
        quiet: nothing below an error on stderr.
        verbose: also what passes changed.
        file: a file to add everything to, steps and the trace of an error included; None for none.

    Raises:
        IaptError: the file cannot be written there.
    """
    check_folders(file)
    stderr = logging.StreamHandler()
    stderr.setFormatter(logging.Formatter("%(message)s"))
    stderr.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    handlers: list[logging.Handler] = [stderr]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter(LINE))
        PROGRESS.addHandler(handlers[-1])
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in OURS]
    before = [logger.level for logger in loggers]
    for handler in handlers:
        root.addHandler(handler)
    for logger in loggers if verbose or file else []:
        logger.setLevel(logging.INFO)
    PROGRESS.setLevel(logging.INFO)
    if quiet or file:
        logging.captureWarnings(True)
    try:
        yield
    except Exception:
        if file is not None:
            PROGRESS.exception("the command failed")
        raise
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            PROGRESS.removeHandler(handler)
            handler.close()
