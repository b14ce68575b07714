"""The tables and plots of ``docs/results.md``, from the records of `benchmarks/quality.py`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import MUTED, OTHER, OWN, figure, table
from benchmarks.quality_plan import (
    ASKED,
    FORMATS,
    IAPT,
    ROUNDED_ON,
    SECOND,
    SECOND_ON,
    TASKS,
    VARIANTS,
    WEIGHTS,
    Budget,
    Task,
    Variant,
    count_parameters,
    runs_of,
)
from benchmarks.quality_records import Cell, Records, chosen_rates, rate_scores, score

Cells = Mapping[str, Mapping[str, Cell]]
"""A line's label to a task's name to scores."""


def tables(budget: Budget, records: Records) -> dict[str, str]:
    """All tables by name."""
    cells = main_cells(budget, records)
    return {
        "comparison": main_table(budget, records),
        "differences": difference_table(cells),
        **{
            f"{phase} {name}": ablation_table(phase, name, budget, records)
            for phase in begun(budget, records)
            for name in ASKED[phase][0]
        },
        "rates": rate_table(budget, records, VARIANTS),
        **rounded_tables(budget, records),
        **format_tables(budget, records),
        **second_tables(budget, records),
    }


def begun(budget: Budget, records: Records) -> list[str]:
    """The phases that change IAPT, but those of which no run of its own was made."""
    chosen = chosen_rates(budget, records)
    main = {run.key for run in runs_of("main", budget, chosen)}
    return [phase for phase in ASKED if {run.key for run in runs_of(phase, budget, chosen)} & records.keys() - main]


def main_cells(budget: Budget, records: Records) -> dict[str, dict[str, Cell]]:
    """The scores of the main comparison; none for a method whose rate was not yet chosen."""
    chosen = chosen_rates(budget, records)
    runs = [run for run in runs_of("main", budget, chosen) if run.label in chosen]
    return {
        variant.label: {
            task.name: Cell.of(
                [run for run in runs if (run.label, run.task) == (variant.label, task)], records, task.is_generation
            )
            for task in TASKS
        }
        for variant in VARIANTS
    }


def ablation_cells(phase: str, name: str, budget: Budget, records: Records) -> dict[str, dict[str, Cell]]:
    """The scores of the lines of one of a phase's tables."""
    runs, (asked, tasks) = runs_of(phase, budget, chosen_rates(budget, records)), ASKED[phase]
    return {
        label: {
            task.name: Cell.of([run for run in runs if (run.config, run.task) == (config, task)], records, False)
            for task in tasks
        }
        for label, config in asked[name].items()
    }


def baselines(budget: Budget, records: Records) -> dict[str, Mapping[str, Any]]:
    """Task name to the plain backbone's record, where there is one."""
    return {run.task.name: records[run.key] for run in runs_of("baseline", budget, {}) if run.key in records}


def ranks(cells: Cells, task: Task) -> dict[str, float]:
    """Label to rank on a task, 1 the best; equals share the mean of their ranks. Unmeasured labels have none."""
    sign = 1 if task.is_generation else -1
    means = {label: sign * row[task.name].mean for label, row in cells.items() if row[task.name].scores}
    values = list(means.values())
    better = {value: sum(other < value for other in values) for value in values}
    return {label: better[value] + (values.count(value) + 1) / 2 for label, value in means.items()}


def average_ranks(cells: Cells) -> dict[str, float]:
    """Label to mean rank over the tasks on which every label was measured; without such a task empty."""
    found = [ranks(cells, task) for task in TASKS if all(row[task.name].scores for row in cells.values())]
    return {label: statistics.fmean(rank[label] for rank in found) for label in cells} if found else {}


def main_table(budget: Budget, records: Records) -> str:
    """Methods by tasks, the best mean in bold, with average ranks; then the plain backbone and the commonest label."""
    cells, plain = main_cells(budget, records), baselines(budget, records)
    mean_ranks, rows = average_ranks(cells), []
    placed = {task.name: ranks(cells, task) for task in TASKS}
    for variant in VARIANTS:
        row = [variant.label, f"{count_parameters(variant.config):,}"]
        for name, cell in cells[variant.label].items():
            is_first = variant.label in placed[name] and placed[name][variant.label] == min(placed[name].values())
            row.append(f"**{cell}**" if is_first else str(cell))
        rows.append([*row, f"{mean_ranks[variant.label]:.1f}" if mean_ranks else "–"])
    zero, majority = ["plain backbone (zero-shot)", "0"], ["most frequent label", ""]
    for task in TASKS:
        record = plain.get(task.name, {})
        value, share = score(record), record.get("majority_accuracy")
        zero.append(str(Cell((value,) if value is not None else (), task.is_generation)))
        majority.append(f"{share * 100:.1f}" if share is not None else "")
    titles = (f"{task.title}{' (loss)' if task.is_generation else ''}" for task in TASKS)
    return table(["", "parameters", *titles, "rank"], [*rows, [*zero, ""], [*majority, ""]])


def difference_table(cells: Cells) -> str:
    """How much better each method is than IAPT; bold from twice the standard error on, as if independent."""
    rows = []
    for label in (label for label in cells if label != "IAPT"):
        row = [label]
        for task in TASKS:
            own, other = cells["IAPT"][task.name], cells[label][task.name]
            gain = (own.mean - other.mean) if task.is_generation else 100 * (other.mean - own.mean)
            text = f"{gain:+z.{3 if task.is_generation else 1}f}" if own.scores and other.scores else "–"
            error = (1 if task.is_generation else 100) * math.hypot(own.error, other.error)
            row.append(f"**{text}**" if abs(gain) >= 2 * error else text)
        rows.append(row)
    return table(["beside IAPT", *(f"{t.title}{' (nats saved)' * t.is_generation}" for t in TASKS)], rows)


def format_tables(budget: Budget, records: Records) -> dict[str, str]:
    """What a line break between prompt and answer does, validation accuracy; nothing as long as no run was made."""
    runs = runs_of("formats", budget, {})
    if not any(run.key in records for run in runs):
        return {}
    rows = [
        [
            label,
            *(
                str(Cell.of([r for r in runs if (r.label, r.backbone.prompt_format) == (label, form)], records, False))
                for form in FORMATS
            ),
        ]
        for label in dict.fromkeys(run.label for run in runs)
    ]
    return {"formats": table(["", *FORMATS], rows)}


def rounded_tables(budget: Budget, records: Records) -> dict[str, str]:
    """Accuracy of adapters trained on one kind of weights and served on one, a table for each task that was begun."""
    chosen, made = chosen_rates(budget, records), {}
    for task in ROUNDED_ON:
        runs = [run for run in runs_of("rounded", budget, chosen) if run.task == task and run.key in records]
        rows = []
        for variant in VARIANTS if runs else ():
            cells = []
            for trained, served in itertools.product(WEIGHTS, WEIGHTS):
                own = [run for run in runs if (run.label, run.weights) == (variant.label, trained)]
                found = [records[run.key] for run in own if "on" in records[run.key]]
                cells.append(Cell(tuple(each["on"][served] for each in found), False, 0, len(own) - len(found)))
            rows.append([variant.label, *map(str, cells)])
        titles = (f"trained on {own}, served in {other}" for own, other in itertools.product(WEIGHTS, WEIGHTS))
        if rows:
            made[f"rounded {task.name}"] = table([task.title, *titles], rows)
    return made


def second_tables(budget: Budget, records: Records) -> dict[str, str]:
    """The comparison on the second backbone and the rates that were tried there, as far as there are any."""
    chosen = chosen_rates(budget, records)
    runs = runs_of("second", budget, chosen)
    if not any(run.key in records for run in runs):
        return {}
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]
        count = "0" if own[0].config is None else f"{count_parameters(own[0].config, own[0].backbone):,}"
        cells = (Cell.of([run for run in own if run.task == task], records, task.is_generation) for task in SECOND_ON)
        rows.append([label, count, *map(str, cells)])
    made = table(["", "parameters", *(task.title for task in SECOND_ON)], rows)
    return {"second": made, "second-rates": rate_table(budget, records, SECOND)}


def rate_table(budget: Budget, records: Records, variants: Sequence[Variant]) -> str:
    """Validation accuracy at each rate tried, the chosen one in bold."""
    chosen, rows = chosen_rates(budget, records), []
    for variant in variants:
        row = [variant.label]
        for rate, value in rate_scores(variant, budget, records).items():
            text = f"{rate:.2g}: {'–' if value is None else f'{value * 100:.1f}'}"
            row.append(f"**{text}**" if chosen.get(variant.label) == rate else text)
        rows.append(row)
    most = max(len(row) for row in rows)
    return table(["method", *["rate: accuracy"] * (most - 1)], [row + [""] * (most - len(row)) for row in rows])


def ablation_table(phase: str, name: str, budget: Budget, records: Records) -> str:
    """One ablation's scores and parameters."""
    cells, (asked, tasks) = ablation_cells(phase, name, budget, records), ASKED[phase]
    rows = [[line, f"{count_parameters(asked[name][line]):,}", *map(str, row.values())] for line, row in cells.items()]
    return table([name, "parameters", *(task.title for task in tasks)], rows)


def draw(budget: Budget, records: Records, folder: Path) -> None:
    """All plots. Every seed is a dot, the mean a bar through them; IAPT's dots are square."""
    cells, plain = main_cells(budget, records), baselines(budget, records)
    size = (11, 0.32 * len(cells) + 1.2)
    with figure(folder / "results-main.png", size, 1, len(TASKS), sharey=True) as (panels,):
        for axes, task in zip(panels, TASKS, strict=True):
            _rows(axes, [(label, row[task.name]) for label, row in cells.items()], ("IAPT",))
            if (level := score(plain.get(task.name))) is not None:
                axes.axvline(level * (1 if task.is_generation else 100), color=MUTED, linestyle="--", linewidth=1)
            axes.set_title(task.title)
            axes.set_xlabel("loss per token" if task.is_generation else "accuracy, %")
        panels[0].invert_yaxis()
    for phase in begun(budget, records):
        asked, tasks = ASKED[phase]
        size = (3 * len(asked), 2 * len(tasks) + 0.4)
        with figure(folder / f"results-{phase}.png", size, len(tasks), len(asked), sharex="row") as panels:
            for row, task in zip(panels, tasks, strict=True):
                for axes, (name, configs) in zip(row, asked.items(), strict=True):
                    scores = ablation_cells(phase, name, budget, records)
                    own = [label for label, config in configs.items() if config == IAPT]
                    _rows(axes, [(label, scores[label][task.name]) for label in configs], own)
                    axes.invert_yaxis()
                    axes.set_title(f"{name}\n{task.title}")
                    axes.set_xlabel("accuracy, %")


def _rows(axes: Any, lines: Sequence[tuple[str, Cell]], own: Sequence[str]) -> None:
    """Dots and a mean bar for each line, from the top down."""
    for place, (label, cell) in enumerate(lines):
        colour, values = OWN if label in own else OTHER, [value * (1 if cell.is_loss else 100) for value in cell.scores]
        axes.plot(values, [place] * len(values), "s" if label in own else "o", color=colour, alpha=0.6, markersize=5)
        if values:
            axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
