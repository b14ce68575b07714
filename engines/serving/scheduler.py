"""Continuous batching: which waiting requests join the running rows, and when rows leave.

    scheduler.add(entry)
    while scheduler.has_work:
        for entry, token in scheduler.step():
            ...

A step gives every running row one token, then lets waiting requests join while rows are free and reads their
instructions. Rows that end leave at once, so others take their places in the same step. What goes wrong with one
request's logits or text ends that request alone. One thread; `engines.serving.session` runs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from engines.serving.request import Item, Request, Token
from engines.serving.sampling import choose
from engines.serving.stepper import Instruction, Stepper
from engines.serving.tenants import Tenant
from engines.serving.text import TextCodec
from iapt_export.contract.errors import IaptError

READ_TOKENS = 1024
"""Instruction tokens, padding included, that are read at once at most: how long the running rows wait for new ones."""


@dataclass(eq=False)
class Entry:
    """A request on its way through the scheduler."""

    request: Request
    number: int
    """The request's place among those that were given together."""
    tenant: Tenant
    instruction: list[int]
    codec: TextCodec | None
    """None where the bundle has no tokenizer: its answers are token ids without text."""
    eos_token_ids: frozenset[int]
    random: np.random.Generator
    soft_prompts: np.ndarray | None = None
    """What the client sent: the copy that was checked."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    """The part of the answer's text that was handed out so far."""
    cancelled: bool = False

    @property
    def length(self) -> int:
        """Cache entries that are taken when the instruction has been read."""
        return self.tenant.prompt_length + len(self.instruction)

    def take(self, logits: np.ndarray) -> Token:
        """Choose the next token from ``logits [V]``.

        Raises:
            IaptError: the logits hold NaN.
        """
        token = choose(logits, self.request.sampling, self.random)
        self.tokens.append(token)
        reason = None
        if token in self.eos_token_ids and not self.request.ignore_eos:
            reason = "eos"
        elif token in self.request.stop_token_ids:
            reason = "stop"
        elif len(self.tokens) >= self.request.max_new_tokens:
            reason = "length"
        spoken = self.tokens[:-1] if reason == "stop" else self.tokens
        whole = self.codec.decode(spoken) if self.codec else ""
        cut = min((place for stop in self.request.stop if (place := whole.find(stop)) >= 0), default=None)
        if cut is not None:
            whole, reason = whole[:cut], "stop"
        end = len(whole) if reason else _settled(whole, self.request.stop)
        added, self.text = whole[len(self.text) : end], whole[: max(end, len(self.text))]
        return Token(self.number, len(self.tokens) - 1, token, added, reason)


class Scheduler:
    """Waiting requests and running rows of one stepper."""

    def __init__(self, stepper: Stepper, *, continuous: bool = True) -> None:
        """Start with nothing.

        Args:
            stepper: active, without rows.
            continuous: let requests join while others run; else a batch runs to its end before the next begins.
        """
        self.stepper = stepper
        self.continuous = continuous
        self.waiting: deque[Entry] = deque()
        self.running: list[Entry] = []
        """In the order of the stepper's rows."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, entry: Entry) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(entry)

    def step(self) -> Iterator[tuple[Entry, Item]]:
        """Advance everything by a token.

        Yields:
            Each request with its token, with None where it was cancelled and dropped, or with its failure.
        """
        for entry in [entry for entry in self.waiting if entry.cancelled]:
            self.waiting.remove(entry)
            yield entry, None
        for row in reversed(range(len(self.running))):
            if self.running[row].cancelled:
                yield self._leave(row), None
        before = len(self.running)
        if before:
            logits = self.stepper.step([entry.tokens[-1] for entry in self.running])
            yield from self._advance(logits, 0)
        if joining := self._joining(before):
            instructions = [Instruction(entry.tenant, entry.instruction, entry.soft_prompts) for entry in joining]
            first = len(self.running)
            self.running += joining
            yield from self._advance(self.stepper.read(instructions), first)

    def _joining(self, before: int) -> list[Entry]:
        """The waiting requests whose turn has come, first come first served."""
        if before and not self.continuous:
            return []
        free = self.stepper.max_rows - len(self.running)
        joining: list[Entry] = []
        longest = 0
        while self.waiting and len(joining) < free:
            longest = max(longest, self.waiting[0].length)
            if joining and longest * (len(joining) + 1) > READ_TOKENS:
                break
            joining.append(self.waiting.popleft())
        return joining

    def _advance(self, logits: np.ndarray, first: int) -> Iterator[tuple[Entry, Item]]:
        """Give the rows from ``first`` on their tokens, and let those leave that end."""
        pairs = [
            (entry, _token_or_failure(entry, row)) for entry, row in zip(self.running[first:], logits, strict=True)
        ]
        for row in reversed(range(first, len(self.running))):  # from the last, because it replaces who leaves
            item = pairs[row - first][1]
            if not isinstance(item, Token):
                self.stepper.clear(row)
            if not isinstance(item, Token) or item.finish_reason:
                self._leave(row)
        yield from pairs

    def _leave(self, row: int) -> Entry:
        entry = self.running[row]
        self.running[row] = self.running[-1]
        self.running.pop()
        self.stepper.leave(row)
        return entry


def _token_or_failure(entry: Entry, logits: np.ndarray) -> Item:
    try:
        return entry.take(logits)
    except Exception as error:
        failure = IaptError(f"request {entry.number} of tenant {entry.tenant.name} failed: {error}")
        failure.__cause__ = error
        return failure


def _settled(text: str, stops: tuple[str, ...]) -> int:
    """How much of an unfinished text can be handed out: no half character, nothing that a stop text may begin with."""
    end = len(text)
    while end and text[end - 1] == "\N{REPLACEMENT CHARACTER}":
        end -= 1
    starts = (stop[:size] for stop in stops for size in range(1, len(stop)))
    return end - max((len(start) for start in starts if text[:end].endswith(start)), default=0)
