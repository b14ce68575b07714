"""Choose the batch to look into when a target fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from engines.serving.session import Session
from validation.judging.compare import Settings, Truths
from validation.judging.result import TargetResult
from validation.locating.bisect import bisect_target
from validation.sides.reference import Reference
from validation.sides.stepping import Row
from validation.sides.truth import Truth

OnStep = Callable[[str], None]
MAX_ROWS = 3
"""Rows of prompts that are looked into first: with taps, a batch of prompts takes hundreds of megabytes."""
STEPPED = (
    "prefill logits",
    "prefill cache",
    "decode logits",
    "decode cache",
    "typical logits",
    "top-1 agreement",
    "greedy tokens",
)
"""Stages of which a batch can be run again with taps."""


def look_inside(
    session: Session,
    reference: Reference,
    truths: Truths,
    result: TargetResult,
    settings: Settings,
    on_step: OnStep,
) -> TargetResult:
    """Find where a failed target first differs; also where it did not fail but the settings ask for it.

    Returns:
        The result with what was found; as it is where nothing failed and nobody asked, or where the target's graphs are
        no ONNX.
    """
    stepped = [check.case for check in result.checks if not check.passed and check.stage in STEPPED]
    if session.target.name != "onnxruntime" or not (stepped or settings.bisect):
        return result
    bisection = result.bisection
    for case, batch in _batches(truths, stepped[0] if stepped else None):
        rows = [Row(truth.prompt.tenant, truth.prompt.tokens, truth.fed) for truth in batch]
        bisection = bisect_target(
            session,
            reference,
            rows,
            case=case,
            is_wrong=bool(stepped),
            device=settings.device,
            on_step=on_step,
        )
        if bisection.finding or not stepped:
            break
    return dataclasses.replace(result, bisection=bisection)


def _batches(truths: Truths, failed: str | None) -> list[tuple[str, list[Truth]]]:
    """The batches to look into, one after the other until something is found: the generated case that failed, or a few
    prompts of different tenants and lengths, then a full batch of them.
    """
    failed_cases = [(case.name, rows) for case, rows in truths.cases if rows and case.name == failed]
    if failed_cases:
        return failed_cases
    if not truths.prompts:
        return [(case.name, rows) for case, rows in truths.cases if rows][:1]
    size = max(MAX_ROWS, 1)
    one_each = list({truth.prompt.tenant: truth for truth in reversed(truths.prompts)}.values())
    few = sorted(one_each, key=lambda truth: len(truth.prompt.tokens))[:: max(1, len(one_each) // size)][:size]
    whole = [truth for truth in truths.prompts if truth.logits]
    return [("prompts", few), ("prompts", whole)]
