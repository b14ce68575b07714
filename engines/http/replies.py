"""Answers on their way out: as one JSON object, or as server-sent events. No header is sent before the first token.

What fails earlier is a status, which clients try again. A client that leaves, or that stops reading, frees its rows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from engines.http.refusals import refusal_of
from engines.http.telemetry import Telemetry
from engines.serving.generation import Generation, in_batches
from engines.serving.request import Token
from iapt_export.contract.errors import IaptError

STALLED_SECONDS = 60.0
"""A client that takes nothing for so long is taken to be gone."""
REASONS = {"eos": "stop"}
"""Our word for why an answer ended to the protocol's, where they differ."""
EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_log = logging.getLogger(__name__)


class Form(ABC):
    """How one endpoint writes answers."""

    @abstractmethod
    def begin(self, choice: int) -> str:
        """The first event of an answer; empty for none."""

    @abstractmethod
    def chunk(self, choice: int, tokens: Sequence[Token], rest: str, reason: str | None) -> str:
        """An event with tokens, and text beside them; or with the reason why the answer ended."""

    @abstractmethod
    def usage(self, counted: dict[str, int]) -> str:
        """The event that counts tokens."""

    @abstractmethod
    def whole(self, tokens: Sequence[Sequence[Token]], texts: Sequence[str], reasons: Sequence[str]) -> dict[str, Any]:
        """All answers as one object, without the usage."""


class Reply(Response):
    """The answers to one call."""

    def __init__(
        self,
        generations: Sequence[Generation],
        form: Form,
        telemetry: Telemetry,
        model: str,
        *,
        stream: bool,
        usage: bool,
        n: int = 1,
    ) -> None:
        """Take over the generations; they are cancelled when the client leaves.

        Args:
            generations: one for each answer.
            form: how they are written.
            telemetry: what counts them.
            model: the tenant's name.
            stream: write events as tokens come.
            usage: end the stream with the number of tokens.
            n: how many answers in a row are to the same prompt, which is counted once.
        """
        super().__init__()
        self._generations = generations
        self._form = form
        self._telemetry = telemetry
        self._model = model
        self._stream = stream
        self._usage = usage
        self._n = n
        self._sending_since: float | None = None
        self._is_left = False
        self._gaps: list[list[float]] = [[] for _ in generations]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and let go of the rows when the client leaves."""
        watching = asyncio.create_task(self._watch(receive))
        try:
            await (self._events if self._stream else self._object)(scope, receive, send)
        finally:
            watching.cancel()
            for generation, gaps in zip(self._generations, self._gaps, strict=True):
                generation.cancel()
                self._telemetry.finished(self._model, generation, gaps)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for generation in self._generations:
            generation.cancel()

    async def _object(self, scope: Scope, receive: Receive, send: Send) -> None:
        tokens: list[list[Token]] = [[] for _ in self._generations]
        try:
            async for batch in self._batches():
                for choice, added in batch:
                    tokens[choice] += added
            answers = [generation.partial for generation in self._generations]
            reasons = [REASONS.get(answer.finish_reason, answer.finish_reason) for answer in answers]
            body = self._form.whole(tokens, [answer.text for answer in answers], reasons)
            response: Response = JSONResponse(body | {"usage": self._counted()})
        except Exception as error:
            response = _refused(error)
        await response(scope, receive, send)

    async def _events(self, scope: Scope, receive: Receive, send: Send) -> None:
        form, begun, sent = self._form, False, [0] * len(self._generations)

        async def write(text: str, *, more: bool = True) -> None:
            self._sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
            self._sending_since = None

        guarding = asyncio.create_task(self._guard(asyncio.current_task()))
        try:
            async for batch in self._batches():
                text = "" if begun else "".join(map(form.begin, range(len(self._generations))))
                for choice, tokens in batch:
                    generation = self._generations[choice]
                    text += form.chunk(choice, tokens, "", None)
                    sent[choice] += sum(len(token.text) for token in tokens)
                    if generation.done:
                        answer = generation.partial
                        reason = REASONS.get(answer.finish_reason, answer.finish_reason)
                        text += form.chunk(choice, [], answer.text[sent[choice] :], reason)
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                    begun = True
                if text:
                    await write(text)
            end = form.usage(self._counted()) if self._usage else ""
            await write(end + "data: [DONE]\n\n", more=False)
        except Exception as error:
            if not begun:
                await _refused(error)(scope, receive, send)
            else:
                await write(f"event: error\ndata: {json.dumps(refusal_of(error).body())}\n\n", more=False)
                _report(error)
        except asyncio.CancelledError:
            if not self._is_left:  # or uvicorn would log it as a defect
                raise
        finally:
            guarding.cancel()

    async def _guard(self, task: asyncio.Task[Any] | None) -> None:
        """End a stream whose client takes nothing; one timer for a stream costs less than one for an event."""
        while self._sending_since is None or time.monotonic() - self._sending_since < STALLED_SECONDS:
            await asyncio.sleep(STALLED_SECONDS / 4)
        _log.warning("a client of %s took nothing for %.0f s and was left", self._model, STALLED_SECONDS)
        if task is not None:
            self._is_left = True
            task.cancel()

    async def _batches(self) -> AsyncIterator[list[tuple[int, list[Token]]]]:
        """What comes, with the time between tokens noted."""
        last = [0.0] * len(self._generations)
        async for batch in in_batches(self._generations):
            now = time.monotonic()
            for choice, tokens in batch:
                if tokens and last[choice]:
                    self._gaps[choice] += [(now - last[choice]) / len(tokens)] * len(tokens)
                if tokens:
                    last[choice] = now
            yield batch

    def _counted(self) -> dict[str, int]:
        prompt = sum(generation.num_prompt_tokens for generation in self._generations[:: self._n])
        answer = sum(len(generation.partial.tokens) for generation in self._generations)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _refused(error: Exception) -> JSONResponse:
    _report(error)
    return refusal_of(error).response()


def _report(error: Exception) -> None:
    if not isinstance(error, IaptError):
        _log.error("a request failed by a defect", exc_info=error)
