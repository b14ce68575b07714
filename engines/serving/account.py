"""What a tenant gets of a session, and what it has had."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from iapt_export.contract.errors import IaptError


@dataclass(frozen=True)
class Share:
    """What a tenant gets of a session.

    Raises:
        IaptError: a value is out of its range.
    """

    weight: float = 1.0
    """Of two tenants that always want more, one of twice the weight gets twice the tokens."""
    max_rows: int | None = None
    """Rows that it has at once at most."""
    max_waiting: int | None = None
    """Requests of it that wait at most; more are refused like those for a full queue."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise IaptError(f"weight {self.weight} is out of range; expected more than 0", field="weight")
        for name in ("max_rows", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise IaptError(f"{name} {value} is out of range; expected at least 1", field=name)


@dataclass(eq=False)
class Account:
    """One tenant's place in the queue, and what it has had."""

    share: Share = Share()
    served: float = 0.0
    """Tokens divided by the weight."""
    running: int = 0
    waiting: list[tuple[int, int, Any]] = field(default_factory=list)
    """A heap: priority, place in the order of arrival, request."""
    prompt_tokens: int = 0
    """Read since the session opened."""
    generated_tokens: int = 0

    def read(self, tokens: int) -> None:
        """Count an instruction."""
        self.prompt_tokens += tokens
        self.served += tokens / self.share.weight

    def generated(self) -> None:
        """Count a token of an answer."""
        self.generated_tokens += 1
        self.served += 1 / self.share.weight

    @property
    def may_start(self) -> bool:
        """Whether one more of its requests may have a row."""
        return self.share.max_rows is None or self.running < self.share.max_rows
