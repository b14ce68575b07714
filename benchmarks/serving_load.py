"""A trace of requests of mixed lengths on one session, in continuous and in static batches."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from engines.serving.session import Request, Session
from engines.serving.stepper import Instruction

Arrival = tuple[float, Request]
"""Seconds after the start, and what is asked."""


def make_trace(tenants: Sequence[str], vocabulary: int, count: int, seed: int = 0) -> list[Arrival]:
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
        arrivals.append((now, request))
        now += source.expovariate(10.0)
    return arrivals


def play(bundle: Path, trace: Sequence[Arrival], *, continuous: bool) -> dict[str, float]:
    """Serve a trace as it arrives; ``continuous`` lets requests join others under way, else a batch ends first.

    Returns:
        what `_speeds` says.
    """
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    counts: list[int] = []

    def follow(number: int, request: Request, due: float) -> None:
        count = 0
        for count, _ in enumerate(session.submit(request, number), start=1):  # noqa: B007 (counted)
            first.setdefault(number, time.perf_counter() - due)
        counts.append(count)
        last[number] = time.perf_counter() - due

    with Session.open(
        bundle, verify=False, allow_unproven=True, continuous=continuous, max_waiting=len(trace)
    ) as session:
        start, threads = time.perf_counter(), []
        for number, (seconds, request) in enumerate(trace):
            time.sleep(max(0.0, start + seconds - time.perf_counter()))
            threads.append(threading.Thread(target=follow, args=(number, request, start + seconds)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        passed = time.perf_counter() - start
    assert sum(counts) == sum((request.max_new_tokens or 0) for _, request in trace)
    return _speeds(trace, passed, list(first.values()), list(last.values()))


def play_whole(bundle: Path, trace: Sequence[Arrival]) -> dict[str, float]:
    """Serve a trace in batches whose rows stay until the last is finished, as ``generate`` of transformers and genai.

    A batch takes what has arrived, up to all rows. An answer is handed out when its own last token is there.
    """
    waiting, first, last = deque(trace), [], []
    with Session.open(bundle, verify=False, allow_unproven=True) as session:
        stepper, start = session.stepper, time.perf_counter()
        while waiting:
            time.sleep(max(0.0, start + waiting[0][0] - time.perf_counter()))
            now = time.perf_counter() - start
            batch = [waiting.popleft() for _ in range(stepper.max_rows) if waiting and waiting[0][0] <= now]
            rows = [Instruction(stepper.bank.get(request.tenant), request.tokens) for _, request in batch]
            made = stepper.read(rows).argmax(axis=1).tolist()
            for number in range(1, 1 + max((request.max_new_tokens or 0) for _, request in batch)):
                passed = time.perf_counter() - start
                first += [passed - seconds for seconds, _ in batch if number == 1]
                last += [passed - seconds for seconds, request in batch if number == (request.max_new_tokens or 0)]
                made = stepper.step(made).argmax(axis=1).tolist()
            while stepper.num_rows:
                stepper.leave(stepper.num_rows - 1)
        return _speeds(trace, time.perf_counter() - start, first, last)


def _speeds(trace: Sequence[Arrival], passed: float, first: list[float], last: list[float]) -> dict[str, float]:
    """Tokens a second from the first arrival to the last answer, and the medians of the seconds that requests wait."""
    tokens = sum((request.max_new_tokens or 0) for _, request in trace)
    return {"tokens_per_s": tokens / passed, "first_token_s": median(first), "answer_s": median(last)}


def compare_batching(bundle: Path, rounds: int, count: int) -> Iterator[dict[str, Any]]:
    """Play one trace in each kind of batch, in alternating order; a record after each round."""
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "continuous": lambda: play(bundle, trace, continuous=True),
        "static": lambda: play(bundle, trace, continuous=False),
        "whole": lambda: play_whole(bundle, trace),
    }
    with Session.open(bundle, verify=False, allow_unproven=True) as session:
        trace = make_trace(session.tenants, session.manifest.backbone.vocab_size, count)
    for number in range(rounds):
        yield {"requests": count, "batches": {name: kinds[name]() for name in list(kinds)[:: (1, -1)[number % 2]]}}
