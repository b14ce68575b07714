"""The tables and plots of ``docs/benchmarks.md``, from the records of `benchmarks.serving`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.pages import OTHER, OWN, figure, table

Records = Sequence[Mapping[str, Any]]
Figures = Mapping[str, float]
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
BATCHES = {
    "continuous": "continuous",
    "static": "static ones that rows leave when they are finished",
    "whole": "static ones whose rows stay until the last is finished, as in `generate` of transformers and genai",
}


class Goal(NamedTuple):
    """How much faster one case should be than another: the other's milliseconds over its own."""

    text: str
    figure: str
    """``decode`` or ``prefill``."""
    own: str
    other: str
    rows: int
    at_least: float | None = None
    """None where the ratio is shown without a goal."""


GOALS = (
    Goal("8 rows of 8 tenants against no tenant", "decode", "iapt-8", "plain", 8, 0.97),
    Goal("a row of a tenant against no tenant", "decode", "iapt-8", "plain", 1),
    Goal("8 rows of 64 installed tenants against no tenant", "decode", "iapt-64", "plain", 8, 0.97),
    Goal("against genai, fp32", "decode", "plain", "genai-fp32", 1, 1.0),
    Goal("against genai, fp32", "decode", "plain", "genai-fp32", 8, 1.1),
    Goal("against genai, int4", "decode", "plain-int4", "genai-int4", 1, 0.95),
    Goal("against genai, int4", "decode", "plain-int4", "genai-int4", 8, 0.95),
    Goal("with 8 tenants against genai without, fp32", "decode", "iapt-8", "genai-fp32", 8),
    Goal("against genai, fp32", "prefill", "plain", "genai-fp32", 1, 0.95),
    Goal("against genai, fp32", "prefill", "plain", "genai-fp32", 8),
    Goal("against LoRA of seven projections, same session", "decode", "iapt-8", "lora-all", 8, 1.3),
    Goal("against LoRA of seven projections, same session", "decode", "iapt-8", "lora-all", 1),
    Goal("against LoRA of q and v, same session", "decode", "iapt-8", "lora-qv", 1),
    Goal("against LoRA of q and v, same session", "decode", "iapt-8", "lora-qv", 8),
    Goal("against LoRA of q and v, same session", "prefill", "iapt-8", "lora-qv", 8),
    Goal("against LoRA of seven projections, same session", "prefill", "iapt-8", "lora-all", 8, 1.1),
    Goal("against PEFT's mixed batch, seven projections", "decode", "iapt-8", "peft-all", 8, 3.0),
    Goal("against PEFT's mixed batch, q and v", "decode", "iapt-8", "peft-qv", 8),
    Goal("IAPT's prefill against no tenant", "prefill", "iapt-8", "plain", 1, 1 / 1.05),
    Goal("IAPT's prefill against no tenant", "prefill", "iapt-8", "plain", 8, 1 / 1.05),
    Goal("with bottleneck 64", "prefill", "iapt-narrow", "plain", 1),
    Goal("with bottleneck 64", "prefill", "iapt-narrow", "plain", 8),
)
MEMORY_GOAL = 1.2
"""Peak memory beyond the runtime's own, over one copy of the weights and the cache in use."""
TENANT_GOAL = 1.1
"""Memory of a tenant more over its weights."""
TRACE_GOAL = 1.7
"""Throughput of continuous over that of static batches."""
FLAT_MIB = 32.0
"""How much a soak's memory may grow after its first fifth."""
ADD_GOAL_MS = 50


def of(records: Records, kind: str) -> list[Mapping[str, Any]]:
    """The records of a kind, oldest first."""
    return [record for record in records if record["kind"] == kind]


def measured(records: Records, name: str, rows: int) -> list[Figures]:
    """A case's figures, a round each, in order; an empty one where it failed or was left out."""
    cases = [record["cases"].get(name, {}) for record in of(records, "round") if record["rows"] == rows]
    return [{} if "error" in case else case for case in cases]


def typical(records: Records, name: str, rows: int) -> Figures:
    """Medians over rounds; empty where the case was not measured."""
    found = [figures for figures in measured(records, name, rows) if figures]
    return {key: median(figures[key] for figures in found) for key in found[0]} if found else {}


def ratios(records: Records, goal: Goal) -> list[float]:
    """How much faster a goal's own case is, in each round that has both, sorted."""
    key = f"{goal.figure}_ms"
    pairs = zip(measured(records, goal.own, goal.rows), measured(records, goal.other, goal.rows), strict=True)
    return sorted(other[key] / own[key] for own, other in pairs if own and other)


def memory(records: Records, rows: int) -> float:
    """The plain backbone's peak beyond the runtime's own, over what it cannot do without; NaN if not measured."""
    own, base = typical(records, "plain", rows), typical(records, "base", rows)
    return (own["peak_mib"] - base["peak_mib"]) / (own["weights_mib"] + own["cache_mib"]) if own and base else NAN


def tenant_cost(records: Records) -> float:
    """Memory of a tenant more over its weights, from 8 to 64 tenants; NaN if not measured."""
    few, many = typical(records, "iapt-8", 8), typical(records, "iapt-64", 8)
    if not few or not many:
        return NAN
    return (many["peak_mib"] - few["peak_mib"]) / (many["weights_mib"] - few["weights_mib"])


NAN = float("nan")


def goal_rows(records: Records) -> Iterator[list[str]]:
    """What was measured beside what was wanted."""

    def row(what: str, rows: int, goal: str, shown: str, is_met: bool | None) -> list[str]:
        verdict = "" if is_met is None else "met" if is_met else "missed"
        return [what, str(rows), goal, shown, verdict] if shown else [what, str(rows), goal, "not measured", ""]

    def ratio(what: str, rows: int, at_least: float | None, found: Sequence[float], digits: int = 2) -> list[str]:
        shown = f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""
        if at_least is None:
            return row(what, rows, "none", shown, None)
        return row(what, rows, f"at least {at_least:.{digits}f}", shown, bool(found) and median(found) >= at_least)

    for goal in GOALS:
        yield ratio(f"{goal.figure}: {goal.text}", goal.rows, goal.at_least, ratios(records, goal))
    for rows in (1, 8):
        made, what = memory(records, rows), "peak memory beyond the runtime's, over weights and cache"
        yield row(what, rows, f"at most {MEMORY_GOAL}", f"{made:.2f}" if made == made else "", made <= MEMORY_GOAL)
    cost = tenant_cost(records)
    shown = f"{cost:.2f}" if cost == cost else ""
    yield row("memory of one more tenant, over its weights", 8, f"at most {TENANT_GOAL}", shown, cost <= TENANT_GOAL)
    batches = [record["batches"] for record in of(records, "trace")]
    for kind in ("static", "whole"):
        gains = [each["continuous"]["tokens_per_s"] / each[kind]["tokens_per_s"] for each in batches]
        yield ratio(f"throughput: continuous batches over {BATCHES[kind]}", 8, TRACE_GOAL, gains, 1)
    for soak in of(records, "soak")[-1:]:
        wrong, lost, grown = len(soak["wrong"]), len(soak["lost"]), growth(soak)
        shown = f"{lost} lost, {wrong} wrong, {grown:+.0f} MiB"
        is_met = not wrong and not lost and grown <= FLAT_MIB
        yield row(f"soak of {soak['minutes']:.0f} minutes", 8, "none lost, none wrong, flat memory", shown, is_met)
        for name, where in (("idle_add_ms", "to an idle session"), ("add_ms", "during the soak")):
            late = soak[name]
            shown = f"{late['median']:.1f} ms ({late['p99']:.0f} in the 99th percentile, {late['largest']:.0f} at most)"
            is_met = late["median"] <= ADD_GOAL_MS
            yield row(f"a tenant added {where}: median", 8, f"at most {ADD_GOAL_MS} ms", shown, is_met)


def growth(soak: Mapping[str, Any]) -> float:
    """MiB by which a soak's memory grew after its first fifth: medians of the second and of the last fifth."""
    mib = [sample for _, sample in soak["memory_mib"]]
    fifth = max(1, len(mib) // 5)
    return median(mib[-fifth:]) - median(mib[fifth : 2 * fifth] or mib)


def case_rows(records: Records) -> Iterator[list[str]]:
    """The figures of every case, or why there are none."""
    for rows in sorted({record["rows"] for record in of(records, "round")}):
        for name, title in TITLES.items():
            found = typical(records, name, rows)
            if found:
                times = (f"{found['prefill_ms']:.0f}", f"{found['decode_ms']:.1f}")
                yield [title, str(rows), *times, f"{rows / found['decode_ms'] * 1e3:.0f}", f"{found['peak_mib']:.0f}"]
            else:
                cases = [record["cases"].get(name, {}) for record in of(records, "round") if record["rows"] == rows]
                errors = [case["error"] for case in cases if "error" in case]
                yield [title, str(rows), *(errors[-1:] or ["not measured"]), "", "", ""]


def tables(records: Records) -> dict[str, str]:
    """All tables by name."""
    batches = [record["batches"] for record in of(records, "trace")]
    lines = []
    for kind, what in BATCHES.items() if batches else ():
        made = {name: median(each[kind][name] for each in batches) for name in batches[0][kind]}
        lines.append([what, f"{made['tokens_per_s']:.0f}", f"{made['first_token_s']:.1f}", f"{made['answer_s']:.1f}"])
    head = ["Case", "Rows", "Prefill, ms", "Decode step, ms", "Decode, tokens/s", "Peak memory, MiB"]
    return {
        "goals": table(["What", "Rows", "Goal", "Measured", ""], list(goal_rows(records))),
        "cases": table(head, list(case_rows(records))),
        "batches": table(["Batches", "Tokens/s", "Seconds to the first token", "Seconds to the whole answer"], lines),
    }


def draw(records: Records, folder: Path) -> None:
    """Tokens a second of decode steps, a panel for each number of rows; and a soak's memory over minutes."""
    sizes = sorted({record["rows"] for record in of(records, "round")})
    speeds = {
        (name, rows): rows / found["decode_ms"] * 1e3
        for name in TITLES
        for rows in sizes
        if (found := typical(records, name, rows))
    }
    names = [name for name in TITLES if any((name, rows) in speeds for rows in sizes)][::-1]
    size = (10, 0.32 * len(names) + 1.2)
    with figure(folder / "serving.png", size, 1, len(sizes), sharey=True) as (panels,):
        for axes, rows in zip(panels, sizes, strict=True):
            colours = [OWN if TITLES[name].startswith("ours") else OTHER for name in names]
            axes.barh([TITLES[name] for name in names], [speeds.get((name, rows), 0) for name in names], color=colours)
            axes.set_title(f"{rows} row{'s' if rows > 1 else ''}")
            axes.set_xlabel("tokens a second")
    for soak in of(records, "soak")[-1:]:
        seconds, mib = zip(*soak["memory_mib"], strict=True)
        with figure(folder / "soak.png", (10, 2.6)) as ((axes,),):
            axes.plot([second / 60 for second in seconds], mib, color=OWN)
            axes.set_ylim(0, 1.1 * max(mib))
            axes.set_xlabel("minutes")
            axes.set_ylabel("MiB resident")
