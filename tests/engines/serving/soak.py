"""A soak: clients ask one session without pause while tenants come and go. `benchmarks.serving` runs it for long."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from engines.serving.session import Request, Session
from engines.serving.stepper import Instruction, Stepper
from iapt_export.contract.errors import IaptError

IDLE_ADDS = 5
"""Times that each tenant is added before there are requests."""
LONGEST_WAIT = 60.0
"""Seconds after which an entry that is not free again was never given back."""
CLEAR = 1e-2
"""Lead of every token's logit over the next, below which an answer may change with the batch's rounding."""


def answer_alone(stepper: Stepper, tenant: str, prompt: tuple[int, ...], length: int) -> tuple[list[int], float]:
    """Greedy tokens of a row by itself, and the smallest lead that any of them had."""
    logits = stepper.read([Instruction(stepper.bank.get(tenant), prompt)])[0]
    tokens, lead = [], math.inf
    while True:
        second, best = sorted(logits.tolist())[-2:]
        lead = min(lead, best - second)
        tokens.append(int(logits.argmax()))
        if len(tokens) == length:
            break
        logits = stepper.step([tokens[-1]])[0]
    stepper.leave(0)
    return tokens, lead


@dataclass
class Soak:
    """Clients ask without pause while one tenant after the other is added under new names, used and removed.

    Every answer is compared with what its row gives alone, which was computed before.
    """

    session: Session
    known: dict[str, list[tuple[tuple[int, ...], list[int]]]]
    """Each tenant's prompts and their right answers."""
    answered: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Errors of requests that should have been answered."""
    removed: int = 0
    idle_add_ms: list[float] = field(default_factory=list)
    """Milliseconds that adding a tenant took before there were requests."""
    add_ms: list[float] = field(default_factory=list)
    """The same while the clients asked."""
    memory_mib: list[tuple[int, float]] = field(default_factory=list)
    """(seconds, MiB resident)."""
    guests: list[tuple[str, str]] = field(default_factory=list)
    """(name, the tenant whose file it was added from) of those that are there and will not be removed next."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, seed: int, length: int) -> None:
        """One client."""
        source = random.Random(seed)
        while not self.stop.is_set():
            with self.lock:
                name, model = source.choice([*self.guests, *((own, own) for own in self.known)])
            prompt, wanted = source.choice(self.known[model])
            generation = None
            try:
                generation = self.session.submit(Request(name, tokens=prompt, max_new_tokens=length, ignore_eos=True))
                made = generation.result().tokens
            except IaptError as error:
                if generation is None and name not in self.session.tenants:
                    continue  # it was removed between the choice and the question
                with self.lock:
                    self.lost.append(str(error))
                continue
            with self.lock:
                self.answered += 1
                if made != wanted:
                    self.wrong.append({"tenant": model, "prompt": prompt, "made": made, "wanted": wanted})

    def watched(self, work: Callable[..., None], *arguments: int) -> None:
        """Run a thread's work; what ends it early counts as lost, or nobody would see that it is gone."""
        try:
            work(*arguments)
        except Exception as error:
            with self.lock:
                self.lost.append(f"{work.__name__} ended: {type(error).__name__}: {error}")

    def change(self) -> None:
        """Add and remove tenants."""
        source, number = random.Random(0), 0
        while not self.stop.wait(0.5):
            if len(self.guests) >= 8:
                with self.lock:
                    name, _ = self.guests.pop(0)
                self.session.remove_tenant(name)
                self.removed += 1
            model, name = source.choice(list(self.known)), f"guest{number}"
            self.add_ms.append(self.add(model, name))
            with self.lock:
                self.guests.append((name, model))
            number += 1

    def add(self, model: str, name: str) -> float:
        """Milliseconds that it took."""
        give_up = time.perf_counter() + LONGEST_WAIT
        while True:
            began = time.perf_counter()
            try:
                self.session.add_tenant(self.session.bundle / "tenants" / f"{model}.safetensors", name)
                return (time.perf_counter() - began) * 1e3
            except IaptError as error:  # on a slow machine, many that were removed still have requests under way
                if "wait for the requests of" not in str(error) or time.perf_counter() > give_up:
                    raise
            time.sleep(0.05)

    def record(self) -> dict[str, Any]:
        """What is kept."""
        kept = {name: getattr(self, name) for name in ("answered", "wrong", "lost", "removed", "memory_mib")}
        return {**kept, "idle_add_ms": spread(self.idle_add_ms), "add_ms": spread(self.add_ms)}


def soak(bundle: Path, seconds: float, clients: int = 12, length: int = 24) -> Iterator[Soak]:
    """Run a `Soak`. Its state is given out about every ten seconds, the last time when all is over."""
    with Session.open(bundle, verify=False, max_waiting=clients, allow_unproven=True) as session:
        state = Soak(session, _expected(session, length))
        for model in list(state.known) * IDLE_ADDS:
            state.idle_add_ms.append(state.add(model, "guest"))
            session.remove_tenant("guest")
        asking = [(state.ask, seed, length) for seed in range(clients)]
        threads = [threading.Thread(target=state.watched, args=work) for work in (*asking, (state.change,))]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            state.memory_mib.append((round(passed), round(resident_mib(), 1)))
            yield state
            time.sleep(min(10.0, max(0.0, seconds - passed)))
        state.stop.set()
        for thread in threads:
            thread.join()
    yield state


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    """Count, median, 99th percentile and largest."""
    ordered = sorted(milliseconds)
    late = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return {
        "count": len(ordered),
        **{k: round(ms, 1) for k, ms in (("median", median(ordered)), ("p99", late))},
        "largest": round(ordered[-1], 1),
    }


def _expected(session: Session, length: int) -> dict[str, list[tuple[tuple[int, ...], list[int]]]]:
    """For each tenant of an idle session eight prompts and their answers; prompts with a near tie are passed over."""
    source, vocabulary = random.Random(1), session.manifest.backbone.vocab_size
    known: dict[str, list[tuple[tuple[int, ...], list[int]]]] = {name: [] for name in session.tenants}
    for name, pairs in known.items():
        while len(pairs) < 8:
            prompt = tuple(source.randrange(5, vocabulary) for _ in range(source.randint(8, 64)))
            tokens, lead = answer_alone(session.stepper, name, prompt, length)
            if lead > CLEAR:
                pairs.append((prompt, tokens))
    return known


def resident_mib() -> float:
    """Memory of this process that is resident now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 2**20
