"""Serve a bundle: requests of any tenants join and leave one batch, streamed token by token.

    with Session.open("BUNDLE") as session:
        for answer in session.generate([Request("movie-sentiment", "A fine film.")]):
            print(answer.text)

Reading an instruction brings in its tenant's weights; every later step is the plain backbone, whoever the tenants are,
unless a method treats generated tokens too (LoRA). One thread of the session runs the graphs; its methods may be called
from any thread, and a `Generation` may be awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Unpack

from engines.runner import Activated
from engines.serving.account import Share
from engines.serving.admission import Admission, check_are_requests, check_is_request, work_of
from engines.serving.entry import Entry
from engines.serving.generation import AtError, Generation, in_order_of_arrival, in_order_of_requests
from engines.serving.grammar import Grammar
from engines.serving.inbox import Inbox, Turn, loop_turn, patience, thread_turn
from engines.serving.loading import open_stepper
from engines.serving.opened_files import OpenedFiles
from engines.serving.own_process import OwnCondition
from engines.serving.request import Answer, Item, Request, Token
from engines.serving.sampling import Sampling
from engines.serving.scheduler import Scheduler
from engines.serving.state import SessionState, state_of
from engines.serving.stepper import Stepper
from engines.serving.text import TextCodec
from iapt_export.contract.errors import IaptError
from iapt_export.contract.integrity import Checks, open_manifest
from iapt_export.contract.manifest import BundleManifest, TargetSpec

MAX_WAITING = 256
INLINE_WORK = 4000
"""What has more to read is checked and encoded in another thread than an event loop's, which it would hold up."""

_log = logging.getLogger(__name__)


class Session(Activated):
    """Generates with one target of one bundle."""

    def __init__(
        self,
        bundle: Path,
        manifest: BundleManifest,
        target: TargetSpec,
        stepper: Stepper,
        *,
        continuous: bool = True,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Bind the parts together; `open` makes them from a bundle."""
        if max_waiting < 1:
            text = "expected at least 1; to wait for nothing, submit with timeout=0"
            raise IaptError(f"max_waiting is {max_waiting}, {text}")
        self.bundle = bundle
        self.manifest = manifest
        self.target = target
        self.stepper = stepper
        self.max_waiting = max_waiting
        self._files = OpenedFiles(bundle, manifest)
        self._admission = Admission(bundle, manifest, stepper, self._files)
        self._shares: dict[str, Share] = {}
        self._scheduler = Scheduler(stepper, continuous=continuous, shares=self._shares)
        self._opening = threading.Lock()
        """Held while the session opens or closes."""
        self._lock = OwnCondition()
        """Guards everything below, and the bank; the scheduler belongs to the thread alone."""
        self._inbox = Inbox(self._lock, stepper.bank, self._scheduler, max_waiting)
        self._generations = self._inbox.generations
        self._thread: threading.Thread | None = None
        self._closing = self._draining = False
        self._failure: Exception | None = None

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        target: str | None = None,
        *,
        device: str = "cpu",
        in_place: bool | None = None,
        continuous: bool = True,
        max_waiting: int = MAX_WAITING,
        threads: int | None = None,
        drafts: int = 0,
        **checks: Unpack[Checks],
    ) -> Session:
        """Read a bundle and prepare one of its targets; `activate` (or a with block) loads it.

        Args:
            bundle: the folder that ``iapt-export build`` wrote.
            target: its name; None takes the bundle's first.
            device: ``cpu`` or ``cuda``, for ONNX Runtime.
            in_place: which kind of cache, see `engines.serving.loading.open_stepper`.
            continuous: let requests join while others run; else a batch runs to its end before the next begins.
            max_waiting: requests that may wait for a row; `submit` makes callers wait beyond that. A tenant of which
                none waits may still queue one, so that others cannot shut it out.
            threads: of ONNX Runtime on the CPU; None takes as many as this process may use cores.
            drafts: tokens of a row that may be guessed from its instruction and answer, and verified in one step, where
                that pays; see `engines.serving.drafts`. Answers stay the same. For bundles of ``build --drafts``.
            checks: ``verify``, ``trust="key.pub.pem"``, ``allow_unproven``; see
                `iapt_export.contract.integrity.Checks`.

        Raises:
            IaptError: the bundle is damaged, not trusted or not proven, or this machine cannot run the target.
        """
        folder = Path(bundle).absolute()  # the tokenizer is read when it is needed, from wherever the process is then
        manifest = open_manifest(Path(bundle), **checks)
        stepper = open_stepper(
            folder, manifest, manifest.target(target), device=device, in_place=in_place, threads=threads, drafts=drafts
        )
        return cls(folder, manifest, stepper.target, stepper, continuous=continuous, max_waiting=max_waiting)

    def activate(self) -> None:
        """Load the graphs and start serving."""
        with self._opening, self._lock:
            if self._thread is not None:
                return
            self._files.check()
            self.stepper.activate()
            self._closing, self._draining, self._failure = False, False, None
            self._lock.own()
            self._thread = threading.Thread(target=self._serve, name="iapt-session", daemon=True)
            self._thread.start()

    def deactivate(self) -> None:
        """Stop serving and give the memory back; requests under way end with an error, and keep what they have as
        `Generation.partial`.
        """
        with self._opening:
            with self._lock:
                thread, self._thread, self._closing = self._thread, None, True
                self._lock.notify_all()
            if thread is not None:
                thread.join()
                self.stepper.deactivate()

    def close(self, *, drain: bool = False, timeout: float | None = None) -> bool:
        """Refuse new requests, and `deactivate`.

        Args:
            drain: answer first what was submitted.
            timeout: seconds to wait for that; None waits as long as it takes.

        Returns:
            Whether everything was answered.
        """
        with self._lock:
            self._draining = True
            if drain:
                self._lock.wait_for(lambda: not self._inbox.is_busy or self._thread is None, timeout)
            busy = self._inbox.is_busy
        self.deactivate()
        return not busy

    @property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer."""
        return self._admission.codec

    @property
    def tenants(self) -> list[str]:
        """Names of the tenants that are installed now."""
        with self._lock:
            return list(self.stepper.bank.tenants)

    @property
    def base(self) -> str | None:
        """The name under which the backbone itself answers; None where a tenant is merged into it."""
        base = self.stepper.bank.base
        return None if base is None else base.name

    def set_share(self, tenant: str, share: Share) -> None:
        """Say what a tenant gets from now on: its weight beside others, its rows, its places in the queue.

        Args:
            tenant: its name, which need not be installed yet; ``*`` for all that are not named.
            share: what it gets.
        """
        with self._lock:
            self._shares[tenant] = share
            for name, account in self._scheduler.waiting.accounts.items():
                account.share = self._scheduler.waiting.share_of(name)

    def state(self) -> SessionState:
        """Rows, queue, cache and tenants now; from any thread, and cheap enough for every second."""
        with self._lock:
            status = "failed"
            if self._failure is None and (self._thread is None or self._thread.is_alive()):
                status = "closed" if self._thread is None else "draining" if self._draining else "serving"
            return state_of(status, self._failure, self._scheduler, self._inbox.arrived, self.max_waiting)

    def generate(self, requests: Iterable[Request], *, raised: AtError = "last") -> Iterator[Answer]:
        """Answers in the order of their requests. Nothing runs until they are iterated, or taken as a ``list``.

        Args:
            requests: any number; they are taken as there is room for them.
            raised: what becomes of one that cannot be answered, see `submit`. It has an `Answer` with ``error`` in its
                place, and behind all answers its error is raised; ``never`` raises none, ``first`` raises at once and
                cancels the others.

        Raises:
            IaptError: as ``raised`` says; with the first answer where the session is not open or has failed.
        """
        check_are_requests(requests)
        return in_order_of_requests(requests, self.submit, self._window, raised)

    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Tokens of all requests as they come; ``Token.index`` is a request's number. Takes them as `generate` does.

        Raises:
            IaptError: a request that cannot be answered, see `submit`; the others are cancelled.
        """
        check_are_requests(requests)
        return in_order_of_arrival((self.submit(r, n) for n, r in enumerate(requests)), self._window)

    def submit(self, request: Request, number: int = 0, *, timeout: float | None = None) -> Generation:
        """Let a request join.

        Args:
            request: the request.
            number: what its tokens carry as ``index``.
            timeout: seconds to wait while the queue is full; None waits as long as it takes, 0 not at all.

        Returns:
            Its tokens as they come: iterate it, also with ``async for``, or take its `Generation.result`. In an event
            loop use `submit_async`, because waiting for the queue would block the loop.

        Raises:
            QueueFullError: the queue is full, and stayed so for as long as ``timeout`` says.
            IaptError: an unknown tenant, an empty or too long prompt, a token id out of range, a request that can
                never fit into the cache, or a session that is not open.
        """
        check_is_request(request, f"request {number}", self.stepper.bank.tenants)
        with self._inbox.place(request.tenant, self._check_taking) as place:
            entry = self._admission.entry(request, number, place.tenant)
            place.turn, entered = thread_turn(entry, Generation(entry, self._wake))
            if not self._enter(place.turn):
                entered.wait(patience(entry, timeout))
            return self._leave_line(place.turn)

    async def submit_async(self, request: Request, number: int = 0, *, timeout: float | None = None) -> Generation:
        """`submit` for an event loop: waits in line without blocking it, and not any more once it is cancelled.

        Raises:
            IaptError: as `submit`.
        """
        check_is_request(request, f"request {number}", self.stepper.bank.tenants)
        with self._inbox.place(request.tenant, self._check_taking) as place:
            if work_of(request) > INLINE_WORK:
                entry = await asyncio.to_thread(self._admission.entry, request, number, place.tenant)
            else:
                entry = self._admission.entry(request, number, place.tenant)
            place.turn, entered = loop_turn(entry, Generation(entry, self._wake))
            if not self._enter(place.turn):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(entered, patience(entry, timeout))
            return self._leave_line(place.turn)

    def check(self, request: Request, where: str) -> None:
        """Refuse, with `submit`'s errors, what it would refuse; ``where`` names the request in them.

        It asks for no answer, and the session need not be active.
        """
        check_is_request(request, where, self.stepper.bank.tenants)
        with self._lock:
            tenant = self.stepper.bank.get(request.tenant)
        self._admission.entry(request, 0, tenant, where)

    def add_tenant(self, path: str | Path, name: str | None = None, *, replace: bool = False) -> str:
        """Install a tenant while serving; it waits for no step, and a step waits at most for its weights to be copied.

        Args:
            path: a safetensors file with a tenant card, as ``iapt-export tenant`` writes it.
            name: what to call it; None takes the card's name.
            replace: take the place of a tenant of that name; its requests under way keep the old weights.

        Returns:
            Its name.

        Raises:
            IaptError: the file is for another backbone or a method that the bundle lacks, holds other tensors or
                NaN, the name is taken, or the method's stack is full.
        """
        with self._lock:
            self._check_open()
        new = self.stepper.bank.read(Path(path), name)
        with self._lock:
            self._check_open()
            return self.stepper.bank.install(new, replace=replace).name

    def remove_tenant(self, name: str) -> None:
        """Take a tenant out while serving; its requests under way are finished.

        Raises:
            IaptError: no such tenant, or one that is merged into the backbone.
        """
        with self._lock:
            self._check_open()
            self.stepper.bank.remove(name)

    def _check_open(self) -> None:
        if self._failure is not None:
            text = f"the session has failed and serves no more: {self._failure}"
            raise IaptError(text, code="session_failed") from self._failure
        if self._thread is None:
            text = "the session is not open; use it in a with block, or call activate() first"
            raise IaptError(text, code="session_closed")

    def _check_taking(self) -> None:
        self._check_open()
        if self._draining:
            raise IaptError("the session is closing and takes no more requests", code="session_closed")

    def _enter(self, turn: Turn) -> bool:
        """Let a request into the queue, or get in line."""
        with self._lock:
            self._check_open()
            self._inbox.line.append(turn)
            self._inbox.let_in()
            return turn.has_entered

    def _leave_line(self, turn: Turn) -> Generation:
        with self._lock:
            if not turn.has_entered:
                self._check_open()
            self._inbox.end_wait(turn)
            return turn.generation

    @property
    def _window(self) -> int:
        """Requests of one call that are under way at once."""
        return self.stepper.max_rows + self.max_waiting

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _serve(self) -> None:
        """What the session's thread does: steps while there is work."""
        failure: Exception = IaptError("the session was closed before the answer was finished", code="closed")
        try:
            while self._wait_for_work():
                for entry, item in self._scheduler.step():
                    self._hand_out(entry, item)
        except BaseException as error:
            ended = IaptError(f"its thread was ended by {type(error).__name__}", code="session_failed")
            self._failure = error if isinstance(error, Exception) else ended
            # no fault of the requests under way; what a defect says is for the log
            why = f": {error}" if isinstance(error, IaptError) else "; its log says why"
            failure = IaptError(f"the session has failed{why}", code="session_failed")
            failure.__cause__ = self._failure
            _log.exception("the session has failed and serves no more")
        self._scheduler.finish()
        with self._lock:
            self._inbox.fail(failure)
            self._scheduler = Scheduler(self.stepper, continuous=self._scheduler.continuous, shares=self._shares)
            self._inbox.scheduler = self._scheduler
            self._lock.notify_all()

    def _wait_for_work(self) -> bool:
        with self._lock:
            self._inbox.let_in()  # the last step may have taken in some of those that waited
            self._lock.wait_for(lambda: self._closing or self._inbox.arrived or self._scheduler.has_work)
            for entry in self._inbox.arrived:
                self._scheduler.add(entry)
            self._inbox.arrived.clear()
            return not self._closing

    def _hand_out(self, entry: Entry, item: Item) -> None:
        generation = self._generations[entry]
        if not entry.times.first_token and entry.tokens:
            entry.times.first_token = time.monotonic()
        if isinstance(item, Token):
            entry.times.tokens.append(time.monotonic())
        if not isinstance(item, Token) or item.finish_reason:
            entry.times.finished = time.monotonic()
            with self._lock:
                del self._generations[entry]
                self.stepper.bank.release(entry.tenant)
                self._lock.notify_all()
        generation.give(item)


__all__ = ["Answer", "Generation", "Grammar", "Request", "Sampling", "Session", "Share", "Token"]
