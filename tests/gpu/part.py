"""What a part of first light gets, and what it leaves.

What it measured is on disk after each figure, so that a part which is stopped at its time limit keeps what it had.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, SKIPPED, ERROR, STOPPED, RUNNING = "pass", "fail", "skipped", "error", "stopped", "running"


class Skip(Exception):  # noqa: N818  (it is no error)
    """This machine lacks what a part, or a step of it, needs; the text says what."""


@dataclass
class Work:
    """What a part gets, and where it puts what it finds."""

    device: str
    """``cuda``, or ``cpu`` in a rehearsal."""
    folder: Path
    """Models and bundles, which parts share."""
    tiny: bool = False
    """Sizes that a CPU runs in seconds."""
    limit_s: float = 600.0
    """Seconds after which it is stopped."""
    out: Path | None = None
    """File of the result; None keeps it in memory."""
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str = RUNNING
    reason: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Until the part is stopped."""
        return self.limit_s - (time.monotonic() - self.began)

    def record(self, **figures: Any) -> None:
        """Keep figures: numbers, words, or lists of rows of a table."""
        self.figures |= figures
        self.save()

    def row(self, table: str, **cells: Any) -> None:
        """Add a row to a table of the figures."""
        self.record(**{table: [*self.figures.get(table, []), cells]})
        print(f"{table}: " + ", ".join(f"{name} {shown(value)}" for name, value in cells.items()), flush=True)

    def check(self, name: str, passed: bool, found: str = "") -> None:
        """Hold something against what is expected of it; the part goes on either way."""
        self.checks.append({"check": name, "passed": bool(passed), "found": found})
        print(f"{'ok  ' if passed else 'FAIL'} {name}{': ' if found else ''}{found}", flush=True)
        self.save()

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Do one step; what goes wrong is written down as a failed check, and the part goes on.

        Returns:
            What the step returns; None where it failed or was skipped.
        """
        try:
            return action()
        except Skip as skipped:
            self.notes.append(f"{name}: {skipped}")
            print(f"skip {name}: {skipped}", flush=True)
            self.save()
        except Exception as error:  # every step of a rare machine counts
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {first_line(error)}")
        return None

    def save(self) -> None:
        """Write the result as it is now."""
        if self.out is not None:
            fields = ("status", "reason", "figures", "checks", "notes")
            content = {name: getattr(self, name) for name in fields}
            working = self.out.with_suffix(".part")
            working.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
            working.replace(self.out)


def first_line(error: BaseException) -> str:
    """An error's first line, not too long for a table."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:300]


def shown(value: Any) -> str:
    """A figure for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def carry_out(run: Callable[[Work], None], work: Work) -> Work:
    """Run a part to its verdict; never raises."""
    try:
        run(work)
        work.status = PASS if all(check["passed"] for check in work.checks) else FAIL
    except Skip as skipped:
        work.status, work.reason = SKIPPED, str(skipped)
    except Exception as error:
        traceback.print_exc()
        work.status, work.reason = ERROR, f"{type(error).__name__}: {first_line(error)}"
    work.save()
    return work


def median_ms(action: Callable[[], Any], device: str, repeats: int, warm: int = 3) -> float:
    """Median milliseconds of an action, the device's work included."""
    for _ in range(warm):
        action()
    return sorted(timed_ms(action, device) for _ in range(repeats))[repeats // 2]


def timed_ms(action: Callable[[], Any], device: str) -> float:
    """Milliseconds of an action until the device is done with it."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
