"""Hold a bundle's targets against PyTorch: real prompts, and cases made of the bundle's ranges."""

from __future__ import annotations

import dataclasses
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
from validation.judging.stages import Answers as Answers
from validation.judging.stages import (
    Errors,
    answer_freely,
    compare_refusal,
    compare_steps,
    compare_tokens,
    judge_short_cases,
    judge_tenants,
)
from validation.sides.cases import (
    MIN_PROMPTS,
    QUICK_PROMPTS,
    QUICK_TOKENS,
    SHORT_STEPS,
    Case,
    Prompt,
    example_text,
    generated_cases,
    prompts_from_bundle,
)
from validation.sides.reference import Reference
from validation.sides.truth import Truth, record_truth

OnStep = Callable[[str], None]
LARGE = 2 * 10**9
"""Parameters of a backbone above which a comparison is quick unless more is asked for."""
BRIEF = "brief"
"""What a quick comparison takes of int8 and int4 without rounding of activations, see `Settings.without_rounding`."""
BRIEF_STEPS = 4
"""Steps of each row there: reading, the first step after it, and two that read what steps wrote."""
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
    """``quick`` (few prompts, few tokens), ``standard`` (all prompts, quick cases) or ``full`` (all cases); and
    `BRIEF`, the quick cases with fewer tokens still."""
    case: str | None = None
    """Only the case of this name; None takes all."""
    bisect: bool = False
    """Look inside the graphs although nothing failed."""
    peft_check: bool = True
    """Hold the reference against PEFT itself where a tenant's method is PEFT's and PEFT is installed."""
    runner: str = ""
    """``openvino``: compare the portable graphs there, and nothing else; empty compares the bundle's targets."""
    adapters: tuple[str, ...] = ()
    """What is compared in the place of the bundle's own tenants, see `validation.newcomers`."""

    @property
    def is_quick(self) -> bool:
        """Whether little time is to be spent."""
        return self.depth in ("quick", BRIEF)

    @property
    def steps(self) -> int:
        """Tokens for each prompt."""
        most = {"quick": QUICK_TOKENS, BRIEF: BRIEF_STEPS}.get(self.depth, self.new_tokens)
        return min(self.new_tokens, most)

    @property
    def case_steps(self) -> int:
        """Tokens for each row of the cases that are not about long answers."""
        return BRIEF_STEPS if self.depth == BRIEF else SHORT_STEPS

    @property
    def without_rounding(self) -> Settings:
        """How much is compared of int8 and int4 without rounding of activations: nothing is left to chance there, and
        its products take many times as long.
        """
        return dataclasses.replace(self, depth=BRIEF if self.is_quick else "quick")

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
    bundle: Path,
    manifest: BundleManifest,
    reference: Reference,
    settings: Settings,
    on_step: OnStep,
    answers: Answers | None = None,
) -> Truths:
    """The reference's answers to prompts and cases, logits and caches kept where they are compared.

    Args:
        bundle: its folder.
        manifest: its manifest.
        reference: the PyTorch side.
        settings: how much is compared.
        on_step: called with a word on each step, for progress.
        answers: a target's to the same prompts, as drafts of the reference's.

    Raises:
        IaptError: there is no case of the name that the settings ask for.
    """
    codec = TextCodec(bundle)
    cases = chosen_cases(manifest, settings, example_text(bundle, manifest, codec))
    prompts = _chosen_prompts(bundle, manifest, settings)
    rows = [(case, given) for case in cases if not case.is_refused for given in zip(case.rows, case.fed, strict=True)]
    on_step(text := "PyTorch generates the reference")
    truths = record_truth(
        reference,
        prompts,
        new_tokens=settings.steps,
        num_kept=_num_kept(manifest),
        given=[given for _, given in rows],
        drafts=None if answers is None else [_padded(tokens, settings.steps) for tokens in answers.tokens],
        on_step=lambda: on_step(text),
        on_given=lambda number: on_step(f"PyTorch computes case {rows[number][0]}"),
    )
    free, fed = truths[: len(prompts)], truths[len(prompts) :]
    of_case = [(case, [truth for truth, (of, _) in zip(fed, rows, strict=True) if of is case]) for case in cases]
    return Truths(free, of_case)


def answers_of(session: Session, settings: Settings, on_step: OnStep) -> Answers:
    """What an active session answers to the prompts that the settings ask for."""
    prompts = _chosen_prompts(session.bundle, session.manifest, settings)
    return answer_freely(session, prompts, settings.steps, on_step)


def _chosen_prompts(bundle: Path, manifest: BundleManifest, settings: Settings) -> list[Prompt]:
    """The tenants' own prompts that the settings ask for; none where they ask for another case alone."""
    if not settings.wants(PROMPTS):
        return []
    number = QUICK_PROMPTS if settings.is_quick else MIN_PROMPTS
    return prompts_from_bundle(bundle, manifest, TextCodec(bundle), settings.seed, settings.steps, number)


def _padded(tokens: list[int], length: int) -> list[int]:
    """A draft of that length; any token will do for what is missing."""
    return (tokens + [0] * length)[:length]


def chosen_cases(manifest: BundleManifest, settings: Settings, text: Sequence[int]) -> list[Case]:
    """The generated cases that the settings ask for.

    Raises:
        IaptError: there is no case of that name.
    """
    cases = generated_cases(manifest, settings.seed, text, settings.case_steps)
    names = [PROMPTS, *(case.name for case in cases)]
    if settings.case is not None and settings.case not in names:
        raise IaptError(f"case {settings.case!r} does not exist; this bundle's cases are {', '.join(names)}")
    everything = settings.depth == "full" or settings.case is not None
    return [case for case in cases if settings.wants(case.name) and (case.is_quick or everything)]


def _num_kept(manifest: BundleManifest) -> int:
    """Prompts whose logits and caches are compared: a full batch, and one of each tenant; they stand first."""
    return max(manifest.ranges.batch.max, len(manifest.tenants))


def compare_target(
    session: Session,
    reference: Reference,
    truths: Truths,
    settings: Settings,
    on_step: OnStep,
    answers: Answers | None = None,
) -> TargetResult:
    """Compare one runnable target with the reference.

    Args:
        session: active, on the target.
        reference: the PyTorch side.
        truths: its answers, from `measure_truth`.
        settings: how much is compared.
        on_step: called with a word on each step, for progress.
        answers: the session's to the prompts, where they are known already.
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
        if answers is None:
            answers = answer_freely(session, [truth.prompt for truth in truths.prompts], settings.steps, on_step)
        tokens = compare_tokens(session, truths.prompts, answers, errors)
    for generated, rows in truths.cases:
        on_step(f"{target.name}: case {generated}")
        if generated.is_refused:
            compare_refusal(session, generated, errors)
        else:
            compare_steps(session, generated.name, rows, errors)
    judge_short_cases(target.dtype, errors)
    judge_tenants(target.dtype, errors)
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
