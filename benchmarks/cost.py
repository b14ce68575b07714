"""What answers cost with IAPT's and with LoRA's tenants, and from how many tokens on IAPT is the cheaper one.

IAPT's generators are paid for once an answer, while the instruction is read, which is anew for each request; LoRA's
matrices in every step. A batch of rows, each of another tenant, is read and answered; what it costs for answers of A
tokens is ``read + sum of A steps``, and a step takes longer with the entries before it, as a line through those
that were measured. Sessions of all kinds are open in one process and take turns.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import INK, brief, figure
from engines.serving.scheduler import READ_TOKENS
from engines.serving.session import Session
from engines.serving.stepper import Instruction, Stepper

PREFIX = "cost-"
"""Begins the names of the bundles."""
PLAIN, IAPT = "plain", "iapt"
LORAS = {"lora-equal": "LoRA of as many parameters (rank 6, q and v)", "lora-all": "LoRA (rank 16, seven projections)"}
TITLES = {PLAIN: "no tenant", **LORAS}
LENGTHS = (32, 64, 128, 256, 512)
ANSWERS = (8, 32, 128, 512)
ROWS = (1, 8)
STEPS = 8
Batch = Mapping[str, float]
"""``read_ms`` and ``step_ms`` of all rows together."""


def measured(stepper: Stepper, tenants: Sequence[str], rows: int, length: int, seed: int) -> Batch:
    """Read ``rows`` instructions of ``length`` tokens, as many at once as a scheduler reads, and take some steps."""
    random = np.random.default_rng(seed)
    size = stepper.manifest.backbone.vocab_size
    asked = [
        Instruction(stepper.bank.get(tenants[row % len(tenants)]), tuple(random.integers(8, size, length).tolist()))
        for row in range(rows)
    ]
    at_once = max(1, READ_TOKENS // length)
    begun = time.perf_counter()
    for first in range(0, rows, at_once):
        stepper.read(asked[first : first + at_once])
    read = time.perf_counter() - begun
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        stepper.step([8] * rows)
        times.append(time.perf_counter() - begun)
    while stepper.num_rows:
        stepper.leave(stepper.num_rows - 1)
    return {"read_ms": brief(1e3 * read), "step_ms": brief(1e3 * statistics.median(times))}


def compare_costs(
    bundles: Mapping[str, Path],
    rounds: int,
    threads: int | None,
    rows: Sequence[int] = ROWS,
    lengths: Sequence[int] = LENGTHS,
) -> Iterator[dict[str, Any]]:
    """Measure every kind by turns; a record for each round and number of rows.

    Args:
        bundles: by the names of kinds; room for the most rows, the longest instruction and some steps.
        rounds: how often.
        threads: that compute; None for as many as there are cores.
        rows: of a batch.
        lengths: of the instructions.
    """
    opened: dict[str, Any] = {"verify": False, "allow_unproven": True, "threads": threads}
    with contextlib.ExitStack() as stack:
        sessions = {name: stack.enter_context(Session.open(path, **opened)) for name, path in bundles.items()}
        for session in sessions.values():  # what the first call does is done once
            measured(session.stepper, session.tenants or [""], max(rows), min(lengths), 0)
        for number in range(rounds):
            for count in rows:
                found: dict[str, dict[str, Batch]] = {name: {} for name in sessions}
                for length in lengths:
                    for name in list(sessions)[:: (1, -1)[number % 2]]:
                        session = sessions[name]
                        names = session.tenants or [""]
                        found[name][str(length)] = measured(session.stepper, names, count, length, number)
                yield {"rows": count, "kinds": found}


def cost_ms(batches: Mapping[str, Batch], length: int, answer: int) -> float:
    """What an instruction and an answer cost, of one round's measurements by length."""
    lengths = np.array([int(each) for each in batches], dtype=float)
    slope, start = np.polyfit(lengths, [batch["step_ms"] for batch in batches.values()], 1)
    steps = answer * (start + max(slope, 0.0) * (length + answer / 2))
    return float(batches[str(length)]["read_ms"] + steps)


def times_cheaper(records: Sequence[Mapping[str, Any]], other: str, rows: int, length: int, answer: int) -> float:
    """What another kind costs over what IAPT costs: the median of the rounds."""
    kinds = [record["kinds"] for record in records if record["rows"] == rows]
    return statistics.median(cost_ms(of[other], length, answer) / cost_ms(of[IAPT], length, answer) for of in kinds)


def break_even(
    records: Sequence[Mapping[str, Any]], other: str, rows: int, length: int, most: int = 4096
) -> int | None:
    """The fewest tokens of an answer with which IAPT costs no more than another kind; None where ``most`` do not do."""
    low, high = 1, most
    if times_cheaper(records, other, rows, length, high) < 1:
        return None
    while low < high:  # LoRA's steps cost more and its reading less, so that the ratio rises with the answer
        middle = (low + high) // 2
        low, high = (low, middle) if times_cheaper(records, other, rows, length, middle) >= 1 else (middle + 1, high)
    return low


def cost_rows(records: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """A row for each other kind, number of rows and length of instructions."""
    for other, title in TITLES.items():
        for rows in ROWS:
            for length in LENGTHS if any(record["rows"] == rows for record in records) else ():
                even = break_even(records, other, rows, length) if other != PLAIN else None
                ratios = [f"{times_cheaper(records, other, rows, length, answer):.2f}" for answer in ANSWERS]
                yield [title, str(rows), str(length), "none" if even is None else str(even), *ratios]


def cost_head() -> list[str]:
    """Above the columns of `cost_rows`."""
    return [
        "IAPT against",
        "Rows",
        "Instruction, tokens",
        "Break-even, tokens",
        *(f"{answer} tokens" for answer in ANSWERS),
    ]


def draw_costs(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How many times cheaper IAPT is, over lengths of instructions and answers; a line where both cost the same."""
    answers = np.unique(np.geomspace(8, 512, 25).round().astype(int))
    with figure(path, (9, 6), len(LORAS), len(ROWS), sharex=True, sharey=True) as panels:
        for line, (other, title) in zip(panels, LORAS.items(), strict=True):
            for axes, rows in zip(line, ROWS, strict=True):
                ratio = [[times_cheaper(records, other, rows, length, int(n)) for length in LENGTHS] for n in answers]
                drawn = axes.contourf(
                    LENGTHS, answers, ratio, levels=[0.5, *np.arange(0.8, 1.21, 0.05), 1.5, 2, 2.5], cmap="PuOr_r",
                    norm=_centred(), extend="both",
                )  # fmt: skip
                axes.contour(LENGTHS, answers, ratio, levels=[1.0], colors=INK, linewidths=1.5)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
                axes.set_yticks([8, 32, 128, 512], ["8", "32", "128", "512"])
                axes.set_title(f"{title},\n{rows} row{'s' * (rows > 1)}")
        for axes in panels[-1]:
            axes.set_xlabel("tokens of the instruction")
        for line in panels:
            line[0].set_ylabel("tokens of the answer")
        panels[0][0].figure.colorbar(drawn, ax=panels, label="cost of LoRA over that of IAPT; the line is 1")


def _centred() -> Any:
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(1.0, 0.75, 2.0)
