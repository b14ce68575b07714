"""The plots of ``docs/results.md``, as PNG. Every seed is a dot, the mean a bar through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_plan import ABLATED_ON, ABLATIONS, IAPT, TASKS
from benchmarks.quality_records import Cell, Record, score

INK, MUTED, OWN, OTHER = "#1f2328", "#6e7781", "#c2410c", "#0b6e99"
"""IAPT stands out; on white, also for readers who do not tell colours apart (IAPT's dots are square as well)."""
OWN_LINES = tuple(label for pairs in ABLATIONS.values() for label, config in pairs if config == IAPT)
"""IAPT itself among the lines of an ablation."""
STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "xtick.color": INK,
    "ytick.color": INK,
}


def plot_main(cells: Mapping[str, Mapping[str, Cell]], plain: Mapping[str, Record], path: Path) -> None:
    """One panel per task: methods down, scores across, the plain backbone as a dashed line."""
    import matplotlib
    from matplotlib.figure import Figure

    labels = list(cells)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.32 * len(labels) + 1.2))
        panels = figure.subplots(1, len(TASKS), sharey=True)
        for axes, task in zip(panels, TASKS, strict=True):
            _rows(axes, [(label, cells[label][task.name]) for label in labels])
            level = score(plain.get(task.name))
            if level is not None:
                axes.axvline(level * (1 if task.is_generation else 100), color=MUTED, linestyle="--", linewidth=1)
            axes.set_title(task.title)
            axes.set_xlabel("loss per token" if task.is_generation else "accuracy, %")
        panels[0].invert_yaxis()
        _save(figure, path)


def plot_ablations(cells: Mapping[str, Mapping[str, Mapping[str, Cell]]], path: Path) -> None:
    """One panel per task and ablation."""
    import matplotlib
    from matplotlib.figure import Figure

    titles = {task.name: task.title for task in TASKS}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3 * len(cells), 2 * len(ABLATED_ON) + 0.4))
        panels = figure.subplots(len(ABLATED_ON), len(cells), squeeze=False, sharex="row")
        for row, task in zip(panels, ABLATED_ON, strict=True):
            for axes, (name, lines) in zip(row, cells.items(), strict=True):
                _rows(axes, [(label, scores[task]) for label, scores in lines.items()], own=OWN_LINES)
                axes.invert_yaxis()
                axes.set_title(f"{name}\n{titles[task]}")
                axes.set_xlabel("accuracy, %")
        _save(figure, path)


def plot_rates(tried: Mapping[str, Mapping[float, float | None]], path: Path) -> None:
    """Validation accuracy over the learning rate, a small panel per method."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = 5
    num_rows = -(-len(tried) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.9 * num_rows + 0.3))
        panels = figure.subplots(num_rows, columns, squeeze=False, sharey=True)
        flat = [axes for row in panels for axes in row]
        for axes, (label, scores) in zip(flat, tried.items(), strict=False):
            points = [(rate, value * 100) for rate, value in scores.items() if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=OWN if label == "IAPT" else OTHER, markersize=4)
                axes.set_xticks([rate for rate, _ in points], [f"{rate:.1g}" for rate, _ in points])
            axes.set_xscale("log")
            axes.minorticks_off()
            if points:
                axes.set_xticks([rate for rate, _ in points], [f"{rate:.1g}" for rate, _ in points])
            axes.set_title(label, fontsize=8)
        for axes in flat[len(tried) :]:
            axes.set_visible(False)
        for row in panels:
            row[0].set_ylabel("accuracy, %")
        _save(figure, path)


def _rows(axes: Any, lines: Sequence[tuple[str, Cell]], own: Sequence[str] = ("IAPT",)) -> None:
    """Dots and a mean bar for each line, from the top down."""
    for place, (label, cell) in enumerate(lines):
        scale, is_own = 1 if cell.is_loss else 100, label in own
        colour = OWN if is_own else OTHER
        values = [value * scale for value in cell.scores]
        axes.plot(values, [place] * len(values), "s" if is_own else "o", color=colour, alpha=0.6, markersize=5)
        if values:
            axes.plot([cell.mean * scale] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    """Equal figures give equal bytes: no date and no version goes into the file."""
    figure.savefig(path, metadata={"Software": None})
