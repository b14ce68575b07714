"""Load on one session: a trace of requests of mixed lengths, and a soak in which tenants come and go.

`benchmarks.serving` runs them as ``trace`` and ``soak``.
"""

from __future__ import annotations

import math
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.serving.session import Request, Session
from engines.serving.stepper import Instruction, Stepper
from iapt_export.contract.errors import IaptError

IDLE_ADDS = 5
"""Times that each tenant is added before there are requests."""
CLEAR = 1e-2
"""Lead of every token's logit over the next, below which an answer may change with the batch's rounding."""
MIB = 2**20


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    seconds: float
    """After the start."""
    request: Request


def make_trace(tenants: list[str], vocabulary: int, count: int, seed: int = 0) -> list[Arrival]:
    """Requests whose instructions have 16 to 128 tokens and whose answers have 4 to 256, most of them short.

    Answers' lengths are log-normal with a median of 32, as those of chat logs roughly are. Requests arrive a tenth of a
    second apart on average, which is faster than two cores serve them, as in a busy hour.
    """
    source = random.Random(seed)
    arrivals, now = [], 0.0
    for number in range(count):
        prompt = tuple(source.randrange(5, vocabulary) for _ in range(source.randint(16, 128)))
        length = min(256, max(4, int(source.lognormvariate(math.log(32), 1.2))))
        request = Request(tenants[number % len(tenants)], tokens=prompt, max_new_tokens=length, ignore_eos=True)
        arrivals.append(Arrival(now, request))
        now += source.expovariate(10.0)
    return arrivals


def play(bundle: Path, trace: list[Arrival], *, continuous: bool) -> dict[str, float]:
    """Serve a trace as it arrives.

    Args:
        bundle: the bundle to serve.
        trace: what arrives, and when.
        continuous: let requests join others under way; else a batch runs to its end before the next begins.

    Returns:
        ``tokens_per_s`` from the first arrival to the last answer, and the medians over requests of the seconds from
        arrival to the first token, ``first_token_s``, and to the last, ``answer_s``.
    """
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    tokens = 0

    def follow(number: int, due: float) -> None:
        nonlocal tokens
        for _ in session.submit(trace[number].request, number):
            first.setdefault(number, time.perf_counter() - due)
            with counting:
                tokens += 1
        last[number] = time.perf_counter() - due

    counting = threading.Lock()
    with Session.open(bundle, verify=False, continuous=continuous, max_waiting=len(trace)) as session:
        start, threads = time.perf_counter(), []
        for number, arrival in enumerate(trace):
            due = start + arrival.seconds
            time.sleep(max(0.0, due - time.perf_counter()))
            threads.append(threading.Thread(target=follow, args=(number, due)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
    assert tokens == sum(arrival.request.max_new_tokens for arrival in trace)
    return {
        "tokens_per_s": tokens / seconds,
        "first_token_s": statistics.median(first.values()),
        "answer_s": statistics.median(last.values()),
    }


def play_whole(bundle: Path, trace: list[Arrival]) -> dict[str, float]:
    """Serve a trace in batches whose rows stay until the last is finished, as ``generate`` of transformers and genai.

    A batch takes what has arrived, up to all rows. Takes and returns what `play` does, and hands an answer out when
    its own last token is there.
    """
    waiting, first, last = deque(enumerate(trace)), [], []
    with Session.open(bundle, verify=False) as session:
        stepper = session.stepper
        start = time.perf_counter()
        while waiting:
            time.sleep(max(0.0, start + waiting[0][1].seconds - time.perf_counter()))
            now = time.perf_counter() - start
            batch = [waiting.popleft()[1] for _ in range(stepper.max_rows) if waiting and waiting[0][1].seconds <= now]
            rows = [Instruction(stepper.bank.get(each.request.tenant), each.request.tokens) for each in batch]
            made = stepper.read(rows).argmax(axis=1).tolist()
            for number in range(1, 1 + max(each.request.max_new_tokens for each in batch)):
                passed = time.perf_counter() - start
                first += [passed - each.seconds for each in batch if number == 1]
                last += [passed - each.seconds for each in batch if number == each.request.max_new_tokens]
                made = stepper.step(made).argmax(axis=1).tolist()
            while stepper.num_rows:
                stepper.leave(stepper.num_rows - 1)
        seconds = time.perf_counter() - start
    tokens = sum(arrival.request.max_new_tokens for arrival in trace)
    return {
        "tokens_per_s": tokens / seconds,
        "first_token_s": statistics.median(first),
        "answer_s": statistics.median(last),
    }


def compare_batching(bundle: Path, rounds: int, count: int) -> Iterator[dict[str, Any]]:
    """Play one trace in each kind of batch, in alternating order; a record after each round."""
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "continuous": lambda: play(bundle, trace, continuous=True),
        "static": lambda: play(bundle, trace, continuous=False),
        "whole": lambda: play_whole(bundle, trace),
    }
    with Session.open(bundle, verify=False) as session:
        trace = make_trace(session.tenants, session.manifest.backbone.vocab_size, count)
    for number in range(rounds):
        names = list(kinds) if number % 2 == 0 else list(kinds)[::-1]
        yield {"requests": count, **{name: kinds[name]() for name in names}}


def answer_alone(stepper: Stepper, tenant: str, prompt: tuple[int, ...], length: int) -> tuple[list[int], float]:
    """Greedy tokens of a row by itself, and the smallest lead that any of them had."""
    logits = stepper.read([Instruction(stepper.bank.get(tenant), prompt)])[0]
    tokens, lead = [], float("inf")
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
    """What a soak found."""

    answered: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Errors of requests that should have been answered."""
    removed: int = 0
    idle_add_ms: list[float] = field(default_factory=list)
    """Milliseconds that adding a tenant took before there were requests."""
    add_ms: list[float] = field(default_factory=list)
    """The same while the clients asked."""
    memory_mib: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, MiB resident), from the first sample on."""

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            **self.__dict__,
            "idle_add_ms": [round(ms, 1) for ms in self.idle_add_ms],
            "add_ms": [round(ms, 1) for ms in self.add_ms],
            "memory_mib": [(round(seconds), round(mib, 1)) for seconds, mib in self.memory_mib],
        }


def soak(bundle: Path, seconds: float, clients: int = 12, length: int = 24) -> Iterator[Soak]:
    """Clients ask without pause while one tenant after the other is added under new names, used and removed.

    Every answer is compared with what its row gives alone, which was computed before. The state is given out about
    every ten seconds, the last time when all is over.
    """
    state, lock, stop = Soak(), threading.Lock(), threading.Event()
    with Session.open(bundle, verify=False, max_waiting=clients) as session:
        known = _expected(session, length)
        guests: list[tuple[str, str]] = []
        """(name, the tenant whose file it was added from) of those that are there and will not be removed next."""

        def ask(seed: int) -> None:
            source = random.Random(seed)
            while not stop.is_set():
                with lock:
                    name, model = source.choice([*guests, *((own, own) for own in known)])
                prompt, wanted = source.choice(known[model])
                try:
                    request = Request(name, tokens=prompt, max_new_tokens=length, ignore_eos=True)
                    made = session.submit(request).result().tokens
                except IaptError as error:
                    if f"tenant {name!r} is not in this bundle" in str(error):
                        continue  # it was removed since the choice
                    with lock:
                        state.lost.append(str(error))
                    continue
                with lock:
                    state.answered += 1
                    if made != wanted:
                        state.wrong.append({"tenant": model, "prompt": prompt, "made": made, "wanted": wanted})

        def change() -> None:
            source, number = random.Random(0), 0
            while not stop.wait(0.5):
                if len(guests) >= 8:
                    with lock:
                        name, _ = guests.pop(0)
                    session.remove_tenant(name)
                    state.removed += 1
                model = source.choice(list(known))
                name = f"guest{number}"
                state.add_ms.append(add(model, name))
                with lock:
                    guests.append((name, model))
                number += 1

        def add(model: str, name: str) -> float:
            began = time.perf_counter()
            session.add_tenant(bundle / "tenants" / f"{model}.safetensors", name)
            return (time.perf_counter() - began) * 1e3

        for model in list(known) * IDLE_ADDS:
            state.idle_add_ms.append(add(model, "guest"))
            session.remove_tenant("guest")
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(clients)]
        threads.append(threading.Thread(target=change))
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            state.memory_mib.append((passed, resident_mib()))
            yield state
            time.sleep(min(10.0, max(0.0, seconds - passed)))
        stop.set()
        for thread in threads:
            thread.join()
    yield state


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
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / MIB
