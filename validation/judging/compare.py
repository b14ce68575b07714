"""Hold a bundle's targets against PyTorch: real prompts, and cases made of the bundle's ranges."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.serving.session import Session
from engines.serving.text import TextCodec
from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import GENERATOR, step_graphs
from iapt_export.contract.manifest import BundleManifest
from trainers.methods.forms import FORMS
from validation.judging.generators import compare_generator
from validation.judging.metrics import HISTOGRAM_EDGES
from validation.judging.result import TargetResult
from validation.judging.stages import Errors, compare_refusal, compare_steps, compare_tokens
from validation.sides.cases import (
    MIN_PROMPTS,
    QUICK_PROMPTS,
    QUICK_TOKENS,
    Case,
    Prompt,
    example_text,
    generated_cases,
    prompts_from_bundle,
)
from validation.sides.reference import Reference
from validation.sides.truth import Truth, record_fed, record_truth

OnStep = Callable[[str], None]
LARGE = 2 * 10**9
"""Parameters of a backbone above which a comparison is quick unless more is asked for."""
PROMPTS = "prompts"
"""The name of the case that compares the tenants' own prompts."""


@dataclass(frozen=True)
class Settings:
    """How much is compared."""

    seed: int = 0
    """Order of the prompts, and the tokens of the generated cases."""
    new_tokens: int = 64
    """Greedy tokens for each prompt."""
    device: str = "cpu"
    """``cpu`` or ``cuda``, for ONNX Runtime."""
    depth: str = "standard"
    """``quick`` (few prompts, few tokens), ``standard`` (all prompts, quick cases) or ``full`` (all cases)."""
    case: str | None = None
    """Only the case of this name; None takes all."""
    bisect: bool = False
    """Look inside the graphs although nothing failed."""
    peft_check: bool = True
    """Hold the reference against PEFT itself where a tenant's method is PEFT's and PEFT is installed."""
    runner: str = ""
    """``openvino``: compare the portable graphs there, and nothing else; empty compares the bundle's targets."""

    @property
    def is_quick(self) -> bool:
        """Whether little time is to be spent."""
        return self.depth == "quick"

    @property
    def steps(self) -> int:
        """Tokens for each prompt."""
        return min(self.new_tokens, QUICK_TOKENS) if self.is_quick else self.new_tokens

    def wants(self, name: str) -> bool:
        """Whether a case is to be run."""
        return self.case in (None, name)


def depth_for(model: Any) -> str:
    """How much is compared with a backbone where nobody says it."""
    return "quick" if sum(parameter.numel() for parameter in model.parameters()) > LARGE else "standard"


@dataclass(frozen=True)
class Truths:
    """The reference's answers, recorded once and held against every target."""

    prompts: list[Truth]
    cases: list[tuple[Case, list[Truth]]]
    """Refused cases have none."""


def measure_truth(
    bundle: Path, manifest: BundleManifest, reference: Reference, settings: Settings, on_step: OnStep
) -> Truths:
    """The reference's answers to prompts and cases, logits and caches kept where they are compared.

    Raises:
        IaptError: there is no case of the name that the settings ask for.
    """
    codec = TextCodec(bundle)
    cases = chosen_cases(manifest, settings, example_text(bundle, manifest, codec))
    prompts: list[Prompt] = []
    if settings.wants(PROMPTS):
        number = QUICK_PROMPTS if settings.is_quick else MIN_PROMPTS
        prompts = prompts_from_bundle(bundle, manifest, codec, settings.seed, settings.steps, number)

    on_step(text := "PyTorch generates the reference")
    answers = record_truth(
        reference,
        prompts,
        new_tokens=settings.steps,
        num_kept=_num_kept(manifest),
        on_step=lambda: on_step(text),
    )
    return Truths(answers, list(zip(cases, _case_truths(reference, cases, on_step), strict=True)))


def _case_truths(reference: Reference, cases: Sequence[Case], on_step: OnStep) -> list[list[Truth]]:
    """Each case's rows; all rows of all cases go through the backbone together."""
    asked = [case for case in cases if not case.is_refused]
    rows = [(case, prompt, fed) for case in asked for prompt, fed in zip(case.rows, case.fed, strict=True)]
    truths = record_fed(
        reference,
        [prompt for _, prompt, _ in rows],
        [fed for *_, fed in rows],
        lambda number: on_step(f"PyTorch computes case {rows[number][0]}"),
    )
    return [[truth for truth, (of, *_) in zip(truths, rows, strict=True) if of is case] for case in cases]


def chosen_cases(manifest: BundleManifest, settings: Settings, text: Sequence[int]) -> list[Case]:
    """The generated cases that the settings ask for.

    Raises:
        IaptError: there is no case of that name.
    """
    cases = generated_cases(manifest, settings.seed, text)
    names = [PROMPTS, *(case.name for case in cases)]
    if settings.case is not None and settings.case not in names:
        raise IaptError(f"case {settings.case!r} does not exist; this bundle's cases are {', '.join(names)}")
    everything = settings.depth == "full" or settings.case is not None
    return [case for case in cases if settings.wants(case.name) and (case.is_quick or everything)]


def _num_kept(manifest: BundleManifest) -> int:
    """Prompts whose logits and caches are compared: a full batch, and one of each tenant; they stand first."""
    return max(manifest.ranges.batch.max, len(manifest.tenants))


def compare_target(
    session: Session, reference: Reference, truths: Truths, settings: Settings, on_step: OnStep
) -> TargetResult:
    """Compare one runnable target with the reference.

    Args:
        session: active, on the target.
        reference: the PyTorch side.
        truths: its answers, from `measure_truth`.
        settings: how much is compared.
        on_step: called with a word on each step, for progress.
    """
    started = time.perf_counter()
    errors = Errors()
    target = session.target
    tokens = []
    if truths.prompts:
        _compare_generators(session, reference, truths.prompts, errors, on_step)
        for case, rows in _prompt_batches(session.manifest, truths.prompts):
            on_step(f"{target.name}: prefill and decode, {case}")
            compare_steps(session, f"batch {len(rows)}, {case}", rows, errors)
        tokens = compare_tokens(session, truths.prompts, settings.steps, errors, on_step)
    for generated, rows in truths.cases:
        on_step(f"{target.name}: case {generated}")
        if generated.is_refused:
            compare_refusal(session, generated, errors)
        else:
            compare_steps(session, generated.name, rows, errors)
    passed = all(check.passed for check in errors.checks)
    return TargetResult(
        name=result_name(session),
        dtype=target.dtype,
        status="pass" if passed else "fail",
        checks=errors.checks,
        by_layer=errors.by_layer,
        by_step=errors.by_step,
        histogram={"edges": HISTOGRAM_EDGES.tolist(), "counts": errors.counts.tolist()},
        tokens=tokens,
        seconds=time.perf_counter() - started,
        bisection=errors.bisection,
    )


def result_name(session: Session) -> str:
    """The target, and which of its graphs where it has two ways to run."""
    name, has_both = session.target.name, step_graphs(session.target.graphs, in_place=True)
    return f"{name}, portable graphs" if has_both and not session.stepper.in_place else name


def _prompt_batches(manifest: BundleManifest, truths: list[Truth]) -> list[tuple[str, list[Truth]]]:
    """The prompts whose logits and caches are compared: in mixed batches, and one of each method alone."""
    size, first = manifest.ranges.batch.max, truths[: _num_kept(manifest)]
    methods = {tenant.name: tenant.method for tenant in manifest.tenants}
    one_of_each = {methods.get(truth.prompt.tenant): truth for truth in reversed(first)}
    batches = [("mixed tenants, left padding", first[start : start + size]) for start in range(0, len(first), size)]
    if len(batches) > 1:
        batches = [(f"{case}, {number} of {len(batches)}", rows) for number, (case, rows) in enumerate(batches, 1)]
    return batches + [("one row", [truth]) for truth in reversed(one_of_each.values())]


def _compare_generators(
    session: Session, reference: Reference, truths: list[Truth], errors: Errors, on_step: OnStep
) -> None:
    """One prompt of each tenant that has generators, in batches."""
    if GENERATOR not in session.target.graphs or session.stepper.in_place:
        return
    on_step(f"{session.target.name}: generators")
    manifest = session.manifest
    generated = {spec.name for spec in manifest.methods if FORMS[spec.form].generates}
    one_each = list(
        {t.prompt.tenant: t for t in truths if manifest.tenant(t.prompt.tenant).method in generated}.values()
    )
    size = manifest.ranges.batch.max
    for start in range(0, len(one_each), size):
        compare_generator(session, reference, one_each[start : start + size], errors)
