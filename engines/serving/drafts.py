"""Drafts by prompt lookup (Saxena 2023; Yang et al. 2023, arXiv 2304.04487): what followed the last tokens before.

An answer that copies from its instruction, or repeats itself, can be guessed: its last tokens are looked up in what is
there already, and what followed them is a draft of what comes. One step takes the drafts of all rows, and each token
is chosen as always from the logits behind the one before it, by the same random numbers; a row goes on for as long as
its choice is the drafted one. So an answer does not depend on drafts, only the number of steps does.

A step with drafts costs more than one without, how much depends on the machine, the type and the number of rows. Both
are timed, and drafts are taken only where the row's own record says that they will pay. Rows learn without cost: each
token that a step gives is held against the draft that was not taken.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

LENGTHS = (3, 2)
"""Tokens that are looked up together; the first that are found count."""
WEIGHT = 0.2
"""Of a new token in a row's record, and in the session's, with which new rows begin."""
FIRST_RATE = 0.3
"""Record before anything is known."""
LEAST_GAIN = 0.15
"""Tokens a row that a step with drafts must promise; it never costs less than so much more."""
MARGIN = 1.05
"""Tokens a second must grow by this factor."""
SAMPLES = 8
"""Steps whose times are kept, for each number of rows; the quickest of them counts."""
LEAST_SAMPLES = 3
"""Steps with drafts that are tried before their time counts; the first ones are slow."""
PATIENCE = 200
"""Steps after which drafts that did not pay are timed anew."""


class Drafter:
    """One row's tokens, what followed which of them, and how often that was right."""

    def __init__(self, instruction: Iterable[int], most: int) -> None:
        """Start before the first token of the answer.

        Args:
            instruction: its token ids.
            most: tokens of a draft, at most.
        """
        self.most = most
        self.rates = dict.fromkeys(LENGTHS, FIRST_RATE)
        """Length of what was looked up to how often the next token was right, the latest counting most."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Tokens to the place of what followed them last."""
        self._draft: list[int] = []
        self._length = 0
        """Of the tokens by which the draft was found."""
        self._is_new = True
        for token in instruction:
            self._append(token)

    def propose(self) -> list[int]:
        """What may come next, at most ``most`` tokens; empty where nothing like the last tokens was there before."""
        if self._is_new:
            self._is_new = False
            self._draft, self._length = self._found()
        return self._draft

    def expected(self, limit: int) -> float:
        """How many of the first ``limit`` tokens of the draft will be right, by the row's record."""
        draft = self.propose()
        rate = self.rates.get(self._length, 0.0)
        return sum(rate**place for place in range(1, min(len(draft), limit) + 1))

    def add(self, token: int) -> tuple[int, bool] | None:
        """Take the next token of the answer.

        Returns:
            The length of what was looked up, and whether its draft was right; None where there was no draft.
        """
        draft = self.propose()
        self._append(token)
        self._is_new = True
        if not draft:
            return None
        right, length = draft[0] == token, self._length
        self.rates[length] += WEIGHT * (right - self.rates[length])
        return length, right

    def _append(self, token: int) -> None:
        place = len(self._tokens)
        for length in LENGTHS:
            if place >= length:
                self._after[tuple(self._tokens[place - length :])] = place
        self._tokens.append(token)

    def _found(self) -> tuple[list[int], int]:
        for length in LENGTHS:
            place = self._after.get(tuple(self._tokens[-length:])) if len(self._tokens) >= length else None
            if place is not None:
                draft = self._tokens[place : place + self.most]
                while len(draft) < self.most:  # what is found reaches the end, so it repeats itself from there
                    draft.append(draft[len(draft) - (len(self._tokens) - place)])
                return draft, length
        return [], 0


class Drafting:
    """When a session's steps take drafts, and what came of it."""

    def __init__(self) -> None:
        self.drafted = 0
        """Tokens that steps have verified."""
        self.accepted = 0
        """Those of them that were right."""
        self.rates = dict.fromkeys(LENGTHS, FIRST_RATE)
        self._seconds: dict[tuple[int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=SAMPLES))
        """Rows and whether drafts were taken to the times of the last steps."""
        self._refused: dict[int, int] = defaultdict(int)

    def start(self, drafter: Drafter) -> None:
        """A row joins: its record begins with what others' drafts were worth."""
        drafter.rates = dict(self.rates)

    def learn(self, outcome: tuple[int, bool] | None) -> None:
        """What `Drafter.add` said."""
        if outcome is not None:
            length, right = outcome
            self.rates[length] += WEIGHT / 4 * (right - self.rates[length])  # of all rows, so that each counts less

    def pays(self, expected: Sequence[float]) -> bool:
        """Whether a step with drafts will give more tokens a second than one without.

        Args:
            expected: how many tokens of each row's draft will be right.
        """
        rows, right = len(expected), sum(expected)
        single, several = self._seconds[rows, False], self._seconds[rows, True]
        if not single or right < LEAST_GAIN * rows:
            return False
        if len(several) < LEAST_SAMPLES:
            return True
        if (1 + right / rows) * min(single) > MARGIN * min(several):
            return True
        self._refused[rows] += 1
        if self._refused[rows] >= PATIENCE:
            self._refused[rows] = 0
            several.clear()
        return False

    def took(self, rows: int, seconds: float, *, drafts: bool) -> None:
        """A step of so many rows took so long."""
        self._seconds[rows, drafts].append(seconds)
