"""Answers as the two endpoints write them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from engines.http.replies import Form
from engines.serving.request import Token
from engines.serving.text import TextCodec

_json = json.JSONEncoder(ensure_ascii=False).encode  # made once: `json.dumps` makes one for each call
LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a probability of nothing; JSON has no infinity."""


class _Written(Form):
    """What both have: an id, a time, a model, events."""

    kind: str
    chunk_kind: str

    def __init__(self, codec: TextCodec, model: str, prefix: str, *, logprobs: bool) -> None:
        self._codec = codec
        self._logprobs = logprobs
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._start = json.dumps(self._head | {"object": self.chunk_kind})[:-1] + ', "choices": [{"index": '

    def usage(self, counted: dict[str, int]) -> str:
        """See `Form`."""
        return f"data: {json.dumps(self._head | {'object': self.chunk_kind, 'choices': [], 'usage': counted})}\n\n"

    def event(self, choice: int, content: str, logprobs: Any, reason: str | None) -> str:
        """An event; ``content`` is JSON, a key with its value."""
        end = f'"logprobs": {_json(logprobs)}, "finish_reason": {_json(reason)}}}]}}'
        return f"data: {self._start}{choice}, {content}, {end}\n\n"

    def text_of(self, token: int) -> str:
        """One token's text."""
        return self._codec.decode([token], special=True)


class ChatForm(_Written):
    """``/v1/chat/completions``."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def begin(self, choice: int) -> str:
        """See `Form`."""
        return self.event(choice, '"delta": {"role": "assistant", "content": ""}', None, None)

    def chunk(self, choice: int, tokens: Sequence[Token], rest: str, reason: str | None) -> str:
        """See `Form`."""
        text = "".join(token.text for token in tokens) + rest
        if not text and reason is None and not (tokens and self._logprobs):
            return ""
        delta = f'"delta": {{"content": {_json(text)}}}' if text or tokens else '"delta": {}'
        return self.event(choice, delta, self._scores(tokens), reason)

    def whole(self, tokens: Sequence[Sequence[Token]], texts: Sequence[str], reasons: Sequence[str]) -> dict[str, Any]:
        """See `Form`."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._scores(of),
                "finish_reason": reason,
            }
            for index, (of, text, reason) in enumerate(zip(tokens, texts, reasons, strict=True))
        ]
        return self._head | {"object": self.kind, "choices": choices}

    def _scores(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs or not tokens:
            return None
        content = [
            self._score(token.token, token.logprob or 0.0)
            | {"top_logprobs": [self._score(*each) for each in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _score(self, token: int, logprob: float) -> dict[str, Any]:
        known = self._codec.bytes_of(token)
        return {
            "token": self.text_of(token),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": None if known is None else list(known),
        }


class CompletionForm(_Written):
    """``/v1/completions``."""

    kind = chunk_kind = "text_completion"

    def begin(self, choice: int) -> str:
        """See `Form`."""
        return ""

    def chunk(self, choice: int, tokens: Sequence[Token], rest: str, reason: str | None) -> str:
        """See `Form`."""
        text = "".join(token.text for token in tokens) + rest
        if not text and reason is None and not (tokens and self._logprobs):
            return ""
        return self.event(choice, f'"text": {_json(text)}', self._scores(tokens), reason)

    def whole(self, tokens: Sequence[Sequence[Token]], texts: Sequence[str], reasons: Sequence[str]) -> dict[str, Any]:
        """See `Form`."""
        choices = [
            {"index": index, "text": text, "logprobs": self._scores(of), "finish_reason": reason}
            for index, (of, text, reason) in enumerate(zip(tokens, texts, reasons, strict=True))
        ]
        return self._head | {"object": self.kind, "choices": choices}

    def _scores(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs or not tokens:
            return None
        return {
            "tokens": [self.text_of(token.token) for token in tokens],
            "token_logprobs": [max(token.logprob or 0.0, LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [token.text_offset for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """The likeliest and the chosen one, by text, which of several the likelier has: half characters read alike."""
        found: dict[str, float] = {}
        for each, value in dict([*token.top_logprobs, (token.token, token.logprob or 0.0)]).items():
            text = self.text_of(each)
            found[f"token_id:{each}" if text in found else text] = max(value, LEAST_LOGPROB)
        return found
