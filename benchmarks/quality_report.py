"""``docs/results.md`` from the records of `benchmarks/quality.py`: every sentence and number is computed."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.quality_plan import (
    ABLATED_ON,
    BACKBONE,
    GENERATION,
    MAX_CHARACTERS,
    MAX_RESPONSE_TOKENS,
    MAX_TOKENS,
    NUM_PARAMETERS,
    TASKS,
    TUNED_ON,
    Budget,
    Task,
    Variant,
    ablations,
    all_runs,
    count_parameters,
    rates,
    runs_of,
    variants,
)
from benchmarks.quality_plots import plot_ablations, plot_main, plot_rates
from benchmarks.quality_records import Cell, Record, chosen_rates, rate_scores, score
from trainers.methods.configs import IAPTConfig

BY_HAND = "## Why"
"""This heading and all after it are kept when the page is written again."""
PLOTS = ("results-main", "results-ablations", "results-rates")
OUTCOMES = {"ahead": "IAPT loses to", "behind": "IAPT beats", "open": "Not told apart from IAPT"}
Records = Mapping[str, Record]


def cell(records: Records, keys: Sequence[str], is_loss: bool) -> Cell:
    """Gather the records of one method on one task."""
    found = [records[key] for key in keys if key in records]
    good = [record for record in found if score(record) is not None]
    values = tuple(value for record in good if (value := score(record)) is not None)
    count = int(good[0]["report"]["count"]) if good else 0
    return Cell(values, is_loss, count, len(found) - len(good))


def main_cells(budget: Budget, records: Records) -> dict[str, dict[str, Cell]]:
    """Variant's label to task name to scores."""
    chosen, keys = chosen_rates(budget, records), collections.defaultdict(list)
    for phase in ("main", "generation"):
        for run in runs_of(phase, budget, chosen):
            if run.label in chosen:
                keys[run.label, run.task].append(run.key)
    return {
        variant.label: {task.name: cell(records, keys[variant.label, task.name], task.is_generation) for task in TASKS}
        for variant in variants(budget)
    }


def baselines(budget: Budget, records: Records) -> dict[str, Record]:
    """Task name to the plain backbone's record, where there is one."""
    runs = runs_of("baseline", budget, {})
    return {run.task: records[run.key] for run in runs if score(records.get(run.key)) is not None}


def ablation_cells(budget: Budget, records: Records) -> dict[str, dict[str, dict[str, Cell]]]:
    """Ablation to its label to task name to scores; IAPT's own line comes from the main comparison's records."""
    chosen = chosen_rates(budget, records)
    by_config: dict[tuple[IAPTConfig, str], list[str]] = collections.defaultdict(list)
    for run in [*runs_of("main", budget, chosen), *runs_of("ablations", budget, chosen)]:
        if run.config is not None and run.key not in by_config[run.config, run.task]:
            by_config[run.config, run.task].append(run.key)
    return {
        name: {
            label: {task: cell(records, by_config[config, task], False) for task in ABLATED_ON}
            for label, config in pairs
        }
        for name, pairs in ablations(budget).items()
    }


def ranks(cells: Mapping[str, Mapping[str, Cell]], task: Task) -> dict[str, float]:
    """Label to rank on a task, 1 the best; equals share the mean of their ranks. Unmeasured labels have none."""
    means = {label: row[task.name].mean for label, row in cells.items() if row[task.name].scores}
    sign = 1 if task.is_generation else -1
    order = sorted(means, key=lambda label: sign * means[label])
    places: dict[float, list[int]] = collections.defaultdict(list)
    for place, label in enumerate(order, start=1):
        places[means[label]].append(place)
    return {label: statistics.fmean(places[means[label]]) for label in order}


def first_of(ranked: Mapping[str, float]) -> list[str]:
    """The labels that share the first place."""
    return [label for label, rank in ranked.items() if rank == min(ranked.values())]


def average_ranks(cells: Mapping[str, Mapping[str, Cell]], tasks: Sequence[Task] = TASKS) -> dict[str, float]:
    """Label to mean rank over ``tasks`` on which every label was measured; without such a task empty."""
    whole = [task for task in tasks if all(row[task.name].scores for row in cells.values())]
    found = [ranks(cells, task) for task in whole]
    return {label: statistics.fmean(rank[label] for rank in found) for label in cells} if found else {}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(budget: Budget, records: Records) -> str:
    """Methods by tasks, with average ranks; then the plain backbone and the most frequent label."""
    cells, plain = main_cells(budget, records), baselines(budget, records)
    mean_ranks = average_ranks(cells)
    best = {task.name: first_of(ranks(cells, task)) for task in TASKS}
    rows = []
    for variant in variants(budget):
        row = [variant.label, f"{variant.num_parameters:,}"]
        for task in TASKS:
            text = str(cells[variant.label][task.name])
            row.append(f"**{text}**" if variant.label in best[task.name] else text)
        rank = mean_ranks.get(variant.label)
        rows.append([*row, "–" if rank is None else f"{rank:.1f}"])
    zero = ["plain backbone (zero-shot)", "0"]
    majority = ["most frequent label", ""]
    for task in TASKS:
        record = plain.get(task.name)
        zero.append(str(Cell((score(record) or 0.0,), task.is_generation)) if record else "–")
        share = record["report"].get("majority_accuracy") if record else None
        majority.append(f"{share * 100:.1f}" if share is not None else "")
    header = ["", "parameters", *(f"{task.title}{' (loss)' if task.is_generation else ''}" for task in TASKS), "rank"]
    return table(header, [*rows, [*zero, ""], [*majority, ""]])


def budget_table(budget: Budget) -> str:
    """Fields and parameters of each method."""
    rows = []
    for variant in variants(budget):
        count = variant.num_parameters
        fields = ", ".join(f"{name} {value}" for name, value in _fields(variant).items())
        share = f"{100 * count / NUM_PARAMETERS:.0f} %" if variant.is_matched else "not matched"
        rows.append([variant.label, fields, f"{count:,}", share])
    return table(["method", "fields", "parameters", "of the budget"], rows)


def _fields(variant: Variant) -> dict[str, object]:
    """The fields that set a variant's size."""
    names = ("prompt_length", "bottleneck", "rank", "alpha", "head_width", "max_length", "init_length", "window")
    return {name: getattr(variant.config, name) for name in names if name in vars(variant.config)}


def rate_table(budget: Budget, records: Records) -> str:
    """Validation accuracy at each rate tried, the chosen one in bold."""
    chosen, rows = chosen_rates(budget, records), []
    for variant in variants(budget):
        tried = rate_scores(variant, budget, records)
        row = [variant.label]
        for rate, value in tried.items():
            text = f"{rate:.2g}: {'–' if value is None else f'{value * 100:.1f}'}"
            row.append(f"**{text}**" if chosen.get(variant.label) == rate else text)
        rows.append(row)
    return table(["method", *["rate: accuracy"] * budget.num_rates], rows)


def ablation_table(name: str, budget: Budget, records: Records) -> str:
    """One ablation's scores and parameters."""
    titles = {task.name: task.title for task in TASKS}
    cells = ablation_cells(budget, records)[name]
    rows = [
        [label, f"{count_parameters(config):,}", *(str(cells[label][task]) for task in ABLATED_ON)]
        for label, config in ablations(budget)[name]
    ]
    return table([name, "parameters", *(titles[task] for task in ABLATED_ON)], rows)


def comparisons(budget: Budget, records: Records, task: Task) -> dict[str, list[str]]:
    """Other methods on a task as ``ahead`` of IAPT, ``behind`` it, or ``open``, with their differences.

    A difference is open when it is below twice its standard error, taken as if the two were independent.
    """
    cells = {label: row[task.name] for label, row in main_cells(budget, records).items()}
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "open": []}
    own = cells["IAPT"]
    for label, other in cells.items():
        if label == "IAPT" or not other.scores or not own.scores:
            continue
        gain = (own.mean - other.mean) * (1 if task.is_generation else -1)
        text = f"{label} ({gain:+z.3f})" if task.is_generation else f"{label} ({100 * gain:+z.1f})"
        is_open = abs(gain) < 2 * math.hypot(own.error, other.error)
        groups["open" if is_open else "ahead" if gain > 0 else "behind"].append(text)
    return groups


def findings(budget: Budget, records: Records) -> list[str]:
    """What the numbers say about each task, as list items."""
    cells, lines = main_cells(budget, records), []
    for task in TASKS:
        placed = ranks(cells, task)
        if "IAPT" not in placed or len(placed) < 2:
            lines.append(f"- **{task.title}**: not measured yet.")
            continue
        first = first_of(placed)
        unit = "loss saved per token" if task.is_generation else "points of accuracy"
        place = f"IAPT's rank is {placed['IAPT']:g} of {len(placed)}"
        text = f"- **{task.title}**: first is {' and '.join(first)} with {cells[first[0]][task.name]}; {place}."
        groups = comparisons(budget, records, task)
        for group, words in OUTCOMES.items():
            found = groups[group]
            text += f" {words}: {'; '.join(found) if found else 'none'}."
        lines.append(f"{text} (In brackets: {unit}, beside IAPT.)")
    mean_ranks = average_ranks(cells)
    if mean_ranks:
        order = sorted(mean_ranks, key=lambda label: mean_ranks[label])
        lines.append("- **Average rank**: " + "; ".join(f"{label} {mean_ranks[label]:.1f}" for label in order) + ".")
        lines += goals(budget, records, mean_ranks)
    return lines


def goals(budget: Budget, records: Records, mean_ranks: Mapping[str, float]) -> list[str]:
    """Whether IAPT does what was hoped for: first or not told apart from the first, and ahead of its siblings."""
    matched = [variant.label for variant in variants(budget) if variant.is_matched]
    own, lost, unknown = main_cells(budget, records)["IAPT"], [], []
    for task in TASKS:
        ahead = {text.rpartition(" (")[0] for text in comparisons(budget, records, task)["ahead"]}
        if ahead & set(matched):
            lost.append(task.title)
        elif math.isinf(own[task.name].error):
            unknown.append(task.title)
    siblings = [label for label in mean_ranks if label not in ("IAPT", "LoRA")]
    before = [label for label in siblings if mean_ranks[label] <= mean_ranks["IAPT"]]
    return [
        "- **First, or not told apart from the first, among the methods of its budget on every task**: "
        + (f"missed on {', '.join(lost)}." if lost else "met.")
        + (f" Not decided, for want of seeds: {', '.join(unknown)}." if unknown else ""),
        "- **Ahead of every prompt-tuning sibling on average**: "
        + (f"missed; as high or higher: {', '.join(before)}." if before else "met, by average rank."),
    ]


def limits(budget: Budget, records: Records) -> list[str]:
    """What the numbers do not say."""
    plain = baselines(budget, records)
    counts = ", ".join(f"{task.title} {plain[task.name]['report']['count']}" for task in TASKS if task.name in plain)
    chosen, edges = chosen_rates(budget, records), {0: "", -1: ""}
    for edge in edges if budget.num_rates > 1 else ():
        found = [v.label for v in variants(budget) if chosen.get(v.label) == rates(v, budget)[edge]]
        edges[edge] = (
            f"Chosen at the {'upper' if edge else 'lower'} edge of what was tried: {'; '.join(found) or 'none'}. "
        )
    size = max((p["report"]["count"] for name, p in plain.items() if name not in GENERATION), default=0)
    error = 100 * math.sqrt(0.16 / size) if size else 0.0
    noise = (
        f"An accuracy of 80 % on {size} examples has a standard error of {error:.1f} points, so two methods closer "
        f"than {2 * math.sqrt(2) * error:.0f} points are not told apart, which does not mean that they are equal. "
    )
    seeds = (
        f"The spread (±) is the sample standard deviation over {budget.seeds} seeds, which decide initial weights and "
        "order of the data, not the sample. "
        if budget.seeds > 1
        else "One seed: what initial weights and the order of the data change is not in these numbers. "
    )
    return [
        f"- Test examples: {counts or 'none yet'}. {noise if size else ''}{seeds}Two methods count as told apart when "
        "their means differ by twice the standard error of the difference, from the test sample and the spread over "
        "seeds, as if independent; losses only with two seeds or more. A rough guide, no test, and many are compared. "
        "Seeds that diverged are counted beside a mean, not in it.",
        f"- Learning rates were chosen on {TUNED_ON}'s validation split ({budget.validation_rows} examples, one seed) "
        "and used for every task; IAPT's ablations use IAPT's rate. "
        f"{edges[0]}{edges[-1]}A rate at an edge may not be that method's best, and neighbours often differ by less "
        "than the error of either.",
        f"- {budget.steps} steps of {budget.batch_size} examples are a short training: methods that learn slowly look "
        "worse than they would in a long one.",
        f"- One backbone of 135 million parameters, dequantised from 4 bits. Texts are cut at {MAX_CHARACTERS} "
        f"characters or {MAX_TOKENS} tokens of instruction, free answers at {MAX_RESPONSE_TOKENS} tokens; loss is in "
        "nats per token, measured with the right answer given, and says little of how generated text reads.",
        "- The data sets stand in for well-known ones and are none of them: VADER movie snippets are sentences of "
        "film reviews with raters' means, the headlines carry a sarcasm mark, Reuters R8 is the 8-topic part of "
        "Reuters-21578 with texts cut, the Alpaca-style answers are the demonstration sample that LLaMA-Factory "
        "carries. No number here compares with a paper's.",
        "- IAPT and LAMP are our reading of papers for which no code was found, see [methods.md](methods.md).",
    ]


def facts(budget: Budget, records: Records) -> list[str]:
    """What was run, on what, for how long."""
    wanted = all_runs(budget, chosen_rates(budget, records))
    done = [records[run.key] for run in wanted if run.key in records]
    machines = sorted({record["machine"] for record in done})
    versions = sorted({f"{name} {v}" for record in done for name, v in record["versions"].items()})
    hours = sum(record["seconds"]["total"] for record in done) / 3600
    dates = sorted(record["finished"][:10] for record in done)
    return [
        f"- Plan `{budget.name}`: {len(done)} of {len(wanted)} runs are done, {budget.steps} steps of "
        f"{budget.batch_size} examples each, {budget.seeds} seed{'s' * (budget.seeds > 1)}, {budget.num_rates} "
        "learning rates per method.",
        f"- {hours:.1f} hours in all on {', '.join(machines) or 'no machine'}, in fp32"
        + (f", {dates[0]} to {dates[-1]}; {', '.join(versions)}." if dates else "."),
        f"- Backbone: {BACKBONE}, frozen. AdamW, linear decay after {budget.warmup_steps} steps of warm-up.",
    ]


def write_report(budget: Budget, records: Records, output: Path) -> None:
    """Write the page and its plots beside it."""
    images = output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    plot_main(main_cells(budget, records), baselines(budget, records), images / f"{PLOTS[0]}.png")
    plot_ablations(ablation_cells(budget, records), images / f"{PLOTS[1]}.png")
    plot_rates({v.label: rate_scores(v, budget, records) for v in variants(budget)}, images / f"{PLOTS[2]}.png")
    parts = [
        "# Results",
        "Written by `python benchmarks/quality.py report` from the records in `benchmarks/results/quality`; "
        f"`python benchmarks/quality.py run` makes them. Only what follows `{BY_HAND}` is written by hand.",
        "## What was run",
        "\n".join(facts(budget, records)),
        "## Methods at matched budgets",
        f"The budget is that of 100 soft tokens at the backbone's width: {NUM_PARAMETERS:,} trained numbers.",
        budget_table(budget),
        "## Comparison",
        "Accuracy in percent, higher is better; loss in nats per token, lower is better. Mean ± spread over seeds; the "
        "best mean in bold. Rank: average of a method's ranks over the tasks that all methods were measured on.",
        main_table(budget, records),
        f"![Scores by method and task, a dot per seed](images/{PLOTS[0]}.png)",
        "## Ablations of IAPT",
        "All with projections shared by all layers, at IAPT's learning rate. Accuracy in percent.",
        *(ablation_table(name, budget, records) for name in ablations(budget)),
        f"![Ablations, a dot per seed](images/{PLOTS[1]}.png)",
        "## Learning rates",
        "Each method tried as many rates, 3 times apart, one seed each; validation accuracy in percent.",
        rate_table(budget, records),
        f"![Validation accuracy by learning rate](images/{PLOTS[2]}.png)",
        "## What this says",
        "\n".join(findings(budget, records)),
        "## What this does not say",
        "\n".join(limits(budget, records)),
    ]
    before = output.read_text(encoding="utf-8") if output.is_file() else ""
    _, _, by_hand = before.partition(f"\n{BY_HAND}\n")
    if by_hand:
        parts.append(f"{BY_HAND}\n{by_hand}".rstrip("\n"))
    temporary = output.with_suffix(".tmp")
    temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    temporary.replace(output)
