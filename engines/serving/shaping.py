"""What changes a row's logits before a token is chosen: penalties, bias, forbidden tokens, a hook, a grammar.

Rows that ask for none of it have no `Shaping`, and pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from engines.serving.grammar import Matcher
from engines.serving.sampling import DIVISORS, Sampling
from iapt_export.contract.errors import IaptError

LogitsHook = Callable[[Sequence[int], np.ndarray], np.ndarray]
"""The answer's tokens so far and logits ``[V]`` fp32, which it may write, to logits ``[V]``. The session's thread calls
it between two steps of all rows, so it should take microseconds."""


class Shaping:
    """The changes that one request asks for; in this order: penalties, bias, hook, tokens before which it may not end,
    grammar.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        ends: Collection[int] = (),
        min_tokens: int = 0,
        hook: LogitsHook | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        """Start before the first token.

        Args:
            sampling: penalties and bias.
            prompt: the instruction's token ids, which the repetition penalty sees.
            ends: ids of tokens that end the answer.
            min_tokens: how many must be chosen before one of them may be.
            hook: see `LogitsHook`.
            matcher: what its answer must match.
        """
        self._sampling = sampling
        self._prompt = np.unique(np.array(prompt, dtype=np.int64))
        self._places: dict[int, int] = {}
        """Token of the answer to its place in the next two."""
        self._tokens, self._counts = np.zeros(16, np.int64), np.zeros(16, np.float32)
        self._bias = (
            np.fromiter(sampling.logit_bias.keys(), np.int64),
            np.fromiter(sampling.logit_bias.values(), np.float32),
        )
        self._ends = np.array(sorted(ends), dtype=np.int64)
        self._min_tokens = min_tokens
        self._hook = hook
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches its grammar and nothing can follow."""
        return self._matcher is not None and self._matcher.is_complete

    def apply(self, logits: np.ndarray, answer: Sequence[int]) -> np.ndarray:
        """Changed logits ``[V]`` fp32 for the token that follows ``answer``.

        Raises:
            IaptError: the hook gives something else, or no token is left.
        """
        changed = logits.astype(np.float32)
        self._penalise(changed)
        places, biases = self._bias
        changed[places] += biases
        if self._hook is not None:
            changed = np.asarray(self._hook(answer, changed))
            if changed.shape != logits.shape or changed.dtype != np.float32:
                found = f"{changed.dtype} {list(changed.shape)}"
                raise IaptError(f"its hook on logits gave {found}; expected float32 {list(logits.shape)}")
            changed = changed.copy()  # the hook's own array, which it may give again
        if len(answer) < self._min_tokens:
            changed[self._ends] = -np.inf
        if self._matcher is not None:
            self._matcher.forbid(changed)
        if not (changed > -np.inf).any():
            raise IaptError("no token is left to choose: everything was ruled out")
        return changed

    def took(self, token: int) -> None:
        """A token was chosen."""
        if self._matcher is not None:
            self._matcher.took(token)
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def _penalise(self, logits: np.ndarray) -> None:
        used = len(self._places)
        tokens, counts = self._tokens[:used], self._counts[:used]
        penalty = min(max(self._sampling.repetition_penalty, DIVISORS[0]), DIVISORS[1])
        if penalty != 1:
            seen = np.union1d(self._prompt, tokens)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        logits[tokens] -= self._sampling.presence_penalty + self._sampling.frequency_penalty * counts
