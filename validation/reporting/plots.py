"""The report's plots, as SVG to be put inline into a page.

Equal figures give equal bytes. Colours are written as CSS variables of the page (``--ink``, ``--series-1``
and so on), so that one plot reads well on a light and on a dark screen.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from validation.judging.result import TargetResult, TokenRow

SIZE_INCHES = (5.0, 2.9)
"""Small on purpose: at a phone's width the text is still 9 pixels high."""

# Stand-ins that matplotlib writes, and what the page reads instead of them.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
GOOD, EXCUSED, BAD = "#040404", "#050505", "#060606"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03")
COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    GOOD: "var(--good)",
    EXCUSED: "var(--excused)",
    BAD: "var(--bad)",
    **{stand_in: f"var(--series-{index})" for index, stand_in in enumerate(SERIES, start=1)},
}
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
EDGE = 0.97
"""Height of marks at the upper edge, as a share of the axis."""
MARKERS = ("o", "s", "^")
"""Series differ in shape as well, for readers who do not tell the colours apart."""


def error_per_layer(target: TargetResult) -> str:
    """Worst relative error of prompts, keys and values in each layer."""
    figure, axes = _figure(target, "layer", "worst relative error")
    for (name, errors), colour, marker in zip(target.by_layer.items(), SERIES, MARKERS, strict=False):
        _line(axes, errors, colour, marker, name)
    _limit(axes, _limit_of(target, "prefill cache"), "limit of keys and values")
    _whole_decades(axes)
    _legend(axes)
    return _svg(figure, f"{target.name} {target.dtype}: error per layer")


def error_inside(target: TargetResult) -> str:
    """Error of every tensor that was compared inside the graph, in its order; the first wrong one is marked."""
    assert target.bisection is not None
    figure, axes = _figure(target, "tensors in the order of the graph, by layer", "worst relative error")
    errors = [error for _, _, error in target.bisection.errors]
    _line(axes, errors, SERIES[0], "", f"step {max(0, target.bisection.num_steps - 1)}")
    finding = target.bisection.finding
    if finding is not None:
        _limit(axes, finding.limit, "allowed")
        names = [name for name, _, _ in target.bisection.errors]
        if finding.tensor in names and math.isfinite(finding.error):
            place = names.index(finding.tensor)
            axes.plot([place], [errors[place]], "o", color=BAD, markersize=6, label="first difference")
    layers = [layer for _, layer, _ in target.bisection.errors]
    starts = {layer: layers.index(layer) for layer in sorted({layer for layer in layers if layer is not None})}
    shown = list(starts)[:: max(1, len(starts) // 8)]
    axes.set_xticks([starts[layer] for layer in shown], [str(layer) for layer in shown])
    _whole_decades(axes)
    _legend(axes)
    return _svg(figure, f"{target.name} {target.dtype}: error inside the graph")


def error_per_step(target: TargetResult) -> str:
    """Worst relative logits error of each step; step 0 is prefill."""
    figure, axes = _figure(target, "step (0 is prefill)", "worst relative error")
    _line(axes, target.by_step, SERIES[0], "", "logits")
    _limit(axes, _limit_of(target, "decode logits"), "limit of decode logits")
    _whole_decades(axes)
    _legend(axes)
    return _svg(figure, f"{target.name} {target.dtype}: error per step")


def error_histogram(target: TargetResult) -> str:
    """How the absolute logits errors are distributed, over powers of ten."""
    figure, axes = _figure(target, "absolute logits error", "logits", log=False)
    edges, counts = _without_empty_ends(target.histogram["edges"], target.histogram["counts"])
    axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.35)
    axes.stairs(counts, edges, color=SERIES[0], linewidth=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{value:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(_short_count))
    return _svg(figure, f"{target.name} {target.dtype}: distribution of the logits error")


def token_agreement(target: TargetResult) -> str:
    """How many greedy tokens of each prompt agree before the first that differs."""
    figure, axes = _figure(target, "prompt", "agreeing tokens", log=False)
    kinds = (
        ("all tokens agree", GOOD, "", [row.first_divergence is None for row in target.tokens]),
        ("excused tie", EXCUSED, "//", [row.first_divergence is not None and row.excused for row in target.tokens]),
        ("differs", BAD, "xx", [row.first_divergence is not None and not row.excused for row in target.tokens]),
    )
    for label, colour, hatch, members in kinds:
        places = [place for place, member in enumerate(members, start=1) if member]
        if places:
            heights = [agreeing_tokens(target.tokens[place - 1]) for place in places]
            axes.bar(places, heights, color=colour, hatch=hatch, edgecolor=GRID, linewidth=0.5, label=label)
            nothing = [place for place, height in zip(places, heights, strict=True) if not height]
            axes.plot(nothing, [0] * len(nothing), "x", color=colour, clip_on=False)  # a bar of no height is not seen
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.3, len(target.tokens) + 0.7)
    axes.set_ylim(0, max([1, *(len(row.reference) for row in target.tokens)]))
    _legend(axes)
    return _svg(figure, f"{target.name} {target.dtype}: token agreement per prompt")


def agreeing_tokens(row: TokenRow) -> int:
    """Tokens of a prompt's answer that agree before the first that differs."""
    return len(row.reference) if row.first_divergence is None else row.first_divergence


def _without_empty_ends(edges: list[float], counts: list[float]) -> tuple[list[float], list[float]]:
    """A histogram from its first to its last bin that holds something."""
    held = [index for index, count in enumerate(counts) if count] or [0, len(counts) - 1]
    return edges[held[0] : held[-1] + 2], counts[held[0] : held[-1] + 1]


def _figure(target: TargetResult, x_label: str, y_label: str, log: bool = True) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES)
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.grid(True, axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        if log:
            axes.set_yscale("log")
            axes.set_autoscaley_on(False)  # see _whole_decades
            axes.yaxis.set_major_locator(LogLocator(numticks=7))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{math.log10(value):.0f}"))
            axes.yaxis.set_minor_locator(LogLocator(subs=()))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _line(axes: Axes, errors: Sequence[float], colour: str, marker: str, label: str) -> None:
    """Draw errors over their index; figures that are not finite get a cross at the top edge."""
    shown = [error if math.isfinite(error) and error > 0 else math.nan for error in errors]
    axes.plot(range(len(shown)), shown, color=colour, marker=marker, markersize=3, linewidth=1.2, label=label)
    broken = [index for index, error in enumerate(errors) if not math.isfinite(error)]
    if broken:
        edge = axes.get_xaxis_transform()
        axes.plot(broken, [EDGE] * len(broken), "x", color=BAD, transform=edge, label=f"{label}: not finite")


def _whole_decades(axes: Axes) -> None:
    """End the axis at powers of ten, three or more of them, so that it has labels and noise looks like noise."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    shown = [float(y) for y in drawn if math.isfinite(y) and y > 0 and y != EDGE]
    low, high = math.floor(math.log10(min(shown, default=1e-9))), math.ceil(math.log10(max(shown, default=1e-6)))
    missing = max(0, 3 - (high - low))
    axes.set_ylim(10.0 ** (low - missing // 2), 10.0 ** (high + missing - missing // 2))


def _limit(axes: Axes, limit: float | None, label: str) -> None:
    if limit:
        axes.axhline(limit, color=BAD, linestyle=(0, (4, 3)), linewidth=1.2, label=label)


def _limit_of(target: TargetResult, stage: str) -> float | None:
    """The relative error that a stage was allowed."""
    limits = [
        check.limits["relative"] for check in target.checks if check.stage == stage and "relative" in check.limits
    ]
    return max(limits, default=None)


def _legend(axes: Axes) -> None:
    """A legend above the plot, where it covers nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        borderaxespad=0.2,
        handlelength=1.6,
        labelcolor=INK,
        frameon=False,
    )


def _short_count(value: float, _: int) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"


def _svg(figure: Figure, label: str) -> str:
    """The figure as an inline ``<svg>`` element: no size of its own, no document head, page colours."""
    label = html.escape(label.encode("utf-8", errors="replace").decode())
    stream = io.StringIO()
    # Element names are hashes over the salt; a salt of its own keeps them apart from the page's other plots.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set_visible(False)
        # `savefig` would draw everything once more before, to find a size that we give
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1: the same in every plot, and nothing refers to them
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
