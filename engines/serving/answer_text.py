"""The text of an answer as it grows: whole characters, up to a stop text, at a cost that its length does not raise."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engines.serving.stop_texts import StopTexts
from engines.serving.text import TextCodec

_log = logging.getLogger(__name__)


class AnswerText:
    """What was said, and what of it waits because a stop text may begin with it."""

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self._codec = codec
        self._stream = codec.stream()
        self._stops = StopTexts(stop) if stop else None
        self._said: list[str] = []
        self._length = 0
        self._held = ""
        """The end of what was said that was not handed out."""
        self._out = 0
        """Characters that were handed out."""

    @property
    def length(self) -> int:
        """Characters that were said, those that were not handed out included."""
        return self._length

    def offset_of(self, token: int, before: int) -> int:
        """Where the last token's own text begins, given the length before it; text that waited for it stands before."""
        return max(before, self._length - len(self._codec.decode([token])))

    def add(self, tokens: Sequence[int], *, may_stop: bool) -> tuple[str, bool]:
        """Take in the last token.

        Args:
            tokens: all of the answer's, the last one included.
            may_stop: whether a stop text counts already.

        Returns:
            What to hand out, and whether a stop text was found, which is left out.
        """
        added = self._stream.add(tokens)
        if not added:
            return "", False
        self._said.append(added)
        self._length += len(added)
        if self._stops is None:
            self._out += len(added)
            return added, False
        return self._up_to_stop(added, self._stops, may_stop, held=True)

    def rest(self, tokens: Sequence[int], *, may_stop: bool = True) -> tuple[str, bool]:
        """What was not handed out when an answer of these tokens ends, and whether a stop text is in it.

        The whole is decoded once more, so that also what waited for a character's other half is shown as it is.
        """
        said, whole = "".join(self._said), self._codec.decode(list(tokens))
        if not whole.startswith(said):
            _log.warning("the tokenizer decodes an answer to another text in one piece than token by token")
            whole = said
        added = whole[len(said) :]
        if self._stops is None:
            return added, False
        return self._up_to_stop(added, self._stops, may_stop, held=False)

    def _up_to_stop(self, added: str, stops: StopTexts, may_stop: bool, *, held: bool) -> tuple[str, bool]:
        cut = stops.find(added)
        self._held += added
        found = cut is not None and may_stop
        if cut is not None and may_stop:
            size = max(cut - self._out, 0)
        else:
            size = len(self._held) - (stops.held if held else 0)
        text, self._held = self._held[:size], self._held[max(size, 0) :]
        self._out += len(text)
        return text, found
