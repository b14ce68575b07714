"""A request under way, as its client sees it: tokens to iterate or to await, a result, a way to cancel."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import ClassVar, Literal, get_args

from engines.serving.entry import Entry, Times
from engines.serving.own_process import check_process
from engines.serving.request import Answer, Ended, Item, Request, Token
from iapt_export.contract.errors import IaptError

AtError = Literal["last", "first", "never"]
"""When the failure of one request of several is raised: behind the answers of the others, at once, or not at all."""


class Bell:
    """Wakes the readers of one event loop: however many tokens come between two turns of the loop, it is told once."""

    _bells: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell]] = weakref.WeakKeyDictionary()
    _making: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._ringing: deque[asyncio.Event] = deque()
        self._lock = threading.Lock()
        self._told = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Bell:
        """The loop's own."""
        with cls._making:
            return cls._bells.setdefault(loop, cls(loop))

    def ring(self, event: asyncio.Event) -> None:
        """Set an event of the loop, from any thread."""
        self._ringing.append(event)
        with self._lock:
            told, self._told = self._told, True
        if not told and (loop := self._loop()) is not None:
            try:
                loop.call_soon_threadsafe(self._set)
            except RuntimeError:  # of a closed loop, whose clients are gone
                self._told = False

    def _set(self) -> None:
        with self._lock:
            self._told = False
        while self._ringing:
            self._ringing.popleft().set()


class Generation:
    """The tokens of one request as they come.

    Leaving its with block, closing its iterator, or cancelling the task that awaits it frees the request's row. What
    one reader leaves, the next one finds.
    """

    def __init__(self, entry: Entry, wake: Callable[[], None]) -> None:
        self._entry = entry
        self._wake = wake
        self._items: SimpleQueue[Item] = SimpleQueue()
        """What came and was not read; behind the last token there is always something that ends a reader."""
        self._lock = threading.RLock()
        """Guards the listeners, and that each hears of every item; a listener may listen and forget itself."""
        self._listeners: list[Callable[[], None]] = []
        self._tokens: list[Token] = []
        self._ended: Ended | None = None
        self.done = False
        """Whether everything has been read."""
        self._error: Exception | None = None
        self._process = os.getpid()

    def __iter__(self) -> Iterator[Token]:
        """Tokens as they come.

        Raises:
            IaptError: the request failed, or the session was closed or has failed.
        """
        return in_order_of_arrival([self], 1)

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Tokens as they come, for an event loop; raises like `__iter__`."""
        arrived = asyncio.Event()
        tell = functools.partial(Bell.of(asyncio.get_running_loop()).ring, arrived)
        self.listen(tell)
        try:
            while not self.done:
                if token := self.take():
                    yield token
                elif not self.done:
                    await arrived.wait()
                    arrived.clear()
        finally:
            self.forget(tell)
            self.cancel()

    def result(self) -> Answer:
        """Wait for the end: the whole answer, with what was iterated before."""
        for _ in self:
            pass
        return self._answer()

    @property
    def partial(self) -> Answer:
        """What has been read so far, also after a failure, whose reason is then ``error``."""
        reason = self._tokens[-1].finish_reason if self._tokens else None
        reason = "error" if self._error is not None else self._ended.finish_reason if self._ended else reason
        text = "".join(token.text for token in self._tokens) + (self._ended.text if self._ended else "")
        return Answer(self._entry.number, [token.token for token in self._tokens], text, reason or "", self._error)

    @property
    def times(self) -> Times:
        """When the request came, got a row, its first token, its end."""
        return self._entry.times

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of its instruction."""
        return len(self._entry.instruction)

    async def wait(self) -> Answer:
        """`result` for an event loop."""
        async for _ in self:
            pass
        return self._answer()

    def cancel(self) -> None:
        """Free the request's row; nothing happens to a finished one."""
        if not self.done:
            self._entry.cancelled = True
            self._wake()

    def give(self, item: Item) -> None:
        """Called by the session with each token, an end between two, or the request's failure."""
        with self._lock:
            self._items.put(item)
            for tell in list(self._listeners):
                try:
                    tell()
                except BaseException as error:  # the client's own code: its request ends, and no other
                    self.forget(tell)
                    self._entry.cancelled = True
                    failure = IaptError(f"request {self._entry.number}: what listens to it failed: {error!r}")
                    failure.__cause__ = error
                    if isinstance(item, Token) and item.finish_reason is None:
                        self._items.put(failure)

    def listen(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` for each item that waits to be read, and for each that comes; it must not block.

        What it raises while tokens come ends this request with an `IaptError`, and no other.
        """
        check_process(self._process)
        with self._lock:
            self._listeners.append(tell)  # first, because it may forget itself
            try:
                for _ in range(self._items.qsize()):
                    if tell in self._listeners:
                        tell()
            except BaseException:
                self.forget(tell)
                raise

    def forget(self, tell: Callable[[], None]) -> None:
        """Call it no more."""
        with self._lock:
            if tell in self._listeners:
                self._listeners.remove(tell)

    def take(self) -> Token | None:
        """The next token if one waits to be read.

        Raises:
            IaptError: the request failed, or the session was closed or has failed.
        """
        try:
            item = self._items.get_nowait()
        except Empty:
            return None
        if isinstance(item, Token):
            self._tokens.append(item)
            self.done = item.finish_reason is not None
            if self.done:
                self._items.put(Ended(""))  # for the next reader
            return item
        if isinstance(item, Exception):
            self._error = item
        elif self._ended is None and not self.done:
            self._ended = item
        self.done = True
        self._items.put(item)
        if self._error is not None:
            raise self._error
        return None

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _answer(self) -> Answer:
        if self._error is not None:
            raise self._error
        return self.partial


def in_order_of_requests(
    requests: Iterable[Request], submit: Callable[[Request, int], Generation], window: int, raised: AtError
) -> Iterator[Answer]:
    """One answer for each request, in their order; closing the iterator cancels the rest.

    Args:
        requests: they are taken as there is room for them.
        submit: lets a request join, as `engines.serving.session.Session.submit`.
        window: how many are under way at once.
        raised: see `engines.serving.session.Session.generate`.

    Raises:
        IaptError: ``raised`` is no `AtError`; at once, where all else comes with the answers.
    """
    if raised not in get_args(AtError):
        raise IaptError(f"raised={raised!r} is not one of {', '.join(get_args(AtError))}")
    return _in_order(requests, submit, window, raised)


def _in_order(
    requests: Iterable[Request], submit: Callable[[Request, int], Generation], window: int, raised: AtError
) -> Iterator[Answer]:
    running: deque[Generation | Answer] = deque()
    failures: list[Exception] = []
    try:
        for number, request in enumerate(requests):
            if len(running) == window:
                yield _finished(running[0], raised, failures)
                running.popleft()
            try:
                running.append(submit(request, number))
            except IaptError as error:
                if raised == "first" or error.code in ("session_closed", "session_failed"):
                    raise
                running.append(Answer(number, [], "", "error", error))
        while running:
            yield _finished(running[0], raised, failures)
            running.popleft()
    finally:
        for generation in running:
            if isinstance(generation, Generation):
                generation.cancel()
    if failures and raised == "last":
        raise failures[0]


def _finished(item: Generation | Answer, raised: AtError, failures: list[Exception]) -> Answer:
    """What comes of a request; its failure is kept, or raised where that is asked for."""
    if isinstance(item, Generation):
        try:
            return item.result()
        except Exception as error:
            item = replace(item.partial, finish_reason="error", error=error)
    if item.error is not None:
        if raised == "first":
            raise item.error
        failures.append(item.error)
    return item


def in_order_of_arrival(generations: Iterable[Generation], window: int) -> Iterator[Token]:
    """The tokens of several requests as they come, until all are finished; closing the iterator cancels the rest.

    Args:
        generations: the requests, which may be submitted as they are taken from here.
        window: how many are taken before one is finished.

    Raises:
        IaptError: a request failed, or the session was closed or has failed.
    """
    arrived: SimpleQueue[Generation] = SimpleQueue()
    source = iter(generations)
    running: dict[Generation, Callable[[], None]] = {}
    try:
        while True:
            while len(running) < window and (generation := next(source, None)) is not None:
                running[generation] = functools.partial(arrived.put, generation)
                generation.listen(running[generation])
            if not running:
                return
            generation = arrived.get()
            token = generation.take()
            if generation.done and generation in running:
                generation.forget(running.pop(generation))
            if token is not None:
                yield token
    finally:
        for generation, tell in running.items():
            generation.forget(tell)
            generation.cancel()


async def in_batches(generations: Sequence[Generation]) -> AsyncIterator[list[tuple[int, list[Token]]]]:
    """What has arrived of several requests, for an event loop: the place of each that has news, and its new tokens.

    A request's last item has its end: a token with a reason, or no token where it ended between two. However fast the
    tokens come, the loop turns once for all that are there. Leaving it cancels what is not finished.

    Raises:
        IaptError: a request failed, or the session was closed or has failed.
    """
    arrived = asyncio.Event()
    tell = functools.partial(Bell.of(asyncio.get_running_loop()).ring, arrived)
    running = dict(enumerate(generations))
    for generation in generations:
        generation.listen(tell)
    try:
        while running:
            batch = []
            for place, generation in list(running.items()):
                tokens: list[Token] = []
                while not generation.done and (token := generation.take()) is not None:
                    tokens.append(token)
                if generation.done:
                    del running[place]
                if tokens or generation.done:
                    batch.append((place, tokens))
            if batch:
                yield batch
            if running:
                await arrived.wait()
                arrived.clear()
    finally:
        for generation in generations:
            generation.forget(tell)
            generation.cancel()
