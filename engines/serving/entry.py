"""A request on its way through the scheduler: its row's state, and what becomes of each step's logits."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from engines.serving.account import Account
from engines.serving.answer_text import AnswerText
from engines.serving.drafts import Drafter
from engines.serving.request import Ended, Request, Token
from engines.serving.sampling import choose, log_probabilities
from engines.serving.shaping import Shaping
from engines.serving.tenants import Tenant
from engines.serving.text import TextCodec


@dataclass
class Times:
    """When things happened to a request, in seconds of `time.monotonic`; None for what has not."""

    submitted: float
    started: float | None = None
    """It got a row."""
    first_token: float | None = None
    finished: float | None = None
    tokens: list[float] = field(default_factory=list)
    """Each token was handed out by the session; when its reader takes it is another matter."""


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
    shaping: Shaping | None = None
    """What changes its logits, if anything does."""
    drafter: Drafter | None = None
    """What guesses its next tokens, where the session takes drafts."""
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    times: Times = field(default_factory=lambda: Times(time.monotonic()))
    account: Account = field(default_factory=Account)
    """Its tenant's, while it is in a scheduler."""

    def __post_init__(self) -> None:
        self._text = AnswerText(self.codec, self.request.stop) if self.codec else None
        self._longest = self.request.max_new_tokens or 1
        seconds = self.request.deadline_s
        self.deadline = float("inf") if seconds is None else self.times.submitted + seconds
        """In seconds of `time.monotonic`."""

    @property
    def length(self) -> int:
        """Cache entries that are taken when the instruction has been read."""
        return self.tenant.prompt_length + len(self.instruction)

    def draft(self) -> list[int]:
        """What its next tokens may be, but for the last that it may have, which no other follows."""
        return self.drafter.propose()[: self._room] if self.drafter else []

    def expected(self) -> float:
        """How many of `draft` will be right."""
        return self.drafter.expected(self._room) if self.drafter else 0.0

    @property
    def _room(self) -> int:
        return max(self._longest - len(self.tokens) - 1, 0)

    def take(self, logits: np.ndarray) -> Token:
        """Choose the next token from ``logits [V]``.

        Raises:
            IaptError: the logits hold NaN, or no token is left.
        """
        request, shaping = self.request, self.shaping
        changed = logits if shaping is None else shaping.apply(logits, self.tokens)
        token = choose(changed, request.sampling, self.random)
        self.tokens.append(token)
        if shaping is not None:
            shaping.took(token)
        before = self._text.length if self._text else 0
        text, reason = self._text_and_reason(token)
        step = len(self.tokens) - 1
        if request.logprobs is None:
            return Token(self.number, step, token, text, reason)
        scores = log_probabilities(logits, token, request.logprobs)
        offset = self._text.offset_of(token, before) if self._text else 0
        return Token(self.number, step, token, text, reason, *scores, text_offset=offset)

    def end(self, reason: str) -> Ended:
        """End it between two tokens, with the text that was held back."""
        return Ended(reason, self._text.rest(self.tokens)[0] if self._text else "")

    def _text_and_reason(self, token: int) -> tuple[str, str | None]:
        reason, may_stop = self._reason(token), len(self.tokens) >= self.request.min_tokens
        if self._text is None:
            return "", reason
        if reason == "eos" or (reason == "stop" and token in self.request.stop_token_ids):
            # what ends an answer is no part of it, also where its token is not a special one
            rest, stopped = self._text.rest(self.tokens[:-1], may_stop=may_stop)
            return rest, "stop" if stopped else reason
        added, stopped = self._text.add(self.tokens, may_stop=may_stop)
        if reason is not None and not stopped:
            rest, stopped = self._text.rest(self.tokens, may_stop=may_stop)
            added += rest
        return added, "stop" if stopped else reason

    def _reason(self, token: int) -> str | None:
        """Why the answer ends with this token, text aside."""
        if token in self.eos_token_ids and not self.request.ignore_eos:
            return "eos"
        if token in self.request.stop_token_ids:
            return "stop"
        if self.shaping is not None and self.shaping.is_complete:
            return "stop"
        return "length" if len(self.tokens) >= self._longest else None
