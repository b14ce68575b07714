"""The tables and plots of ``docs/benchmarks.md``, from the records of `benchmarks.serving`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.cost import cost_head, cost_rows
from benchmarks.pages import OTHER, OWN, figure, table
from benchmarks.serving_bundles import BUNDLES
from iapt_export.contract.low_bits import in_words

Records = Sequence[Mapping[str, Any]]
Figures = Mapping[str, float]
TITLES = {
    "plain": "ours, no tenant",
    "plain-int8": "ours, no tenant, int8",
    "plain-int4": "ours, no tenant, int4",
    "plain-int4-64": "ours, no tenant, int4 with `--quantise block=64`",
    "plain-int4-64-cache": "ours, no tenant, int4 with `--quantise block=64,cache=8`",
    "plain-int4-all": "ours, no tenant, int4 with `--quantise block=64,head=4,narrow=4`",
    "iapt-8": "ours, 8 IAPT tenants",
    "iapt-8-int4": "ours, 8 IAPT tenants, int4 with `block=64`",
    "iapt-64": "ours, 64 IAPT tenants",
    "iapt-narrow": "ours, 8 IAPT tenants (bottleneck 64)",
    "lora-qv": "ours, 8 LoRA tenants (rank 8, q and v)",
    "lora-all": "ours, 8 LoRA tenants (rank 16, seven projections)",
    "genai-fp32": "onnxruntime-genai, fp32",
    "genai-int4": "onnxruntime-genai, int4",
    "llama-q4_0": "llama.cpp, Q4_0",
    "llama-q4_1": "llama.cpp, Q4_1",
    "llama-q8_0": "llama.cpp, Q8_0",
    "openvino-q4_0": "OpenVINO GenAI, Q4_0",
    "openvino-q4_1": "OpenVINO GenAI, Q4_1",
    "openvino-q8_0": "OpenVINO GenAI, Q8_0",
    "transformers": "transformers, eager",
    "peft-qv": "PEFT, 8 LoRA tenants (rank 8, q and v)",
    "peft-all": "PEFT, 8 LoRA tenants (rank 16, seven projections)",
    "optimum": "optimum-onnx",
}
PEERS_DRAWN = ("genai-fp32", "genai-int4", "llama-q4_0", "llama-q4_1", "llama-q8_0", "openvino-q4_0", "openvino-q8_0")
"""In the plot of speed and accuracy."""
DRAFT_TASKS = {"copying": "answers that copy", "other": "other answers"}
BATCHES = {
    "continuous": "continuous",
    "static": "static ones that rows leave when they are finished",
    "whole": "static ones whose rows stay until the last is finished, as in `generate` of transformers and genai",
}


class Goal(NamedTuple):
    """How much faster one case should be than another: the other's milliseconds over its own."""

    figure: str
    """``decode`` or ``prefill``."""
    text: str
    own: str
    other: str
    one: float | None = None
    """At least so much with one row; None where the ratio is shown without a goal."""
    eight: float | None = None
    """The same with eight rows."""


GOALS = (
    Goal("decode", "8 tenants against no tenant", "iapt-8", "plain", None, 0.98),
    Goal("decode", "64 installed tenants against no tenant", "iapt-64", "plain", None, 0.97),
    Goal("decode", "against genai, fp32", "plain", "genai-fp32", 1.02, 1.1),
    Goal("decode", "against genai, int4", "plain-int4-64", "genai-int4", 1.3, 1.3),
    Goal("decode", "against genai, int4 with its own settings", "plain-int4", "genai-int4"),
    Goal("decode", "against genai, int4 with `block=64,head=4,narrow=4`", "plain-int4-all", "genai-int4"),
    Goal("decode", "with 8 tenants against genai without, fp32", "iapt-8", "genai-fp32"),
    Goal("decode", "with 8 tenants against none, int4", "iapt-8-int4", "plain-int4-64"),
    Goal("decode", "against llama.cpp's Q4_0, int4", "plain-int4-64", "llama-q4_0", 1.6, 2.5),
    Goal("decode", "against llama.cpp's Q4_1, int4", "plain-int4-64", "llama-q4_1", 1.6, 2.5),
    Goal("decode", "against llama.cpp's Q8_0, int8", "plain-int8", "llama-q8_0", 1.2, 1.2),
    Goal("decode", "against OpenVINO GenAI's Q4_0, int4", "plain-int4-64", "openvino-q4_0"),
    Goal("decode", "against OpenVINO GenAI's Q8_0, int8", "plain-int8", "openvino-q8_0", 1.2, 1.2),
    Goal("decode", "against LoRA of seven projections, same session", "iapt-8", "lora-all", None, 1.3),
    Goal("decode", "against LoRA of q and v, same session", "iapt-8", "lora-qv"),
    Goal("decode", "against PEFT's mixed batch, seven projections", "iapt-8", "peft-all", None, 3.0),
    Goal("decode", "against PEFT's mixed batch, q and v", "iapt-8", "peft-qv"),
    Goal("prefill", "against genai, fp32", "plain", "genai-fp32", 0.95),
    Goal("prefill", "8 tenants against no tenant", "iapt-8", "plain", 0.96, 0.96),
    Goal("prefill", "the same with bottleneck 64", "iapt-narrow", "plain"),
    Goal("prefill", "against LoRA of seven projections, same session", "iapt-8", "lora-all", None, 1.1),
    Goal("prefill", "against LoRA of q and v, same session", "iapt-8", "lora-qv"),
)
MEMORY_GOAL = 1.05
"""Peak memory beyond the runtime's own, over one copy of the weights and the cache in use."""
TENANT_GOAL = 1.1
"""Memory of a tenant more over its weights."""
TRACE_GOAL = 1.7
"""Throughput of continuous over that of static batches."""
FLAT_MIB = 32.0
"""How much a soak's memory may grow after its first fifth."""
ADD_GOAL_MS = 50
VERDICT = {True: "met", False: "missed"}


def of(records: Records, kind: str) -> list[Mapping[str, Any]]:
    """The records of a kind, oldest first."""
    return [record for record in records if record["kind"] == kind]


def cases(records: Records, name: str, rows: int) -> list[Figures]:
    """A case's figures, a round each, in order; empty ones where it failed or was left out."""
    found = [record["cases"].get(name, {}) for record in of(records, "round") if record["rows"] == rows]
    return [{} if "error" in case else case for case in found]


def typical(records: Records, name: str, rows: int) -> Figures:
    """Medians over rounds; empty where the case was not measured."""
    found = [figures for figures in cases(records, name, rows) if figures]
    return {key: median(figures[key] for figures in found) for key in found[0]} if found else {}


def ratios(records: Records, goal: Goal, rows: int) -> list[float]:
    """How much faster a goal's own case is, in each round that has both."""
    pairs = zip(cases(records, goal.own, rows), cases(records, goal.other, rows), strict=True)
    return [other[f"{goal.figure}_ms"] / own[f"{goal.figure}_ms"] for own, other in pairs if own and other]


def memory(records: Records, rows: int) -> list[float]:
    """The plain backbone's peak beyond the runtime's own, over what it cannot do without; empty if not measured."""
    own, base = typical(records, "plain", rows), typical(records, "base", rows)
    return [(own["peak_mib"] - base["peak_mib"]) / (own["weights_mib"] + own["cache_mib"])] if own and base else []


def tenant_cost(records: Records) -> list[float]:
    """Memory of a tenant more over its weights, from 8 to 64 tenants; empty if not measured."""
    few, many = typical(records, "iapt-8", 8), typical(records, "iapt-64", 8)
    gain = {key: many[key] - few[key] for key in ("peak_mib", "weights_mib")} if few and many else {}
    return [gain["peak_mib"] / gain["weights_mib"]] if gain else []


def goal_rows(records: Records) -> Iterator[list[str]]:
    """What was measured beside what was wanted."""

    def least(what: str, rows: int, limit: float | None, found: Sequence[float]) -> list[str]:
        if not found:
            return [what, str(rows), "none" if limit is None else f"at least {limit:.2f}", "not measured", ""]
        shown = f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        if limit is None:
            return [what, str(rows), "none", shown, ""]
        return [what, str(rows), f"at least {limit:.2f}", shown, VERDICT[median(found) >= limit]]

    def most(what: str, rows: int, limit: float, found: Sequence[float]) -> list[str]:
        shown, verdict = (f"{found[0]:.2f}", VERDICT[found[0] <= limit]) if found else ("not measured", "")
        return [what, str(rows), f"at most {limit}", shown, verdict]

    for goal in GOALS:
        for rows, limit in ((1, goal.one), (8, goal.eight)):
            yield least(f"{goal.figure}: {goal.text}", rows, limit, ratios(records, goal, rows))
    for rows in (1, 8):
        what = "peak memory beyond the runtime's, over weights and cache"
        yield most(what, rows, MEMORY_GOAL, memory(records, rows))
    yield most("memory of one more tenant, over its weights", 8, TENANT_GOAL, tenant_cost(records))
    for kind in ("static", "whole"):
        batches = [record["batches"] for record in of(records, "trace")]
        gains = [each["continuous"]["tokens_per_s"] / each[kind]["tokens_per_s"] for each in batches]
        yield least(f"throughput: continuous batches over {BATCHES[kind]}", 8, TRACE_GOAL, gains)
    for soak in of(records, "soak")[-1:]:
        wrong, lost, grown = len(soak["wrong"]), len(soak["lost"]), growth(soak)
        is_met = not wrong and not lost and grown <= FLAT_MIB
        shown = [f"{lost} lost, {wrong} wrong, {grown:+.0f} MiB", VERDICT[is_met]]
        yield [f"soak of {soak['minutes']:.0f} minutes", "8", "none lost, none wrong, flat memory", *shown]
        for key, where in (("idle_add_ms", "to an idle session"), ("add_ms", "during the soak")):
            late = soak[key]
            shown = [
                f"{late['median']:.1f} ms ({late['p99']:.0f} in the 99th percentile, {late['largest']:.0f} at most)"
            ]
            shown.append(VERDICT[late["median"] <= ADD_GOAL_MS])
            yield [f"a tenant added {where}: median", "8", f"at most {ADD_GOAL_MS} ms", *shown]


def draft_rows(records: Records) -> Iterator[list[str]]:
    """What drafts gave: a row for each bundle, number of rows and kind of tasks, by the newest record of each."""
    newest = {(each["dtype"], each["rows"], each["tasks"]): each for each in of(records, "drafts")}
    for (dtype, rows, tasks), found in newest.items():
        speeds = [f"{median(each[name] for each in found['rounds']):.0f}" for name in ("without", "with")]
        gains = [each["with"] / each["without"] for each in found["rounds"]]
        share = f"{100 * found['accepted'] / found['drafted']:.0f} %" if found["drafted"] else "none drafted"
        gain = f"{median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        yield [f"{dtype}, {DRAFT_TASKS[tasks]}", str(rows), *speeds, gain, share]


def growth(soak: Mapping[str, Any]) -> float:
    """MiB by which a soak's memory grew after its first fifth: medians of the second and of the last fifth."""
    mib = [sample for _, sample in soak["memory_mib"]]
    fifth = max(1, len(mib) // 5)
    return median(mib[-fifth:]) - median(mib[fifth : 2 * fifth] or mib)


def case_rows(records: Records) -> Iterator[list[str]]:
    """The figures of every case, or why there are none."""
    for rows in (1, 8):
        for name, title in TITLES.items():
            if found := typical(records, name, rows):
                speed = rows / found["decode_ms"] * 1e3
                shown = [f"{found['prefill_ms']:.0f}", f"{found['decode_ms']:.1f}", f"{speed:.0f}"]
                yield [title, str(rows), *shown, f"{found['peak_mib']:.0f}"]
            else:
                rounds = [record["cases"].get(name, {}) for record in of(records, "round") if record["rows"] == rows]
                errors = [case["error"] for case in rounds if "error" in case]
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
        "drafts": table(
            ["Weights and tasks", "Rows", "Without, tokens/s", "With, tokens/s", "Ratio", "Drafted tokens right"],
            list(draft_rows(records)),
        ),
        "costs": table(cost_head(), list(cost_rows(of(records, "cost")))),
        "batches": table(["Batches", "Tokens/s", "Seconds to the first token", "Seconds to the whole answer"], lines),
    }


def draw_accuracy(records: Records, quantised: Mapping[str, Any], path: Path) -> None:
    """Tokens a second with eight rows against the accuracy of the shipped adapters, a point for each kind of weights.

    Peers cannot run these adapters, so that they have a speed and no accuracy: vertical lines.
    """
    names = {(plan.dtype, plan.quantise): name for name, plan in BUNDLES.items() if plan.merged and name in TITLES}
    with figure(path, (9, 5)) as ((axes,),):
        for number, bundle in enumerate(quantised["bundles"]):
            dtype, quantise = bundle["dtype"], bundle.get("quantise", "")
            shares = list(bundle["accuracy"].values())
            found = typical(records, names.get((dtype, quantise), ""), 8)
            if not found:
                continue
            mean = sum(shares) / len(shares)
            error = sum(share * (1 - share) for share in shares) ** 0.5 / quantised["examples"] ** 0.5 / len(shares)
            speed = 8e3 / found["decode_ms"]
            axes.errorbar([speed], [100 * mean], [100 * error], fmt="o", capsize=4, color=OWN)
            beside = (8, 6 if number % 2 else -14)  # neighbours would write over each other
            axes.annotate(
                f"ours, {in_words(dtype, quantise)}", (speed, 100 * mean), xytext=beside, textcoords="offset points"
            )
        for number, name in enumerate(PEERS_DRAWN):
            if found := typical(records, name, 8):
                speed = 8e3 / found["decode_ms"]
                axes.axvline(speed, color=OTHER, linewidth=1, linestyle=":")
                place = (speed, 0.02 + 0.05 * number)
                axes.annotate(
                    TITLES[name],
                    place,
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 0),
                    textcoords="offset points",
                    color=OTHER,
                    fontsize=8,
                )
        axes.set_xlabel("tokens a second, eight rows")
        axes.set_ylabel("right answers, % (and standard error)")
        axes.margins(0.15, 0.3)


def draw(records: Records, folder: Path) -> None:
    """Tokens a second of decode steps, a panel for each number of rows; and a soak's memory over minutes."""
    names = [name for name in list(TITLES)[::-1] if any(typical(records, name, rows) for rows in (1, 8))]
    colours = [OWN if TITLES[name].startswith("ours") else OTHER for name in names]
    with figure(folder / "serving.png", (10, 0.32 * len(names) + 1.2), 1, 2, sharey=True) as (panels,):
        for axes, rows in zip(panels, (1, 8), strict=True):
            found = [typical(records, name, rows) for name in names]
            speeds = [rows / figures["decode_ms"] * 1e3 if figures else 0 for figures in found]
            axes.barh([TITLES[name].replace("`", "") for name in names], speeds, color=colours)
            axes.set_title(f"{rows} row{'s' if rows > 1 else ''}")
            axes.set_xlabel("tokens a second")
    for soak in of(records, "soak")[-1:]:
        seconds, mib = zip(*soak["memory_mib"], strict=True)
        with figure(folder / "soak.png", (10, 2.6)) as ((axes,),):
            axes.plot([second / 60 for second in seconds], mib, color=OWN)
            axes.set_ylim(0, 1.1 * max(mib))
            axes.set_xlabel("minutes")
            axes.set_ylabel("MiB resident")
