"""Replicas of a session under load: step times measured here, more machines simulated by them.

    python -m benchmarks.scale BUNDLE --output scale.json     # measure, compare with the simulation, simulate
    python -m benchmarks.scale --measured scale.json          # simulate again, by the times that are there

A simulated replica is the product's own scheduler over a stepper that computes nothing: reading and stepping add the
times that were measured in a real session to a clock. Requests come at random (Poisson), their tenants by Zipf's law,
instructions of 16 to 64 tokens, answers of a geometric length. First the same load runs in a real session and in the
simulation, so that a reader sees how far one can trust it. Not simulated: the network, processes that share a machine's
memory bandwidth, and reading beside decoding (instructions are short enough to be read at once).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.serving.entry import Entry
from engines.serving.request import Token
from engines.serving.scheduler import Scheduler
from engines.serving.session import Request, Session
from engines.serving.tenants import Tenant

INSTRUCTION = (16, 64)
MEAN_ANSWER, MOST_ANSWER = 32, 160
PROMPTS = 4
TENANT_S = 0.0022
"""Taking in a tenant's file while 12 clients ask: docs/security.md."""
SLOW_TENANT_S = 0.2
"""The same from a storage that is slow, or far."""


@dataclass(frozen=True)
class Costs:
    """Seconds that a replica's thread takes, as `measured` found them."""

    rows: list[int]
    step_s: list[float]
    """Of a step with so many rows."""
    read_fixed_s: float
    read_token_s: float
    """Of each token of an instruction, padding included."""
    tenant_s: float = TENANT_S

    def step(self, rows: int) -> float:
        """A step with so many rows."""
        return float(np.interp(rows, self.rows, self.step_s))

    def read(self, rows: int, tokens: int) -> float:
        """Reading so many instructions at once, the longest of so many tokens."""
        return self.read_fixed_s + rows * tokens * self.read_token_s

    def capacity(self) -> float:
        """Requests a second that keep a full replica busy."""
        read = self.read(1, sum(INSTRUCTION) // 2)
        return 1 / (read + MEAN_ANSWER * self.step_s[-1] / self.rows[-1])


@dataclass(frozen=True)
class Arrival:
    """A request of the load."""

    time: float
    tenant: int
    instruction: int
    answer: int


@dataclass
class Outcome:
    """What became of it; seconds since the load began."""

    arrived: float
    first: float = 0.0
    finished: float = 0.0
    tokens: int = 0
    loaded: bool = False
    """Its tenant had to be taken in first."""
    refused: bool = False
    """The replica had no place for its tenant: all that were there were in use."""


def arrivals(requests_per_s: float, seconds: float, tenants: int, seed: int = 0) -> list[Arrival]:
    """A load, the same for the same arguments."""
    random = np.random.default_rng(seed)
    count = max(1, round(requests_per_s * seconds))
    times = np.cumsum(random.exponential(1 / requests_per_s, count))
    weights = 1 / np.arange(1, tenants + 1)
    chosen = random.choice(tenants, count, p=weights / weights.sum())
    instructions = random.integers(INSTRUCTION[0], INSTRUCTION[1] - PROMPTS, count, endpoint=True)
    answers = np.minimum(random.geometric(1 / MEAN_ANSWER, count), MOST_ANSWER)
    return [
        Arrival(*values) for values in zip(*(a.tolist() for a in (times, chosen, instructions, answers)), strict=True)
    ]


class TimedStepper:
    """What a scheduler asks of `engines.serving.stepper.Stepper`: takes time by the clock, and computes nothing."""

    reads_beside = False
    can_verify = False

    def __init__(self, costs: Costs, max_rows: int) -> None:
        self.costs, self.max_rows, self.num_rows = costs, max_rows, 0
        self.seconds = 0.0
        """That this step has taken so far."""
        self._logits = np.zeros((max_rows, 1), np.float32)

    def read(self, rows: Sequence[Any]) -> np.ndarray:
        """Rows join."""
        longest = max(row.tenant.prompt_length + len(row.tokens) for row in rows)
        self.seconds += self.costs.read(len(rows), longest)
        self.num_rows += len(rows)
        return self._logits[: len(rows)]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Every row gets a token."""
        self.seconds += self.costs.step(self.num_rows)
        return self._logits[: self.num_rows]

    def leave(self, row: int) -> None:
        """A row goes."""
        self.num_rows -= 1

    def clear(self, row: int) -> None:
        """Nothing is there to clear."""


@dataclass
class Replica:
    """A scheduler, and the tenants that it holds."""

    scheduler: Scheduler
    stepper: TimedStepper
    places: int
    """Tenants that it can hold."""
    resident: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Tenant to its requests that are not finished; those used last stand last."""
    ongoing: int = 0

    def acquire(self, tenant: int) -> bool | None:
        """Whether the tenant has to be taken in; None where there is no place for it."""
        missing = tenant not in self.resident
        if missing and len(self.resident) >= self.places:
            idle = next((name for name, users in self.resident.items() if not users), None)
            if idle is None:
                return None
            del self.resident[idle]
        self.resident[tenant] = self.resident.get(tenant, 0) + 1
        self.resident.move_to_end(tenant)
        self.ongoing += 1
        return missing

    def release(self, tenant: int) -> None:
        """A request of the tenant is finished."""
        self.resident[tenant] -= 1
        self.ongoing -= 1


Routing = Callable[[list[Replica], int, np.random.Generator], Replica]


def two_choices(replicas: list[Replica], tenant: int, random: np.random.Generator) -> Replica:
    """The less busy of two at random, as Ray Serve does."""
    chosen = random.choice(len(replicas), min(2, len(replicas)), replace=False)
    return min((replicas[number] for number in chosen), key=lambda replica: replica.ongoing)


def affinity(replicas: list[Replica], tenant: int, random: np.random.Generator) -> Replica:
    """The tenant's own order of replicas; the first that has at most 1.25 times the mean number of requests
    (consistent hashing with bounded loads, Mirrokni et al. 2018, arXiv 1608.01350).
    """
    most = 1.25 * (sum(replica.ongoing for replica in replicas) + 1) / len(replicas)
    order = np.random.default_rng(tenant).permutation(len(replicas))
    return next((replicas[n] for n in order if replicas[n].ongoing + 1 <= max(1, most)), replicas[order[0]])


ROUTING: dict[str, Routing] = {"two choices": two_choices, "affinity": affinity}


def simulate(
    load: list[Arrival], costs: Costs, replicas: int, routing: Routing = two_choices, places: int = 1000
) -> list[Outcome]:
    """Run a load by the clock.

    Args:
        load: requests.
        costs: of each replica, all alike.
        replicas: how many.
        routing: which one gets a request.
        places: tenants that a replica can hold at once.
    """
    random, order = np.random.default_rng(1), itertools.count()
    steppers = [TimedStepper(costs, costs.rows[-1]) for _ in range(replicas)]
    fleet = [Replica(Scheduler(stepper), stepper, places) for stepper in steppers]  # type: ignore[arg-type]
    outcomes = [Outcome(each.time) for each in load]
    events: list[tuple[float, int, str, Any]] = [
        (each.time, next(order), "arrives", number) for number, each in enumerate(load)
    ]
    heapq.heapify(events)

    def push(when: float, what: str, whom: Any) -> None:
        heapq.heappush(events, (when, next(order), what, whom))

    while events:
        now, _, what, whom = heapq.heappop(events)
        if what == "arrives":
            replica = routing(fleet, load[whom].tenant, random)
            missing = replica.acquire(load[whom].tenant)
            outcomes[whom].loaded, outcomes[whom].refused = bool(missing), missing is None
            if missing is not None:
                push(now + costs.tenant_s * missing, "joins", (replica, whom))
        elif what == "joins":
            replica, number = whom
            was_idle = not replica.scheduler.has_work
            replica.scheduler.add(_entry(load[number], number))
            if was_idle:
                push(now, "steps", replica)
        else:
            whom.stepper.seconds = 0.0
            for entry, item in whom.scheduler.step():
                assert isinstance(item, Token), item
                outcome, when = outcomes[entry.number], now + whom.stepper.seconds
                outcome.first, outcome.tokens = outcome.first or when, outcome.tokens + 1
                if item.finish_reason:
                    outcome.finished = when
                    whom.release(load[entry.number].tenant)
            if whom.scheduler.has_work:
                push(now + whom.stepper.seconds, "steps", whom)
    return outcomes


def _entry(arrival: Arrival, number: int) -> Entry:
    request = Request(f"tenant-{arrival.tenant}", tokens=(0,), max_new_tokens=arrival.answer, ignore_eos=True)
    tenant = Tenant(request.tenant, None, 0, PROMPTS, "plain", "plain")
    return Entry(request, number, tenant, [0] * arrival.instruction, None, frozenset(), np.random.default_rng(0))


def measured(session: Session) -> Costs:
    """Step and reading times of a real session, whatever else it does between two tokens included."""
    names, most = session.tenants or [""], session.stepper.max_rows

    def gap(rows: int, tokens: int = 48) -> float:
        going = [
            session.submit(Request(names[n % len(names)], tokens=(9,) * 16, max_new_tokens=tokens, ignore_eos=True))
            for n in range(rows)
        ]
        times = [time.perf_counter() for _ in going[-1]]
        for each in going:
            each.result()
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    def first(tokens: int, rounds: int = 7) -> float:
        found = []
        for _ in range(rounds):
            done = session.submit(Request(names[0], tokens=(9,) * tokens, max_new_tokens=1, ignore_eos=True))
            done.result()
            found.append((done.times.first_token or 0) - done.times.submitted)
        return statistics.median(found)

    rows = sorted({1, most, *(2**power for power in range(1, most.bit_length()) if 2**power < most)})
    short, long = (tokens - PROMPTS for tokens in INSTRUCTION)
    gap(most), first(long)  # the first round allocates
    at_short, at_long = first(short), first(long)
    a_token = max(0.0, (at_long - at_short) / (long - short))
    return Costs(rows, [gap(each) for each in rows], max(0.0, at_short - a_token * INSTRUCTION[0]), a_token)


def observe(session: Session, load: list[Arrival]) -> list[Outcome]:
    """Run a load in a real session, in real time."""
    names, begin, going = session.tenants or [""], time.monotonic(), []
    for each in load:
        time.sleep(max(0.0, begin + each.time - time.monotonic()))
        request = Request(
            names[each.tenant % len(names)],
            tokens=(9,) * each.instruction,
            max_new_tokens=each.answer,
            ignore_eos=True,
        )
        going.append(session.submit(request))
    answers = [generation.result() for generation in going]
    return [
        Outcome(g.times.submitted - begin, (g.times.first_token or 0) - begin, (g.times.finished or 0) - begin, len(a))
        for g, a in zip(going, (answer.tokens for answer in answers), strict=True)
    ]


def figures(outcomes: list[Outcome]) -> dict[str, float]:
    """Throughput, and times in milliseconds; shares of all requests."""
    answered = [each for each in outcomes if not each.refused]
    first = [1e3 * (each.first - each.arrived) for each in answered]
    gaps = [1e3 * (each.finished - each.first) / (each.tokens - 1) for each in answered if each.tokens > 1]
    span = max(each.finished for each in answered) - min(each.arrived for each in outcomes)
    return {
        "tokens_per_s": sum(each.tokens for each in answered) / span,
        "first_p50_ms": float(np.percentile(first, 50)),
        "first_p99_ms": float(np.percentile(first, 99)),
        "token_p50_ms": float(np.percentile(gaps, 50)),
        "token_p99_ms": float(np.percentile(gaps, 99)),
        "loaded": statistics.mean(each.loaded for each in outcomes),
        "refused": statistics.mean(each.refused for each in outcomes),
    }


def replicas_table(costs: Costs, seconds: float) -> list[dict[str, Any]]:
    """One, two and four replicas at loads of a half and of four fifths of what they can do, eight tenants."""
    return [
        {"replicas": count, "load": share}
        | figures(simulate(arrivals(share * count * costs.capacity(), seconds, 8), costs, count))
        for share in (0.5, 0.8)
        for count in (1, 2, 4)
    ]


def fleet_table(costs: Costs, seconds: float) -> list[dict[str, Any]]:
    """Fifty machines and a thousand tenants: routing, tenants that a machine can hold, time to take one in."""
    load = arrivals(0.8 * 50 * costs.capacity(), seconds, 1000)
    return [
        {"routing": name, "places": places, "tenant_ms": 1e3 * tenant_s}
        | figures(simulate(load, replace(costs, tenant_s=tenant_s), 50, routing, places))
        for tenant_s in (costs.tenant_s, SLOW_TENANT_S)
        for places in (16, 1000)
        for name, routing in ROUTING.items()
    ]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table as docs/serving.md has it."""
    print(f"\n{title}\n")
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row.values())} |")


def main() -> None:
    """Measure where there is a bundle, then simulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--measured", type=Path, help="a file that --output wrote, instead of a bundle")
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; as many as there are cores unless given")
    parser.add_argument("--output", type=Path, help="JSON file for the times and all figures")
    asked = parser.parse_args()
    if (asked.bundle is None) == (asked.measured is None):
        parser.error("give a bundle, or --measured with a file of an earlier run")
    found: dict[str, Any] = {}
    if asked.measured:
        found = json.loads(asked.measured.read_text(encoding="utf-8"))
        costs = Costs(**found["costs"])
    else:
        with Session.open(asked.bundle, verify=False, threads=asked.threads) as session:
            costs = measured(session)
            compared = []
            for share in (0.5, 0.8):
                load = arrivals(share * costs.capacity(), asked.seconds, max(1, len(session.tenants)))
                compared.append({"what": "session", "load": share} | figures(observe(session, load)))
                compared.append({"what": "simulated", "load": share} | figures(simulate(load, costs, 1)))
        found = {"costs": asdict(costs), "system_load": os.getloadavg()[0], "compared": compared}
    found["replicas"] = replicas_table(costs, asked.seconds)
    found["fleet"] = fleet_table(costs, asked.seconds)
    print(json.dumps(found["costs"]))
    show("One session, real and simulated", found["compared"])
    show("Replicas", found["replicas"])
    show("Fifty machines, a thousand tenants", found["fleet"])
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
