"""What TensorRT calls back into while it builds: a logger that keeps errors, a monitor that reports and cancels.

TensorRT's base classes exist only once its module is imported, so both classes are made inside functions.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

_NOISE = re.compile(
    r"Thread context has not been set"  # said on every choice of a compute capability
    r"|catchCudaError.*driver version is insufficient"  # said after every error on a machine without a driver
    r"|^While parsing node|^--- (Begin|End) node|^Node name:"  # the parser's errors say it better
)
_SOURCE_PREFIX = re.compile(r"^[\w./]+\.[ch]pp:\d+: ")


@dataclass(frozen=True)
class BuildProgress:
    """One step of a build."""

    phase: str
    """TensorRT's name of the phase, unique among those that are running."""
    parent: str | None
    """The phase that this one is part of."""
    done: int
    total: int
    """Steps, at least one; the phase is over when ``done`` equals it."""


ProgressCallback = Callable[[BuildProgress], None]
"""Called from the building thread; an exception that it raises cancels the build and comes out of it."""


def make_logger(trt: Any) -> Any:
    """An ``ILogger`` whose ``errors`` lists the messages of error severity, and whose ``lines()`` tidies them."""

    class ErrorLogger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def lines(self) -> list[str]:
            return readable_lines(self.errors)

    return ErrorLogger()


def readable_lines(messages: list[str]) -> list[str]:
    """The lines that tell something, each once, without TensorRT's own source positions."""
    lines = [_SOURCE_PREFIX.sub("", line).strip() for message in messages for line in message.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not _NOISE.search(line)))


def make_monitor(trt: Any, on_progress: ProgressCallback) -> Any:
    """An ``IProgressMonitor`` that reports `BuildProgress`; its ``cancel()`` ends the build at the next step.

    Its ``error`` keeps what the callback raised: an exception must not travel through TensorRT's C++.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self._cancelled = threading.Event()
            self._phases: dict[str, tuple[str | None, int]] = {}

        def cancel(self) -> None:
            self._cancelled.set()

        def phase_start(self, phase: str, parent: str | None, total: int) -> None:
            self._phases[phase] = (parent, max(total, 1))
            self._report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._report(phase, step + 1)
            return not self._cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            # a phase that is cut short finishes too; the bar is full then, because it is over
            self._report(phase, self._phases.get(phase, (None, 1))[1])

        def _report(self, phase: str, done: int) -> None:
            parent, total = self._phases.get(phase, (None, max(done, 1)))
            try:
                on_progress(BuildProgress(phase, parent, min(done, total), total))
            except BaseException as error:
                self.error = self.error or error
                self.cancel()

    return Monitor()


def run_cancellable(work: Callable[[], Any], monitor: Any) -> Any:
    """Run a build in its own thread, so that Ctrl-C reaches the waiting one at once and cancels the build.

    Returns:
        What ``work`` returns.

    Raises:
        KeyboardInterrupt: after the build has come to its end.
        BaseException: what the progress callback raised.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorrt-build") as pool:
        future = pool.submit(work)
        try:
            result = future.result()
        except BaseException:
            monitor.cancel()
            raise
    if monitor.error is not None:
        raise monitor.error
    return result
