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
import operator
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Unpack

import numpy as np

from engines.runner import Activated
from engines.serving.conversation import check_text_fields, encode_request
from engines.serving.generation import Generation, in_order_of_arrival
from engines.serving.loading import open_stepper
from engines.serving.own_process import OwnCondition
from engines.serving.request import Answer, Item, Request, Token
from engines.serving.sampling import Sampling
from engines.serving.scheduler import Entry, Scheduler
from engines.serving.stepper import Stepper
from engines.serving.tenants import Tenant, cast
from engines.serving.text import TOKENIZER_FILE, TextCodec
from iapt_export.contract.errors import IaptError, QueueFullError
from iapt_export.contract.integrity import Checks, open_manifest
from iapt_export.contract.manifest import BundleManifest, TargetSpec

MAX_WAITING = 256
POLL_SECONDS = 0.005
"""How often an event loop looks whether a full queue has room."""


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
        self._codec: TextCodec | None = None
        self._reading = threading.Lock()
        self._scheduler = Scheduler(stepper, continuous=continuous)
        self._opening = threading.Lock()
        """Held while the session opens or closes."""
        self._lock = OwnCondition()
        """Guards everything below, and the bank; the scheduler belongs to the thread alone."""
        self._arrived: list[Entry] = []
        self._generations: dict[Entry, Generation] = {}
        self._thread: threading.Thread | None = None
        self._closing = False
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
        **checks: Unpack[Checks],
    ) -> Session:
        """Read a bundle and prepare one of its targets; `activate` (or a with block) loads it.

        Args:
            bundle: the folder that ``iapt-export build`` wrote.
            target: its name; None takes the bundle's first.
            device: ``cpu`` or ``cuda``, for ONNX Runtime.
            in_place: which kind of cache, see `engines.serving.loading.open_stepper`.
            continuous: let requests join while others run; else a batch runs to its end before the next begins.
            max_waiting: requests that may wait for a row; `submit` makes callers wait beyond that.
            checks: ``verify``, ``trust="key.pub.pem"``, ``allow_unproven``; see
                `iapt_export.contract.integrity.Checks`.

        Raises:
            IaptError: the bundle is damaged, not trusted or not proven, or this machine cannot run the target.
        """
        folder = Path(bundle)
        manifest = open_manifest(folder, **checks)
        chosen = manifest.target(target)
        stepper = open_stepper(folder, manifest, chosen, device=device, in_place=in_place)
        return cls(folder, manifest, chosen, stepper, continuous=continuous, max_waiting=max_waiting)

    def activate(self) -> None:
        """Load the graphs and start serving."""
        with self._opening, self._lock:
            if self._thread is not None:
                return
            self.stepper.activate()
            self._closing, self._failure = False, None
            self._lock.own()
            self._thread = threading.Thread(target=self._serve, name="iapt-session", daemon=True)
            self._thread.start()

    def deactivate(self) -> None:
        """Stop serving and give the memory back; requests under way end with an error."""
        with self._opening:
            with self._lock:
                thread, self._thread, self._closing = self._thread, None, True
                self._lock.notify_all()
            if thread is not None:
                thread.join()
                self.stepper.deactivate()

    @property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer, read when first needed, by one thread alone: it takes tens of megabytes."""
        with self._reading:
            if self._codec is None:
                self._codec = TextCodec(self.bundle)
            return self._codec

    @property
    def tenants(self) -> list[str]:
        """Names of the tenants that are installed now."""
        with self._lock:
            return list(self.stepper.bank.tenants)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answer requests in their order; they are taken as there is room for them, so there may be any number.

        Raises:
            IaptError: a request that cannot be answered, see `submit`; the others are cancelled.
        """
        running: deque[Generation] = deque()
        try:
            for number, request in enumerate(requests):
                if len(running) == self._window:
                    yield running[0].result()
                    running.popleft()
                running.append(self.submit(request, number))
            while running:
                yield running[0].result()
                running.popleft()
        finally:
            for generation in running:
                generation.cancel()

    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Tokens of all requests as they come; ``Token.index`` is a request's number. Takes them as `generate` does.

        Raises:
            IaptError: a request that cannot be answered, see `submit`; the others are cancelled.
        """
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
        with self._lock:
            self._check_open()
            tenant = self.stepper.bank.acquire(request.tenant)
        try:
            entry = self._entry(request, number, tenant)
            generation = Generation(entry, self._wake)
            with self._lock:
                free = self._lock.wait_for(self._has_room, timeout)
                self._check_open()
                if not free:
                    raise QueueFullError(
                        f"{self.max_waiting} requests are waiting already; try again later, or open the session with "
                        "a larger max_waiting"
                    )
                self._generations[entry] = generation
                self._arrived.append(entry)
                self._lock.notify_all()
        except BaseException:
            with self._lock:
                self.stepper.bank.release(tenant)
            raise
        return generation

    def check(self, request: Request, where: str) -> None:
        """Refuse, with `submit`'s errors, what it would refuse; ``where`` names the request in them.

        It asks for no answer, and the session need not be active.
        """
        with self._lock:
            tenant = self.stepper.bank.get(request.tenant)
        self._entry(request, 0, tenant, where)

    async def submit_async(self, request: Request, number: int = 0) -> Generation:
        """`submit` for an event loop: waits for the queue without blocking, and not any more once it is cancelled.

        Raises:
            IaptError: as `submit`.
        """
        while True:
            if self._has_room():
                try:
                    return self.submit(request, number, timeout=0)
                except QueueFullError:
                    pass  # another client was faster
            await asyncio.sleep(POLL_SECONDS)

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
            raise IaptError(f"the session has failed and serves no more: {self._failure}") from self._failure
        if self._thread is None:
            raise IaptError("the session is not open; use it in a with block, or call activate() first")

    def _has_room(self) -> bool:
        waiting = len(self._arrived) + len(self._scheduler.waiting)
        return self._thread is None or self._failure is not None or waiting < self.max_waiting

    @property
    def _window(self) -> int:
        """Requests of one call that are under way at once."""
        return self.stepper.max_rows + self.max_waiting

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _serve(self) -> None:
        """What the session's thread does: steps while there is work."""
        failure: Exception = IaptError("the session was closed before the answer was finished")
        try:
            while self._wait_for_work():
                for entry, item in self._scheduler.step():
                    self._hand_out(entry, item)
        except Exception as error:
            failure = self._failure = error
        with self._lock:
            for entry, generation in self._generations.items():
                self.stepper.bank.release(entry.tenant)
                generation.give(failure)
            self._generations.clear()
            self._arrived.clear()
            self._scheduler = Scheduler(self.stepper, continuous=self._scheduler.continuous)
            self._lock.notify_all()

    def _wait_for_work(self) -> bool:
        with self._lock:
            if self._has_room():  # the last step may have taken in some of those that waited
                self._lock.notify_all()
            self._lock.wait_for(lambda: self._closing or self._arrived or self._scheduler.has_work)
            for entry in self._arrived:
                self._scheduler.add(entry)
            self._arrived.clear()
            return not self._closing

    def _hand_out(self, entry: Entry, item: Item) -> None:
        generation = self._generations[entry]
        if not isinstance(item, Token) or item.finish_reason:
            with self._lock:
                del self._generations[entry]
                self.stepper.bank.release(entry.tenant)
                self._lock.notify_all()
        generation.give(item)

    def _entry(self, request: Request, number: int, tenant: Tenant, where: str = "") -> Entry:
        where = where or f"request {number}"
        backbone, ranges = self.manifest.backbone, self.manifest.ranges
        check_fields(where, request)
        prompt = [operator.index(token) for token in request.tokens]
        prompt = prompt or encode_request(where, request, tenant, self.codec)
        wrong = [token for token in (*prompt, *request.stop_token_ids) if not 0 <= token < backbone.vocab_size]
        if wrong:
            raise IaptError(
                f"{where}: token id {wrong[0]} is out of range; the vocabulary has {backbone.vocab_size} entries"
            )
        if len(prompt) > ranges.sequence.max:
            raise IaptError(
                f"{where}: the prompt has {len(prompt)} tokens; this bundle takes at most {ranges.sequence.max} "
                "(shorten it, or build with a larger --sequence)"
            )
        if len(prompt) < ranges.sequence.min:
            raise IaptError(
                f"{where}: the prompt has {len(prompt)} tokens; this bundle takes at least {ranges.sequence.min} "
                "(build with a smaller --sequence)"
            )
        needed = tenant.prompt_length + len(prompt) + request.max_new_tokens - 1
        if needed > self.stepper.capacity:
            raise IaptError(
                f"{where} needs {needed} cache entries ({tenant.prompt_length} prompt, {len(prompt)} instruction, the "
                f"rest new tokens); this bundle has {self.stepper.capacity} (lower --max-new-tokens, or build with a "
                "larger --past)"
            )
        has_text = request.stop or (self.bundle / TOKENIZER_FILE).is_file()
        return Entry(
            request,
            number,
            tenant,
            prompt,
            self.codec if has_text else None,
            frozenset(backbone.eos_token_ids),
            np.random.default_rng(request.sampling.seed),
            None if request.soft_prompts is None else self._checked(where, tenant, request.soft_prompts),
        )

    def _checked(self, where: str, tenant: Tenant, prompts: np.ndarray) -> np.ndarray:
        """A copy of the prompts that a client sent; its own array may change while the request waits."""
        spec = self.stepper.sent_prompts
        if spec is None or spec.name.split(".")[0] != tenant.method:
            raise IaptError(
                f"{where}: tenant {tenant.name} was trained with {tenant.trained_form}, which makes its own prompts; "
                "send none (only LoPA's may be computed by the client)"
            )
        copied = cast(np.array(prompts), spec.dtype)
        if list(copied.shape) != spec.shape[1:]:
            raise IaptError(f"{where}: the sent prompts have shape {list(copied.shape)}, expected {spec.shape[1:]}")
        if not np.isfinite(copied.astype(np.float32)).all():
            raise IaptError(f"{where}: the sent prompts hold NaN or infinity, or numbers too large for {spec.dtype}")
        return copied


def check_fields(where: str, request: Request) -> None:
    """Refuse a request whose fields no session could serve.

    Raises:
        IaptError: what was expected, and what came.
    """
    check_text_fields(where, request)
    if isinstance(request.stop, str) or not all(isinstance(stop, str) for stop in request.stop):
        raise IaptError(f"{where}: stop is {request.stop!r}, expected texts in a tuple, such as ('END',)")
    if "" in request.stop:
        raise IaptError(f"{where}: a stop text is empty; leave it out")
    if not hasattr(request.max_new_tokens, "__index__") or request.max_new_tokens < 1:
        raise IaptError(f"{where}: max_new_tokens is {request.max_new_tokens}, expected at least 1, a whole number")
    strange = [token for token in (*request.tokens, *request.stop_token_ids) if not hasattr(token, "__index__")]
    if strange:
        raise IaptError(f"{where}: {strange[0]!r} is no token id; expected whole numbers")


__all__ = ["Answer", "Generation", "Request", "Sampling", "Session", "Token"]
