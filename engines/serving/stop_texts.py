"""Find stop texts in an answer as it grows, with work per character that neither their number nor their length raises.

Aho and Corasick 1975 (https://doi.org/10.1145/360825.360855): one state says how much of which stop text the answer
ends with, so a character is looked at once and nothing is searched again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from iapt_export.contract.errors import IaptError, shown

if TYPE_CHECKING:
    from engines.serving.request import Request

MAX_STOP_CHARACTERS = 32_768
"""Of all stop texts of a request together: its automaton takes some hundred bytes for each."""
MAX_STOP_IDS = 64
"""Each token of a row is compared with all of them, while the other rows wait."""


def check_stops(where: str, request: Request) -> None:
    """Refuse stop texts and stop token ids that are none, or too many; every door of a session comes through here.

    Raises:
        IaptError: what was expected, and what came; ``field`` says of which.
    """

    def refuse(name: str, text: str) -> None:
        raise IaptError(f"{where}: {text}", field=name)

    for name in ("stop", "stop_token_ids"):
        if not isinstance(value := getattr(request, name), Sequence | np.ndarray):
            refuse(name, f"{name} is {type(value).__name__}, expected a tuple")
    if isinstance(request.stop, str) or not all(isinstance(stop, str) for stop in request.stop):
        refuse("stop", f"stop is {shown(request.stop)}, expected texts in a tuple, such as ('END',)")
    if "" in request.stop:
        refuse("stop", "a stop text is empty; leave it out")
    if (size := sum(map(len, request.stop))) > MAX_STOP_CHARACTERS:
        refuse("stop", f"its stop texts have {size} characters; expected at most {MAX_STOP_CHARACTERS} together")
    if (count := len(request.stop_token_ids)) > MAX_STOP_IDS:
        refuse("stop_token_ids", f"{count} stop token ids are given, expected at most {MAX_STOP_IDS}")


class Automaton:
    """What of some texts an answer ends with, a state for each beginning; read-only once it is built."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Build it; time and memory follow the number of characters.

        Args:
            texts: not empty, each of a character or more.
        """
        self._next: dict[tuple[int, str], int] = {}
        self._shorter = [0]
        """State to that of the longest proper end of it which begins a text, too."""
        self.depth = [0]
        """State to how many characters it stands for."""
        self.found = [0]
        """State to the length of the longest text that it ends with; 0 for none."""
        for text in texts:
            self._add(text)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state behind one more character; 0 is the first."""
        while (following := self._next.get((state, character))) is None and state:
            state = self._shorter[state]
        return following or 0

    def _add(self, text: str) -> None:
        state = 0
        for character in text:
            following = self._next.get((state, character))
            if following is None:
                following = self._next[state, character] = len(self.depth)
                self._shorter.append(0)
                self.depth.append(self.depth[state] + 1)
                self.found.append(0)
            state = following
        self.found[state] = self.depth[state]

    def _link(self) -> None:
        """Find each state's shorter one, the near ones first."""
        children: dict[int, list[tuple[str, int]]] = {}
        for (state, character), following in self._next.items():
            children.setdefault(state, []).append((character, following))
        waiting = deque([0])
        while waiting:
            state = waiting.popleft()
            for character, following in children.get(state, ()):
                shorter = self.step(self._shorter[state], character) if state else 0
                self._shorter[following] = shorter
                self.found[following] = max(self.found[following], self.found[shorter])
                waiting.append(following)


_automata: weakref.WeakValueDictionary[tuple[str, ...], Automaton] = weakref.WeakValueDictionary()
"""Those of answers under way: the answers of one request, and of requests with equal stop texts, share theirs."""


class StopTexts:
    """Where an answer that comes in pieces holds one of some texts first."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Begin an answer.

        Args:
            texts: not empty, each of a character or more.
        """
        key = tuple(texts)
        self._automaton = _automata.get(key) or _automata.setdefault(key, Automaton(key))
        self._state = self._seen = 0

    @property
    def held(self) -> int:
        """Characters at the end of the answer that a stop text may begin with."""
        return self._automaton.depth[self._state]

    def find(self, added: str) -> int | None:
        """Look at the next piece of the answer.

        Returns:
            Where in the whole answer the first of the stop texts begins that end within this piece.
        """
        first = None
        for character in added:
            self._state = self._automaton.step(self._state, character)
            self._seen += 1
            if length := self._automaton.found[self._state]:
                begin = self._seen - length
                first = begin if first is None else min(first, begin)
        return first
