"""Into the queue: at once while it has room, else in line, threads and event loops in the order in which they came."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engines.serving.entry import Entry
from engines.serving.generation import Generation
from engines.serving.scheduler import Scheduler
from engines.serving.tenants import Tenant, TenantBank
from iapt_export.contract.errors import QueueFullError


@dataclass(eq=False)
class Turn:
    """Somebody who waits until a request may enter the queue."""

    entry: Entry
    generation: Generation
    wake: Callable[[], None]
    """Called from any thread when the request has entered, or never will."""
    has_entered: bool = False


@dataclass
class Place:
    """What a request holds before it is in the queue."""

    tenant: Tenant
    turn: Turn | None = None


def thread_turn(entry: Entry, generation: Generation) -> tuple[Turn, threading.Event]:
    """A turn of a thread, and what it waits for."""
    event = threading.Event()
    return Turn(entry, generation, event.set), event


def loop_turn(entry: Entry, generation: Generation) -> tuple[Turn, asyncio.Future[None]]:
    """A turn of a task of the running event loop, and what it awaits."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def done() -> None:
        if not future.done():
            future.set_result(None)

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # of a closed loop, whose client is gone
            loop.call_soon_threadsafe(done)

    return Turn(entry, generation, wake), future


def patience(entry: Entry, timeout: float | None) -> float | None:
    """Seconds to wait in line at most: ``timeout``, or what is left until the request's deadline; None for no end."""
    left = entry.deadline - time.monotonic()
    if left == math.inf:
        return timeout
    return max(0.0, left if timeout is None else min(left, timeout))


class Inbox:
    """What has entered since the last step, and the line of those that wait to enter."""

    def __init__(self, lock: threading.Condition, bank: TenantBank, scheduler: Scheduler, max_waiting: int) -> None:
        """Start empty.

        Args:
            lock: held by callers of all methods but `place`; it guards what stands here.
            bank: whose tenants are acquired and released.
            scheduler: whose queue is entered.
            max_waiting: see `engines.serving.session.Session.open`.
        """
        self.lock = lock
        self.scheduler = scheduler
        self.max_waiting = max_waiting
        self.arrived: list[Entry] = []
        self.line: deque[Turn] = deque()
        self.generations: dict[Entry, Generation] = {}
        """Of all requests that entered and are not finished."""
        self._bank = bank

    @property
    def is_busy(self) -> bool:
        """Whether a request is not finished."""
        return bool(self.generations or self.line)

    @contextlib.contextmanager
    def place(self, tenant: str, check: Callable[[], None]) -> Iterator[Place]:
        """A place for a request's tenant and turn; both are let go if something is raised within.

        Args:
            tenant: its name.
            check: raises where no request is taken.
        """
        with self.lock:
            check()
            place = Place(self._bank.acquire(tenant))
        try:
            yield place
        except BaseException:
            with self.lock:
                turn = place.turn
                if turn is not None and turn in self.line:
                    self.line.remove(turn)
                if turn is None or not turn.has_entered:
                    self._bank.release(place.tenant)
                else:  # whoever waited in line was cancelled when its turn came
                    turn.entry.cancelled = True
                    self.lock.notify_all()
            raise

    def let_in(self) -> None:
        """Let those in line enter for whom there is room, in the order in which they came."""
        # counted once: the session's thread frees rows meanwhile, and who came later must not find what others did not;
        # what a free row takes with the next step does not wait for one
        room = self.max_waiting + self.scheduler.free_rows - len(self.arrived) - len(self.scheduler.waiting)
        kept: set[str] = set()
        for turn in [turn for turn in self.line if not turn.has_entered]:
            tenant = turn.entry.tenant.name
            if tenant in kept or not self._has_room(tenant, room):
                kept.add(tenant)
            else:
                room -= 1
                self.line.remove(turn)
                turn.has_entered = True
                self.generations[turn.entry] = turn.generation
                self.arrived.append(turn.entry)
                self.lock.notify_all()
                turn.wake()

    def end_wait(self, turn: Turn) -> None:
        """What comes of having waited in line: a request whose deadline has passed there ends as it does in the queue.

        Raises:
            QueueFullError: its turn has not come.
        """
        if not turn.has_entered and turn.entry.deadline <= time.monotonic():
            self.line.remove(turn)
            self._bank.release(turn.entry.tenant)
            turn.entry.times.finished = time.monotonic()
            turn.generation.give(turn.entry.end("deadline"))
        elif not turn.has_entered:
            raise QueueFullError(
                f"{self.max_waiting} requests are waiting already; try again later, or open the session with a larger "
                "max_waiting",
                code="queue_full",
            )

    def fail(self, failure: Exception) -> None:
        """End everything."""
        for entry, generation in self.generations.items():
            self._bank.release(entry.tenant)
            generation.give(failure)
        for turn in self.line:
            turn.wake()
        for emptied in (self.generations, self.arrived, self.line):
            emptied.clear()

    def _has_room(self, tenant: str, room: int) -> bool:
        queue = self.scheduler.waiting
        own = sum(entry.tenant.name == tenant for entry in self.arrived)
        own += len(queue.accounts[tenant].waiting) if tenant in queue.accounts else 0
        limit = queue.share_of(tenant).max_waiting
        if limit is not None and own >= limit:
            return False
        return own == 0 or room > 0
