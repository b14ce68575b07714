"""``docs/benchmarks.md`` from the records of `benchmarks.serving`: medians over rounds, ratios, goals, plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    at_least: float


GOALS = (
    Goal("8 rows of 8 tenants against no tenant", "decode", "iapt-8", "plain", 8, 0.97),
    Goal("8 rows of 64 installed tenants against no tenant", "decode", "iapt-64", "plain", 8, 0.97),
    Goal("against genai, fp32", "decode", "plain", "genai-fp32", 1, 1.0),
    Goal("against genai, fp32", "decode", "plain", "genai-fp32", 8, 1.1),
    Goal("against genai, int4", "decode", "plain-int4", "genai-int4", 1, 0.95),
    Goal("against genai, int4", "decode", "plain-int4", "genai-int4", 8, 0.95),
    Goal("against genai, fp32", "prefill", "plain", "genai-fp32", 1, 0.95),
    Goal("against LoRA of seven projections, same session", "decode", "iapt-8", "lora-all", 8, 1.3),
    Goal("against LoRA of seven projections, same session", "prefill", "iapt-8", "lora-all", 8, 1.1),
    Goal("against PEFT's mixed batch, seven projections", "decode", "iapt-8", "peft-all", 8, 3.0),
    Goal("IAPT's prefill against no tenant", "prefill", "iapt-8", "plain", 1, 1 / 1.05),
)


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """All records, oldest first."""
    rounds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("round-*.json"))]
    return sorted(rounds, key=lambda record: record["time"])


def figures_of(record: Mapping[str, Any]) -> dict[Key, dict[str, float]]:
    """A round's milliseconds of prefill and of a decode step, and MiB, by case; those that failed are left out."""
    return {
        (entry["name"], entry["job"]["rows"]): {
            "prefill": entry["prefill_ms"],
            "decode": median(entry["decode_ms"]),
            "peak": entry["peak_mib"],
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
            name: median(found[key][name] for found in each if key in found) for name in ("prefill", "decode", "peak")
        }
        for key in keys
    }


def ratio(rounds: Sequence[Mapping[str, Any]], goal: Goal) -> float | None:
    """The median over rounds of how much faster a goal's own case is; None where no round has both."""
    found = []
    for record in rounds:
        figures = figures_of(record)
        own, other = figures.get((goal.own, goal.rows)), figures.get((goal.other, goal.rows))
        if own and other:
            found.append(other[goal.figure] / own[goal.figure])
    return median(found) if found else None


def failures(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What could not be measured, and why."""
    lines = {
        f"{TITLES.get(entry['name'], entry['name'])}, {entry['job']['rows']} rows: {entry['error']}"
        for record in rounds
        for entry in record["measured"]
        if "error" in entry
    }
    return sorted(lines)


def lines_of(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The page."""
    last = rounds[-1]
    job = last["measured"][0]["job"]
    yield "# Benchmarks"
    yield ""
    yield (
        f"SmolLM2-135M-Instruct on {job['threads']} threads of {last['cores']} cores ({last['processor']}), "
        f"{job['tokens']} instruction tokens, {job['steps']} generated tokens a row; medians of {len(rounds)} "
        f"alternating rounds, each case in a process of its own. Load of the machine: "
        f"{min(r['load'] for r in rounds):.1f} to {max(r['load'] for r in rounds):.1f}."
    )
    yield ""
    yield "`python -m benchmarks.serving prepare`, `run` and `report` measure it again; `--help` says what each needs."
    yield ""
    yield "## Goals"
    yield ""
    yield "Times as fast, by the median over rounds of the ratio within a round."
    yield ""
    yield "| What | Rows | Goal | Measured | |"
    yield "| --- | --- | --- | --- | --- |"
    for goal in GOALS:
        made = ratio(rounds, goal)
        verdict = "not measured" if made is None else "met" if made >= goal.at_least else "missed"
        shown = "" if made is None else f"{made:.2f}"
        yield f"| {goal.figure}: {goal.text} | {goal.rows} | {goal.at_least:.2f} | {shown} | {verdict} |"
    yield ""
    yield "## Figures"
    yield ""
    yield "| Case | Rows | Prefill, ms | Decode step, ms | Decode, tokens/s | Peak memory, MiB |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (name, rows), figures in sorted(typical(rounds).items(), key=_place):
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


def write_report(rounds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page, and its plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines_of(rounds)) + "\n", encoding="utf-8")
    (path.parent / "images").mkdir(exist_ok=True)
    plot(typical(rounds), path.parent / "images" / "serving.png")


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
