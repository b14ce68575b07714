"""Write what validation found: ``report.json`` for programs and a self-contained ``report.html`` for people.

The page loads nothing: style and plots stand in it, there are no scripts, and prompts and generated text are
escaped. Equal reports give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from iapt_export.contract.errors import BundleError
from iapt_export.contract.manifest import write_atomically
from iapt_export.contract.schema import read_object
from validation.judging.result import SCHEMA_VERSION, Bisection, Check, Finding, Report, TargetResult, TokenRow
from validation.reporting import plots

JSON_FILE = "report.json"
HTML_FILE = "report.html"
TEMPLATE_FOLDER = Path(__file__).parent / "templates"
TEMPLATE_FILE = "report.html.jinja"
AGAIN = "run 'iapt-export validate' again"
NEAR = 0.5
"""A share of a limit from which on it is coloured."""
MOST_SHARE = 1e6
HOLDS = -1.0
"""Stands for the share of a check that holds or does not."""
UPPER_METRICS = ("relative", "max_abs", "kl")
"""Metrics whose limit is a ceiling, so that the share of it that was used means something."""


@dataclass(frozen=True)
class Plot:
    """One picture of a target."""

    title: str
    caption: str
    svg: str
    """An ``<svg>`` element, safe to be put into a page."""


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.json`` and ``report.html`` into ``folder``, each whole or not at all.

    Returns:
        The path of the HTML page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(report.to_dict()), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(folder / JSON_FILE, _encode(text))
    write_atomically(folder / HTML_FILE, _encode(render_html(report)))
    return folder / HTML_FILE


def read_report(path: Path) -> Report:
    """Read ``report.json``, or the one inside a folder.

    Raises:
        BundleError: it is missing, no JSON, of another schema, or has missing or unknown fields.
    """
    path = path / JSON_FILE if path.is_dir() else path
    try:
        fields = read_object(path, AGAIN)
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist; 'iapt-export validate' writes it") from None
    if (version := fields.get("schema_version")) != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema_version is {version!r}, this version of iapt-export reads {SCHEMA_VERSION}; {AGAIN}"
        )
    try:
        targets = [_read_target(target) for target in fields.pop("targets")]
        return Report(**fields, targets=targets)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is not a report: {error}; {AGAIN}") from error


def render_html(report: Report) -> str:
    """The report as one HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=format_figure, share=share_of_limit, value=format_value)
    environment.globals.update(near=NEAR)
    return environment.get_template(TEMPLATE_FILE).render(
        report=report,
        headline=headline(report),
        maps={id(target): heat_map(target) for target in report.targets},
        plots={id(target): target_plots(target) for target in report.targets},
        counts={id(target): token_counts(target) for target in report.targets},
        agreeing=plots.agreeing_tokens,
        tolerance_columns=_columns(report.tolerances),
        id=id,
    )


def headline(report: Report) -> str:
    """The verdict in one sentence."""
    compared = [target for target in report.targets if target.status in ("pass", "fail")]
    failed = sum(not check.passed for target in report.targets for check in target.checks)
    not_run = len(report.targets) - len(compared)
    if report.verdict != "pass":
        return f"{_count(failed, 'check')} did not hold: do not deploy this bundle. What failed stands first below."
    text = "Nothing could be run here; interfaces and files agree with the manifest."
    if compared:
        names = " and ".join(f"{target.name} {target.dtype}" for target in compared)
        verb = "computes" if len(compared) == 1 else "compute"
        text = f"{names} {verb} what PyTorch computes, within the limits below."
    if compared and not_run:
        text += f" {_count(not_run, 'target')} could not be run on this machine and was checked as far as possible."
    return text


def token_counts(target: TargetResult) -> dict[str, int]:
    """Prompts whose greedy tokens are identical, excused and different."""
    identical = sum(row.first_divergence is None for row in target.tokens)
    excused = sum(row.first_divergence is not None and row.excused for row in target.tokens)
    total = len(target.tokens)
    return {"total": total, "identical": identical, "excused": excused, "different": total - identical - excused}


def target_plots(target: TargetResult) -> list[Plot]:
    """The pictures for which there are figures."""
    candidates: list[tuple[Any, str, str, Callable[[TargetResult], str]]] = [
        (
            target.bisection and target.bisection.errors,
            "Error inside the graph",
            "Every tensor that could be held against a PyTorch module, at the last step that was looked at.",
            plots.error_inside,
        ),
        (
            target.by_layer,
            "Error per layer",
            "Worst difference from PyTorch in soft prompts and cache, over the largest value of the layer's tensor.",
            plots.error_per_layer,
        ),
        (
            target.by_step,
            "Error per step",
            "Worst difference of the logits, over the largest of them. It must not grow as the cache does.",
            plots.error_per_step,
        ),
        (
            target.histogram.get("counts"),
            "Distribution of the error",
            "All compared logits, by the power of ten of their absolute difference.",
            plots.error_histogram,
        ),
        (
            target.tokens,
            "Token agreement",
            "Greedy tokens of each prompt up to the first that differs from PyTorch's.",
            plots.token_agreement,
        ),
    ]
    return [Plot(title, caption, draw(target)) for figures, title, caption, draw in candidates if figures]


@dataclass(frozen=True)
class HeatMap:
    """How much of its limit each stage used in each case."""

    stages: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]
    """Case, and for each stage a style (``none``, ``under``, ``near``, ``over``) and a text."""


def heat_map(target: TargetResult) -> HeatMap:
    """Cases by stages; failed cases first."""
    stages = list(dict.fromkeys(check.stage for check in target.checks))
    cells: dict[str, dict[str, float]] = {}
    for check in target.checks:
        used = cells.setdefault(check.fed, {})
        used[check.stage] = max(used.get(check.stage, HOLDS), _used(check))
    cases = sorted(cells, key=lambda case: max(cells[case].values()) <= 1)
    return HeatMap(stages, [(case, [_cell(cells[case].get(stage)) for stage in stages]) for case in cases])


def _used(check: Check) -> float:
    """The largest part of a limit that was used, more than 1 where the check failed; `HOLDS` of yes/no checks."""
    shares = [share for name in check.limits if (share := share_of_limit(check, name)) is not None]
    if check.passed:
        return max(shares, default=HOLDS)
    return min(max([*shares, 1.01]), MOST_SHARE) if shares else math.inf


def _cell(share: float | None) -> tuple[str, str]:
    if share is None:
        return "none", ""
    if share == HOLDS:
        return "under", "yes"
    if share == math.inf:
        return "over", "no"
    if share > 1:
        return "over", f"{share:.0f}×" if 1.5 < share < 1e4 else "over"
    return "near" if share > NEAR else "under", f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"


def format_figure(number: float) -> str:
    """A number the way people read it: ``3.1e-6``, ``0.25``, ``24``, ``1-2e-8``."""
    if not math.isfinite(number):
        return "not finite"
    if number == int(number) and abs(number) < 1e6:
        return str(int(number))
    if 0 < abs(1 - number) < 1e-3:  # a cosine: its distance from 1 is what counts
        return f"1{'-' if number < 1 else '+'}{format_figure(abs(1 - number))}"
    if 1e-2 <= abs(number) < 1e4:
        return f"{number:.4g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_value(value: Any) -> str:
    """A cell of the tolerance table."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    return format_figure(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def share_of_limit(check: Check, metric: str) -> float | None:
    """The part of a ceiling that was used, None where the limit is no ceiling."""
    limit, measured = check.limits.get(metric), check.measured[metric]
    if metric not in UPPER_METRICS or not limit:
        return None
    return measured / limit if math.isfinite(measured) else math.inf


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Every key of the rows, in order of first appearance, the reasons last."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return sorted(keys, key=lambda key: key == "reason")


def _encode(text: str) -> bytes:
    """UTF-8; a lone surrogate, which generated text may hold, becomes a question mark instead of an error."""
    return text.encode("utf-8", errors="replace")


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity: they are written as the strings that ``float`` reads."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read_target(fields: dict[str, Any]) -> TargetResult:
    checks = [Check(**{**check, "measured": _floats(check["measured"])}) for check in fields.pop("checks")]
    tokens = [TokenRow(**row) for row in fields.pop("tokens")]
    by_layer = {name: list(map(float, errors)) for name, errors in fields.pop("by_layer").items()}
    by_step = [float(error) for error in fields.pop("by_step")]
    bisection = _read_bisection(fields.pop("bisection"))
    return TargetResult(**fields, checks=checks, tokens=tokens, by_layer=by_layer, by_step=by_step, bisection=bisection)


def _read_bisection(fields: dict[str, Any] | None) -> Bisection | None:
    if fields is None:
        return None
    raw = fields.pop("finding")
    finding = None if raw is None else Finding(**{**raw, "error": float(raw["error"])})
    errors = [(name, layer, float(error)) for name, layer, error in fields.pop("errors")]
    return Bisection(**fields, finding=finding, errors=errors)


def _floats(figures: dict[str, Any]) -> dict[str, float]:
    return {name: float(figure) if isinstance(figure, str) else figure for name, figure in figures.items()}
