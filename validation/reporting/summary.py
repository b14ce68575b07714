"""A report in a few lines, for a terminal and for error texts."""

from __future__ import annotations

from validation.judging.result import Bisection, Report, TargetResult


def summary(report: Report) -> str:
    """The verdict, a line for each target, and the checks that matter most."""
    lines = [f"verdict: {report.verdict}"]
    for target in report.targets:
        held = sum(check.passed for check in target.checks)
        reason = f" ({target.reason})" if target.reason else ""
        lines.append(
            f"  {target.name} {target.dtype}: {target.status}, {held} of {len(target.checks)} checks hold{reason}"
        )
        lines += [
            f"    {'ok  ' if check.passed else 'FAIL'} {check.stage}, {check.case}: {check.detail}"
            for check in target.checks
            if check.stage == "greedy tokens" or not check.passed
        ]
        if target.bisection is not None:
            lines += [f"    {line}" for line in whereabouts(target.bisection)]
    return "\n".join(lines)


def whereabouts(bisection: Bisection) -> list[str]:
    """What looking inside the graphs found, in a few lines."""
    found = bisection.finding
    if found is None:
        return [f"inside ({bisection.case}, {bisection.num_steps} steps): {bisection.note}"]
    layer = "" if found.layer is None else f"layer {found.layer}, "
    lines = [
        f"first difference: {layer}{found.tensor}, {found.part}, step {found.step} ({found.graph}), "
        f"row {found.row} ({found.tenant}), case {bisection.case}",
        f"  source: {found.source}: {found.evidence}",
        f"  module {found.module or 'none'}; error {found.error:.3g}, allowed {found.limit:.3g}",
    ]
    return lines + ([f"  made by {', '.join(found.operators)}"] if found.operators else [])


def failure(report: Report) -> str:
    """One sentence on what differs first, or on why nothing could be compared."""
    rows = [(target, check) for target in report.targets for check in target.checks if not check.passed]
    if not rows:
        reasons = "; ".join(f"{target.name}: {target.reason}" for target in report.targets)
        return f"no target could be run here, so parity is not shown ({reasons}); add --target onnxruntime"
    target, check = rows[0]
    figures = ", ".join(
        f"{name} {check.measured[name]:.3g}, allowed {limit:.3g}" for name, limit in check.limits.items()
    )
    return (
        f"{target.name} {target.dtype} differs from PyTorch in {len(rows)} checks, "
        f"first in {check.stage} ({check.case}): {figures}; {check.detail}{_located(target)}"
    )


def _located(target: TargetResult) -> str:
    found = target.bisection and target.bisection.finding
    return f". It starts at {found.tensor}, step {found.step}: {found.source}, {found.evidence}" if found else ""
