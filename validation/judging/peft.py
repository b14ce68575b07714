"""Hold the reference against PEFT itself where a method is PEFT's, because the reference could share our mistakes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from validation.judging.result import TargetResult
from validation.judging.stages import Errors, compare_rows
from validation.sides.peft_side import PeftFolder, peft_answer, peft_version, write_folders
from validation.sides.reference import Reference
from validation.sides.truth import Truth

NAME = "PEFT's own answer"
PROMPTS, STEPS = 2, 8
"""Prompts of each tenant, and tokens of each."""


def compare_peft(
    reference: Reference,
    truths: list[Truth],
    folders: Mapping[str, PeftFolder] | None,
    on_step: Callable[[str], None],
) -> TargetResult | None:
    """Compare PEFT's tokens and logits with the reference's.

    Args:
        reference: the PyTorch side.
        truths: its answers to the tenants' prompts.
        folders: tenant to the directory that the bundle is built from; None writes them from the bundle.
        on_step: called with a word on each step, for progress.

    Returns:
        A result like that of a target; None where no tenant's method is PEFT's, or PEFT is not installed.

    Raises:
        IaptError: PEFT cannot run an adapter.
    """
    if peft_version() == "not installed":
        return None
    started, errors = time.perf_counter(), Errors()
    with tempfile.TemporaryDirectory() as scratch:
        if folders is None:
            folders = write_folders(reference, Path(scratch))
        for tenant, folder in folders.items():
            rows = [truth for truth in truths if truth.prompt.tenant == tenant and truth.logits][:PROMPTS]
            for number, truth in enumerate(rows):
                on_step(f"PEFT answers for {tenant}")
                steps = min(STEPS, len(truth.free))
                tokens, logits = peft_answer(reference.model, folder, truth.prompt.tokens, steps)
                compare_rows(f"{tenant}, prompt {number + 1}", truth, tokens, logits, errors)
    if not errors.checks:
        return None
    passed = all(check.passed for check in errors.checks)
    return TargetResult(
        name=NAME,
        dtype="fp32",
        status="pass" if passed else "fail",
        reason=f"PEFT {peft_version()} over transformers' own attention, against the reference",
        checks=errors.checks,
        by_step=errors.by_step,
        seconds=time.perf_counter() - started,
    )
