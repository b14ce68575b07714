"""How long rows that decode wait for instructions that are read: beside them, and at once, by turns in one run.

    python -m benchmarks.reading BUNDLE

Eight rows decode, and instructions of 512 tokens come twice a second, whose answers have one token. Each round measures
both ways, one after the other, over the same work: so many tokens of the eight, so many instructions. Times between two
tokens are those of the eight rows until the last instruction has been read; throughput is the work over the time until
all is finished, and over the processor time. The bundle must take nine rows or more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.session import Generation, Request, Session

ROWS = 8


class Listener:
    """When each token of a row came."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.times: list[float] = []
        generation.listen(lambda: self.times.append(time.perf_counter()))


def measure(bundle: Path, asked: argparse.Namespace, *, beside: bool) -> dict[str, float]:
    """One way of reading, in a session of its own."""
    random = np.random.default_rng(0)
    with Session.open(bundle, verify=False, allow_unproven=True, threads=asked.threads) as session:
        stepper = session.stepper
        if not isinstance(stepper, InPlaceStepper) or not stepper.reads_beside or stepper.max_rows <= ROWS:
            raise SystemExit("expected a bundle whose cache is written in place, with nine rows or more, on the CPU")
        if not beside:
            stepper._beside = None  # as on a GPU: the thread that steps also reads
        names, size = session.tenants, session.manifest.backbone.vocab_size

        def instruction(tokens: int, answer: int, number: int) -> Request:
            ids = tuple(random.integers(8, size, tokens).tolist())
            return Request(names[number % len(names)], tokens=ids, max_new_tokens=answer, ignore_eos=True)

        session.submit(instruction(asked.instruction, 2, 0)).result()
        talkers = [Listener(session.submit(instruction(16, asked.answer, number))) for number in range(ROWS)]
        while not all(each.times for each in talkers):
            time.sleep(0.01)
        start, used = time.perf_counter(), time.process_time()
        readers = []
        for number in range(asked.instructions):
            time.sleep(max(0.0, start + number * asked.every - time.perf_counter()))
            readers.append(Listener(session.submit(instruction(asked.instruction, 1, number))))
        for each in (*readers, *talkers):
            each.generation.result()
        passed, used = time.perf_counter() - start, time.process_time() - used
        return figures(talkers, readers, start, {"seconds": passed, "processor_seconds": used})


def figures(
    talkers: list[Listener], readers: list[Listener], start: float, spent: dict[str, float]
) -> dict[str, float]:
    """What was seen from a moment on, until all was finished."""
    last = max(each.times[0] for each in readers)
    inside = [np.array([moment for moment in each.times if start <= moment <= last]) for each in talkers]
    gaps = 1000 * np.concatenate([np.diff(times) for times in inside])
    times = [each.generation.times for each in readers]
    firsts = [1000 * (each.first_token - each.submitted) for each in times if each.first_token]
    return {
        "gap_p50_ms": float(np.percentile(gaps, 50)),
        "gap_p99_ms": float(np.percentile(gaps, 99)),
        "gap_max_ms": float(gaps.max()),
        "first_token_p50_ms": statistics.median(firsts),
        **spent,
    }


def main() -> None:
    """Measure round after round, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--instruction", type=int, default=512, help="tokens of each")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two")
    parser.add_argument("--instructions", type=int, default=20, help="how many come")
    parser.add_argument("--answer", type=int, default=400, help="tokens of each of the eight rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; as many as there are cores unless given")
    asked = parser.parse_args()
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(asked.rounds):
        order = (False, True) if number % 2 == 0 else (True, False)
        found: dict[bool, Any] = {way: measure(asked.bundle, asked, beside=way) for way in order}
        rounds.append((found[False], found[True]))
        print(number, json.dumps({"at once": found[False], "beside": found[True]}), file=sys.stderr, flush=True)
    print(f"instructions of {asked.instruction} tokens every {asked.every} s, load {os.getloadavg()[0]:.1f}")
    print("| | at once | beside | beside over at once in each round |\n| --- | --- | --- | --- |")
    for name in rounds[0][0]:
        before, after = (statistics.median(each[way][name] for each in rounds) for way in (0, 1))
        ratios = ", ".join(f"{each[1][name] / each[0][name]:.2f}" for each in rounds)
        print(f"| {name} | {before:.1f} | {after:.1f} | {ratios} |")
    sys.stdout.flush()
    assert threading.active_count() < 3, "a session left a thread behind"


if __name__ == "__main__":
    main()
