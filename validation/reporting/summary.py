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
            f"    {'ok  ' if check.passed else 'FAIL'} {check.stage}, {check.fed}: {check.detail}"
            for check in target.checks
            if check.stage == "greedy tokens" or not check.passed
        ]
        if target.bisection is not None:
            lines += [f"    {line}" for line in whereabouts(target.bisection)]
    if report.depth:
        lines.append(f"  compared: {report.depth}")
    return "\n".join(lines)


def whereabouts(bisection: Bisection) -> list[str]:
    """What looking inside the graphs found, in a few lines."""
    finding = bisection.finding
    if finding is None:
        return [f"inside ({bisection.case}, {bisection.num_steps} steps): {bisection.note}"]
    layer = "" if finding.layer is None else f"layer {finding.layer}, "
    lines = [
        f"first difference: {layer}{finding.tensor}, {finding.part}, step {finding.step} ({finding.graph}), "
        f"row {finding.row} ({finding.tenant}), case {bisection.case}",
        f"  source: {finding.source}: {finding.evidence}",
        f"  module {finding.module or 'none'}; error {finding.error:.3g}, allowed {finding.limit:.3g}",
    ]
    return lines + ([f"  made by {', '.join(finding.operators)}"] if finding.operators else [])


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
        f"first in {check.stage}, {check.fed}: {figures}; {check.detail}{_located(target)}"
    )


def _located(target: TargetResult) -> str:
    finding = target.bisection and target.bisection.finding
    if not finding:
        return ""
    return f". It starts at {finding.tensor}, step {finding.step}: {finding.source}, {finding.evidence}"
