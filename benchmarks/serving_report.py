"""``docs/benchmarks.md`` from the records of `benchmarks.serving`: medians over rounds, ratios, goals, plots."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Key = tuple[str, int]
"""A case's name and its rows."""

TITLES = {
    "plain": "ours, no tenant",
    "plain-int8": "ours, no tenant, int8",
    "plain-int4": "ours, no tenant, int4",
    "iapt-8": "ours, 8 IAPT tenants",
    "iapt-64": "ours, 64 IAPT tenants",
    "iapt-narrow": "ours, 8 IAPT tenants (bottleneck 64)",
    "lora-qv": "ours, 8 LoRA tenants (rank 8, q and v)",
    "lora-all": "ours, 8 LoRA tenants (rank 16, seven projections)",
    "genai-fp32": "onnxruntime-genai, fp32",
    "genai-int4": "onnxruntime-genai, int4",
    "transformers": "transformers, eager",
    "peft-qv": "PEFT, 8 LoRA tenants (rank 8, q and v)",
    "peft-all": "PEFT, 8 LoRA tenants (rank 16, seven projections)",
    "optimum": "optimum-onnx",
}


@dataclass(frozen=True)
class Goal:
    """How much faster one case should be than another: the other's milliseconds over its own."""

    text: str
    figure: str
    """``decode`` or ``prefill``."""
    own: str
    other: str
    rows: int
    at_least: float | None
    """None where the ratio is shown without a goal."""


GOALS = (
    Goal("8 rows of 8 tenants against no tenant", "decode", "iapt-8", "plain", 8, 0.97),
    Goal("a row of a tenant against no tenant", "decode", "iapt-8", "plain", 1, None),
    Goal("8 rows of 64 installed tenants against no tenant", "decode", "iapt-64", "plain", 8, 0.97),
    Goal("against genai, fp32", "decode", "plain", "genai-fp32", 1, 1.0),
    Goal("against genai, fp32", "decode", "plain", "genai-fp32", 8, 1.1),
    Goal("against genai, int4", "decode", "plain-int4", "genai-int4", 1, 0.95),
    Goal("against genai, int4", "decode", "plain-int4", "genai-int4", 8, 0.95),
    Goal("with 8 tenants against genai without, fp32", "decode", "iapt-8", "genai-fp32", 8, None),
    Goal("against genai, fp32", "prefill", "plain", "genai-fp32", 1, 0.95),
    Goal("against genai, fp32", "prefill", "plain", "genai-fp32", 8, None),
    Goal("against LoRA of seven projections, same session", "decode", "iapt-8", "lora-all", 8, 1.3),
    Goal("against LoRA of seven projections, same session", "decode", "iapt-8", "lora-all", 1, None),
    Goal("against LoRA of q and v, same session", "decode", "iapt-8", "lora-qv", 1, None),
    Goal("against LoRA of q and v, same session", "decode", "iapt-8", "lora-qv", 8, None),
    Goal("against LoRA of q and v, same session", "prefill", "iapt-8", "lora-qv", 8, None),
    Goal("against LoRA of seven projections, same session", "prefill", "iapt-8", "lora-all", 8, 1.1),
    Goal("against PEFT's mixed batch, seven projections", "decode", "iapt-8", "peft-all", 8, 3.0),
    Goal("against PEFT's mixed batch, q and v", "decode", "iapt-8", "peft-qv", 8, None),
    Goal("IAPT's prefill against no tenant", "prefill", "iapt-8", "plain", 1, 1 / 1.05),
    Goal("IAPT's prefill against no tenant", "prefill", "iapt-8", "plain", 8, 1 / 1.05),
    Goal("with bottleneck 64", "prefill", "iapt-narrow", "plain", 1, None),
    Goal("with bottleneck 64", "prefill", "iapt-narrow", "plain", 8, None),
)


MEMORY_GOAL = 1.2
"""Peak memory beyond the runtime's own, over one copy of the weights and the cache in use."""
BATCHES = {
    "static": "static ones that rows leave when they are finished",
    "whole": "static ones whose rows stay until the last is finished, as in `generate` of transformers and genai",
}
TRACE_GOAL = 1.7
"""Throughput of continuous over that of static batches."""
FLAT_MIB = 32.0
"""How much a soak's memory may grow after its first fifth."""
ADD_GOAL_MS = 50
BY_HAND = "## What it means"
"""This heading and all after it are kept when the page is written again."""


@dataclass(frozen=True)
class Records:
    """What was measured, oldest first."""

    rounds: list[dict[str, Any]]
    traces: list[dict[str, Any]] = field(default_factory=list)
    soaks: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Records:
        """All records of a folder."""
        kinds = []
        for kind in ("round", "trace", "soak"):
            found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"{kind}-*.json")]
            kinds.append(sorted(found, key=lambda record: record["time"]))
        return cls(*kinds)


def figures_of(record: Mapping[str, Any]) -> dict[Key, dict[str, float]]:
    """A round's milliseconds of prefill and of a decode step, and MiB, by case; those that failed are left out."""
    return {
        (entry["name"], entry["job"]["rows"]): {
            "prefill": entry["prefill_ms"],
            "decode": median(entry["decode_ms"]),
            "peak": entry["peak_mib"],
            "needed": entry.get("weights_mib", 0.0) + entry.get("cache_mib", 0.0),
            "weights": entry.get("weights_mib", 0.0),
        }
        for entry in record["measured"]
        if "error" not in entry
    }


def typical(rounds: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, float]]:
    """Medians over rounds."""
    each = [figures_of(record) for record in rounds]
    keys = dict.fromkeys(key for found in each for key in found)
    return {
        key: {
            name: median(found[key][name] for found in each if key in found)
            for name in ("prefill", "decode", "peak", "needed", "weights")
        }
        for key in keys
    }


def num_rounds(rounds: Sequence[Mapping[str, Any]]) -> int:
    """How often each case was measured; cases of few and of many rows have rounds of their own."""
    counts = Counter(key for record in rounds for key in figures_of(record))
    return min(counts.values())


def ratios(rounds: Sequence[Mapping[str, Any]], goal: Goal) -> list[float]:
    """How much faster a goal's own case is, in each round that has both, sorted."""
    found = []
    for record in rounds:
        figures = figures_of(record)
        own, other = figures.get((goal.own, goal.rows)), figures.get((goal.other, goal.rows))
        if own and other:
            found.append(other[goal.figure] / own[goal.figure])
    return sorted(found)


def memory(figures: Mapping[Key, Mapping[str, float]], name: str, rows: int) -> float | None:
    """A case's peak beyond the runtime's own, over what it cannot do without; None where it was not measured."""
    own, base = figures.get((name, rows)), figures.get(("base", rows))
    return (own["peak"] - base["peak"]) / own["needed"] if own and base and own["needed"] else None


def tenant_cost(figures: Mapping[Key, Mapping[str, float]]) -> float | None:
    """Memory of a tenant more over its weights, from 8 to 64 tenants."""
    few, many = figures.get(("iapt-8", 8)), figures.get(("iapt-64", 8))
    if not few or not many:
        return None
    return (many["peak"] - few["peak"]) / (many["weights"] - few["weights"])


def failures(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What could not be measured, and why."""
    lines = {
        f"{TITLES.get(entry['name'], entry['name'])}, {entry['job']['rows']} rows: {entry['error']}"
        for record in rounds
        for entry in record["measured"]
        if "error" in entry
    }
    return sorted(lines)


def goal_lines(records: Records) -> Iterator[str]:
    """The rows of the table of goals."""

    def row(what: str, rows: str, goal: str, made: str, met: bool) -> str:
        return f"| {what} | {rows} | {goal} | {made} | {('met' if met else 'missed') if made else 'not measured'} |"

    for goal in GOALS:
        found = ratios(records.rounds, goal)
        shown = f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})" if found else ""
        what = f"{goal.figure}: {goal.text}"
        if goal.at_least is None:
            yield f"| {what} | {goal.rows} | none | {shown or 'not measured'} | |"
            continue
        met = bool(found) and median(found) >= goal.at_least
        yield row(what, str(goal.rows), f"at least {goal.at_least:.2f}", shown, met)
    figures = typical(records.rounds)
    for rows in (1, 8):
        made = memory(figures, "plain", rows)
        what = "peak memory beyond the runtime's, over weights and cache"
        shown = "" if made is None else f"{made:.2f}"
        yield row(what, str(rows), f"at most {MEMORY_GOAL}", shown, (made or 0) <= MEMORY_GOAL)
    cost = tenant_cost(figures)
    yield row("memory of one more tenant, over its weights", "8", "1", f"{cost:.2f}" if cost else "", (cost or 9) < 1.1)
    for kind, what in BATCHES.items():
        gains = sorted(
            each["continuous"]["tokens_per_s"] / each[kind]["tokens_per_s"] for each in records.traces if kind in each
        )
        shown = f"{median(gains):.2f} ({gains[0]:.2f} to {gains[-1]:.2f})" if gains else ""
        met = bool(gains) and median(gains) >= TRACE_GOAL
        yield row(f"throughput: continuous batches over {what}", "8", f"at least {TRACE_GOAL}", shown, met)
    if records.soaks:
        last = records.soaks[-1]
        shown = f"{len(last['lost'])} lost, {len(last['wrong'])} wrong, {growth(last):+.0f} MiB"
        met = not last["lost"] and not last["wrong"] and growth(last) <= FLAT_MIB
        yield row(f"soak of {last['minutes']:.0f} minutes", "8", "none lost, none wrong, flat memory", shown, met)
        for name, where in (("idle_add_ms", "to an idle session"), ("add_ms", "during the soak")):
            met = median(last[name]) <= ADD_GOAL_MS
            yield row(f"a tenant added {where}: median", "8", f"at most {ADD_GOAL_MS} ms", spread(last[name]), met)


def spread(milliseconds: Sequence[float]) -> str:
    """Median, 99th percentile and largest, in words."""
    ordered = sorted(milliseconds)
    late = ordered[math.ceil(0.99 * len(ordered)) - 1]
    middle = float(f"{median(ordered):.2g}")
    return f"{middle:g} ms in the median ({late:.0f} in the 99th percentile, {ordered[-1]:.0f} at most)"


def growth(soak: Mapping[str, Any]) -> float:
    """MiB by which a soak's memory grew after its first fifth: medians of the second and of the last fifth."""
    mib = [sample for _, sample in soak["memory_mib"]]
    fifth = max(1, len(mib) // 5)
    return median(mib[-fifth:]) - median(mib[fifth : 2 * fifth] or mib)


def lines_of(records: Records) -> Iterator[str]:
    """The page, but for what is written by hand."""
    rounds = records.rounds
    last = rounds[-1]
    job = last["measured"][0]["job"]
    forms = sorted({each["rational"] for each in rounds})
    yield "# Benchmarks"
    yield ""
    yield (
        f"SmolLM2-135M-Instruct on {job['threads']} threads of {last['cores']} cores ({last['processor']}), "
        f"{job['tokens']} instruction tokens, {job['steps']} generated tokens a row; medians of {num_rounds(rounds)} "
        f"alternating rounds, each case in a process of its own. Load of the machine: "
        f"{min(r['load'] for r in rounds):.1f} to {max(r['load'] for r in rounds):.1f}. "
        f"Form of `ai.iapt::Rational`: {', '.join(forms)}."
    )
    yield ""
    yield "`python -m benchmarks.serving all` measures it again; `--help` says what it needs."
    yield ""
    yield "## Goals"
    yield ""
    yield "Times as fast: the median over rounds of the ratio within a round, and the smallest and largest ratio."
    yield ""
    yield "| What | Rows | Goal | Measured | |"
    yield "| --- | --- | --- | --- | --- |"
    yield from goal_lines(records)
    yield ""
    yield "## Figures"
    yield ""
    yield "| Case | Rows | Prefill, ms | Decode step, ms | Decode, tokens/s | Peak memory, MiB |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (name, rows), figures in sorted(typical(rounds).items(), key=_place):
        if name != "base":
            yield (
                f"| {TITLES.get(name, name)} | {rows} | {figures['prefill']:.0f} | {figures['decode']:.1f} "
                f"| {rows / figures['decode'] * 1e3:.0f} | {figures['peak']:.0f} |"
            )
    yield ""
    yield "![Tokens a second](images/serving.png)"
    if failed := failures(rounds):
        yield ""
        yield "Not measured:"
        yield ""
        yield from (f"- {line}" for line in failed)
    yield from load_lines(records)


def load_lines(records: Records) -> Iterator[str]:
    """The sections on the trace and the soak."""
    if records.traces:
        yield ""
        yield "## Continuous and static batches"
        yield ""
        yield (
            f"{records.traces[-1]['requests']} requests of 16 to 128 instruction tokens and 4 to 256 answer tokens, "
            f"ten a second, eight rows; medians of {len(records.traces)} alternating rounds."
        )
        yield ""
        yield "| Batches | Tokens/s | Seconds to the first token | Seconds to the whole answer |"
        yield "| --- | --- | --- | --- |"
        for kind, what in {"continuous": "continuous", **BATCHES}.items():
            found = [each[kind] for each in records.traces if kind in each]
            if found:
                made = {name: median(each[name] for each in found) for name in found[0]}
                yield f"| {what} | {made['tokens_per_s']:.0f} | {made['first_token_s']:.1f} | {made['answer_s']:.1f} |"
    if records.soaks:
        last = records.soaks[-1]
        yield ""
        yield f"## {last['minutes']:.0f} minutes with tenants coming and going"
        yield ""
        yield (
            f"{last['answered']} requests answered, {len(last['lost'])} lost, {len(last['wrong'])} with another answer "
            f"than alone; {len(last['add_ms'])} tenants added, {last['removed']} removed. Memory grew by "
            f"{growth(last):.0f} MiB after the first fifth. Adding a tenant took {spread(last['idle_add_ms'])} before "
            f"there were requests, and {spread(last['add_ms'])} among them."
        )
        yield ""
        yield "![Memory during the soak](images/soak.png)"


def write_report(records: Records, path: Path) -> None:
    """Write the page, and its plots beside it; what is written by hand at the page's end stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    kept = BY_HAND + before.partition(BY_HAND)[2] if BY_HAND in before else ""
    page = "\n".join(lines_of(records)) + "\n"
    path.write_text(f"{page}\n{kept}" if kept else page, encoding="utf-8")
    (path.parent / "images").mkdir(exist_ok=True)
    plot(typical(records.rounds), path.parent / "images" / "serving.png")
    if records.soaks:
        plot_soak(records.soaks[-1], path.parent / "images" / "soak.png")


def plot_soak(soak: Mapping[str, Any], path: Path) -> None:
    """Resident memory over minutes."""
    import matplotlib
    from matplotlib.figure import Figure

    from benchmarks.quality_plots import OWN, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.6))
        axes = figure.subplots()
        axes.plot([s / 60 for s, _ in soak["memory_mib"]], [mib for _, mib in soak["memory_mib"]], color=OWN)
        axes.set_ylim(0, 1.1 * max(mib for _, mib in soak["memory_mib"]))
        axes.set_xlabel("minutes")
        axes.set_ylabel("MiB resident")
        figure.savefig(path, metadata={"Software": None})


def plot(figures: Mapping[Key, Mapping[str, float]], path: Path) -> None:
    """Tokens a second of decode steps, a panel for each number of rows."""
    import matplotlib
    from matplotlib.figure import Figure

    from benchmarks.quality_plots import OTHER, OWN, STYLE

    sizes = sorted({rows for _, rows in figures})
    names = [name for name in TITLES if any((name, rows) in figures for rows in sizes)][::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.32 * len(names) + 1.2))
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for axes, rows in zip(panels, sizes, strict=True):
            speeds = [rows / figures[name, rows]["decode"] * 1e3 if (name, rows) in figures else 0 for name in names]
            colours = [OWN if TITLES[name].startswith("ours") else OTHER for name in names]
            axes.barh([TITLES[name] for name in names], speeds, color=colours)
            axes.set_title(f"{rows} row{'s' if rows > 1 else ''}")
            axes.set_xlabel("tokens a second")
        figure.savefig(path, metadata={"Software": None})


def _place(item: tuple[Key, Any]) -> tuple[int, int]:
    (name, rows), _ = item
    return rows, list(TITLES).index(name) if name in TITLES else len(TITLES)
