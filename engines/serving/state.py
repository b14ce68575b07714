"""What a session says of itself: for health checks, metrics, and whoever balances load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engines.serving.account import Account
from engines.serving.entry import Entry
from engines.serving.scheduler import Scheduler


@dataclass(frozen=True)
class TenantState:
    """What one tenant has, and has had since the session opened."""

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class SessionState:
    """A session at one moment."""

    status: str
    """``serving``, ``draining``, ``closed`` or ``failed``."""
    failure: str | None
    """Why it failed."""
    running: int
    """Rows that decode, or read their instructions."""
    waiting: int
    """Requests that wait for a row."""
    max_rows: int
    max_waiting: int
    cache_use: float
    """Cache entries in use over all that there are."""
    tenants: dict[str, TenantState]
    """Those that had a request since the session opened."""

    drafted_tokens: int = 0
    """Drafted tokens that steps have verified since the session opened."""
    accepted_tokens: int = 0
    """Those of them that were right, each a token without a step of its own."""
    step_seconds: float = 0.0
    """How long the step under way has taken; one that does not come back, as from a device that hangs, says nothing
    else."""

    @property
    def is_healthy(self) -> bool:
        """Whether requests are being answered."""
        return self.status in ("serving", "draining")

    def problem(self, stuck_after_s: float) -> str | None:
        """Why no request is answered; None where they are."""
        if self.is_healthy and self.step_seconds > stuck_after_s:
            return f"a step has taken {self.step_seconds:.0f} s, and more than {stuck_after_s:.0f} mean that it hangs"
        return None if self.is_healthy else f"the session is {self.status}: {self.failure}"


def state_of(
    status: str, failure: Exception | None, scheduler: Scheduler, arrived: Sequence[Entry], max_waiting: int
) -> SessionState:
    """What a session's scheduler has, and the requests that it will find at its next step."""
    rows, queue, stepper = [*scheduler.running, *scheduler.joining], scheduler.waiting, scheduler.stepper
    new = Counter(entry.tenant.name for entry in arrived)
    accounts = dict.fromkeys(new, Account()) | dict(queue.accounts)
    return SessionState(
        status=status,
        failure=None if failure is None else str(failure) or type(failure).__name__,
        running=len(rows),
        waiting=len(arrived) + len(queue),
        max_rows=stepper.max_rows,
        max_waiting=max_waiting,
        cache_use=sum(row.length + len(row.tokens) for row in rows) / (stepper.max_rows * stepper.capacity),
        tenants={
            name: TenantState(
                account.running, len(account.waiting) + new[name], account.prompt_tokens, account.generated_tokens
            )
            for name, account in accounts.items()
        },
        drafted_tokens=scheduler.drafting.drafted,
        accepted_tokens=scheduler.drafting.accepted,
        step_seconds=scheduler.step_seconds,
    )
