"""Continuous batching: which waiting requests join the running rows, and when rows leave.

    scheduler.add(entry)
    while scheduler.has_work:
        for entry, token in scheduler.step():
            ...

A step gives every running row one token, or several where it was drafted right, then lets waiting requests join while
rows are free and reads their instructions: short ones at once, long ones in another thread while the running rows go
on, where the stepper can do so.
Rows that end leave at once, so others take their places in the same step. What goes wrong with one request's logits or
text ends that request alone. One thread; `engines.serving.session` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from engines.serving.account import Share
from engines.serving.beside import BesideReading
from engines.serving.drafts import Drafting
from engines.serving.entry import Entry
from engines.serving.fair_queue import FairQueue
from engines.serving.request import Item, Token
from engines.serving.stepper import Instruction, Stepper
from iapt_export.contract.errors import IaptError

BESIDE_TOKENS = 64
"""More instruction tokens than this, padding included, are read in another thread while rows decode; fewer take about
as long as a step."""
READ_TOKENS = 1024
"""Instruction tokens, padding included, that are read at once at most: how long the running rows wait for new ones."""


class Scheduler:
    """Waiting requests and running rows of one stepper."""

    def __init__(self, stepper: Stepper, *, continuous: bool = True, shares: Mapping[str, Share] | None = None) -> None:
        """Start with nothing.

        Args:
            stepper: active, without rows.
            continuous: let requests join while others run; else a batch runs to its end before the next begins.
            shares: see `FairQueue`.
        """
        self.stepper = stepper
        self.continuous = continuous
        self.waiting = FairQueue(shares)
        self.running: list[Entry] = []
        """In the order of the stepper's rows."""
        self.joining: list[Entry] = []
        """Those whose instructions are being read beside the running rows."""
        self.drafting = Drafting()
        self._reading: BesideReading | None = None
        self._began: float | None = None

    @property
    def step_seconds(self) -> float:
        """How long the step under way has taken; 0 between steps. Any thread may ask."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.joining or len(self.waiting))

    def add(self, entry: Entry) -> None:
        """Let a request wait for its turn."""
        self.waiting.add(entry)

    def step(self) -> Iterator[tuple[Entry, Item]]:
        """Advance everything by a token, or by several where drafts are right.

        Yields:
            Each request with its token, its end where it was cancelled or is late, or its failure.
        """
        self._began = time.monotonic()
        try:
            yield from self._step()
        finally:
            self._began = None

    def _step(self) -> Iterator[tuple[Entry, Item]]:
        yield from self._dropped()
        if self._reading is not None and (self._reading.is_done or not self.running):
            yield from self._joined(self._reading.result())
        before = len(self.running)
        if before:
            yield from self._go_on()
        if self._reading is None and (joining := self._chosen(before)):
            instructions = [Instruction(entry.tenant, entry.instruction, entry.soft_prompts) for entry in joining]
            first = len(self.running)
            tokens = max(entry.length for entry in joining) * len(joining)
            if first and tokens > BESIDE_TOKENS and self.stepper.reads_beside:
                self.joining = joining
                self._reading = BesideReading(self.stepper.begin(instructions))
                return
            self.running += joining
            yield from self._advance(self.stepper.read(instructions)[:, None], first)

    def finish(self) -> None:
        """Wait for what is being read; nobody steps any more, and the stepper may be deactivated then."""
        if self._reading is not None:
            self._reading.wait()

    def _joined(self, logits: np.ndarray) -> Iterator[tuple[Entry, Item]]:
        """The rows that were read beside the others follow them."""
        assert self._reading is not None
        self.stepper.join(self._reading.reading)
        first = len(self.running)
        self.running += self.joining
        self.joining, self._reading = [], None
        yield from self._advance(logits[:, None], first)

    def _go_on(self) -> Iterator[tuple[Entry, Item]]:
        """One step of the running rows, with drafts where that pays."""
        last = [[entry.tokens[-1]] for entry in self.running]
        drafts: list[list[int]] = [[] for _ in last]
        if self.stepper.can_verify and self.drafting.pays([entry.expected() for entry in self.running]):
            drafts = [entry.draft() for entry in self.running]
        start = time.perf_counter()
        if any(drafts):
            logits = self.stepper.verify([first + draft for first, draft in zip(last, drafts, strict=True)])
        else:
            logits = self.stepper.step([token for (token,) in last])[:, None]
        self.drafting.took(len(last), time.perf_counter() - start, drafts=any(drafts))
        yield from self._advance(logits, 0, drafts)

    @property
    def free_rows(self) -> int:
        """Rows that nobody has, nor is being read for."""
        return self.stepper.max_rows - len(self.running) - len(self.joining)

    def _dropped(self) -> Iterator[tuple[Entry, Item]]:
        """Those that were cancelled, or are late."""
        now = time.monotonic()
        for entry in [entry for entry in self.waiting if entry.cancelled or entry.deadline <= now]:
            self.waiting.drop(entry)
            yield entry, entry.end("cancelled" if entry.cancelled else "deadline")
        for row in reversed(range(len(self.running))):
            entry = self.running[row]
            if entry.cancelled or entry.deadline <= now:
                self._leave(row)
                yield entry, entry.end("cancelled" if entry.cancelled else "deadline")

    def _chosen(self, before: int) -> list[Entry]:
        """The waiting requests whose turn has come."""
        if before and not self.continuous:
            return []
        free = self.free_rows
        joining: list[Entry] = []
        longest, now = 0, time.monotonic()
        while len(joining) < free and (entry := self.waiting.peek()) is not None:
            longest = max(longest, entry.length)
            if joining and longest * (len(joining) + 1) > READ_TOKENS:
                break
            self.waiting.take(entry)
            entry.times.started = now
            if entry.drafter is not None:
                self.drafting.start(entry.drafter)
            joining.append(entry)
        return joining

    def _advance(
        self, logits: np.ndarray, first: int, drafts: Sequence[list[int]] | None = None
    ) -> Iterator[tuple[Entry, Item]]:
        """Give the rows from ``first`` on their tokens, and let those leave that end.

        Args:
            logits: ``[rows, T, V]``, for the next token and for those after each drafted one.
            first: place of the first row.
            drafts: of each row.
        """
        entries = self.running[first:]
        drafts = drafts or [[]] * len(entries)
        given = [self._taken(*of_row) for of_row in zip(entries, logits, drafts, strict=True)]
        for row in reversed(range(first, len(self.running))):  # from the last, because it replaces who leaves
            items = given[row - first]
            if any(drafts):
                self.stepper.keep(row, len(items))
            if not isinstance(items[-1], Token):
                self.stepper.clear(row)
            if not isinstance(items[-1], Token) or items[-1].finish_reason:
                self._leave(row)
        yield from ((entry, item) for entry, items in zip(entries, given, strict=True) for item in items)

    def _taken(self, entry: Entry, logits: np.ndarray, draft: list[int]) -> list[Item]:
        """A row's next tokens: one, and another one for as long as it was drafted; its failure ends them."""
        items: list[Item] = []
        for drafted, behind in zip([*draft, None], logits, strict=False):
            item = _token_or_failure(entry, behind)
            items.append(item)
            if not isinstance(item, Token):
                break
            if entry.drafter is not None:
                self.drafting.learn(entry.drafter.add(item.token))
            if item.token == drafted:
                self.drafting.accepted += 1
            if item.finish_reason or item.token != drafted:
                break
        self.drafting.drafted += len(draft)
        return items

    def _leave(self, row: int) -> None:
        self.running[row].account.running -= 1
        self.running[row] = self.running[-1]
        self.running.pop()
        self.stepper.leave(row)


def _token_or_failure(entry: Entry, logits: np.ndarray) -> Item:
    try:
        token = entry.take(logits)
    except BaseException as error:  # a client's hook runs in it, which may raise SystemExit: its request ends alone
        field = error.field if isinstance(error, IaptError) else None  # of the request, which is at fault then
        failure = IaptError(
            f"request {entry.number} of tenant {entry.tenant.name} failed: {error}",
            code="generation_failed" if field is None else "invalid",
            field=field,
        )
        failure.__cause__ = error
        return failure
    entry.account.generated()
    return token
