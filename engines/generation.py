"""A request under way, as its client sees it: tokens to iterate or to await, a result, a way to cancel."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType

from engines.request import Answer, Token
from engines.scheduler import Entry

Item = Token | Exception | None
"""A token, an error, or None where the request was cancelled."""


class Generation:
    """The tokens of one request as they come.

    Leaving its with block, closing its iterator, or cancelling the task that awaits it frees the request's row.
    """

    def __init__(self, entry: Entry, wake: Callable[[], None]) -> None:
        self._entry = entry
        self._wake = wake
        self._lock = threading.Lock()
        """Guards the sink and what came before there was one."""
        self._early: list[Item] = []
        self._sink: Callable[[Item], None] = self._early.append
        self._tokens: list[Token] = []
        self._done = False
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Token]:
        """Tokens as they come.

        Raises:
            IaptError: the session was closed or has failed.
        """
        return in_order_of_arrival([self])

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Tokens as they come, for an event loop; raises like `__iter__`."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Item]()
        self._redirect(lambda item: _call_soon(loop, queue, item))
        try:
            while not self._done:
                if token := self._take(await queue.get()):
                    yield token
        finally:
            self.cancel()

    def result(self) -> Answer:
        """Wait for the end: the whole answer, with what was iterated before."""
        for _ in self:
            pass
        return self._answer()

    async def wait(self) -> Answer:
        """`result` for an event loop."""
        async for _ in self:
            pass
        return self._answer()

    def cancel(self) -> None:
        """Free the request's row; nothing happens to a finished one."""
        if not self._done:
            self._entry.cancelled = True
            self._wake()

    def give(self, item: Item) -> None:
        """Called by the session with each token, None for a cancelled request that was dropped, or its failure."""
        with self._lock:
            self._sink(item)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _redirect(self, sink: Callable[[Item], None]) -> None:
        """Send what came so far, and what comes, to another place."""
        with self._lock:
            for item in self._early:
                sink(item)
            self._early.clear()
            self._sink = sink

    def _take(self, item: Item) -> Token | None:
        if isinstance(item, Exception):
            self._done, self._error = True, item
            raise item
        if item is None:
            self._done = True
            return None
        self._tokens.append(item)
        self._done = item.finish_reason is not None
        return item

    def _answer(self) -> Answer:
        if self._error is not None:
            raise self._error
        reason = self._tokens[-1].finish_reason if self._tokens else None
        text = "".join(token.text for token in self._tokens)
        return Answer(self._entry.number, [token.token for token in self._tokens], text, reason or "cancelled")


def in_order_of_arrival(generations: Sequence[Generation]) -> Iterator[Token]:
    """The tokens of several requests as they come, until all are finished; closing the iterator cancels the rest.

    Raises:
        IaptError: the session was closed or has failed.
    """
    queue: SimpleQueue[tuple[Generation, Item]] = SimpleQueue()
    left = 0
    for generation in generations:
        if not generation._done:
            left += 1
            generation._redirect(functools.partial(_put, queue, generation))
    try:
        while left:
            generation, item = queue.get()
            token = generation._take(item)
            left -= generation._done
            if token is not None:
                yield token
    finally:
        for generation in generations:
            generation.cancel()


def _put(queue: SimpleQueue[tuple[Generation, Item]], generation: Generation, item: Item) -> None:
    queue.put((generation, item))


def _call_soon(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Item], item: Item) -> None:
    if not loop.is_closed():  # a client that is gone has no use for the item
        loop.call_soon_threadsafe(queue.put_nowait, item)
