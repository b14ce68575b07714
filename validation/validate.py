"""Run every comparison that this machine can, check the rest as far as it can be, and write the verdict."""

from __future__ import annotations

import dataclasses
import functools
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.native import add_kernels
from engines.serving.loading import cache_kinds, on_device, open_runners, stepper_over
from engines.serving.session import Session
from iapt_export.contract.errors import NotRunnableError
from iapt_export.contract.low_bits import in_words
from iapt_export.contract.manifest import BundleManifest, Parity, TargetSpec
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.streamed import copies_compared, is_streamed, load_or_stream
from validation.judging.compare import (
    PROMPTS,
    Answers,
    OnStep,
    Settings,
    Truths,
    answers_of,
    compare_target,
    measure_truth,
)
from validation.judging.engine_interface import check_built_engines
from validation.judging.peft import compare_peft
from validation.judging.result import Report, TargetResult
from validation.judging.shipped import compare_shipped
from validation.judging.tolerances import rows_for
from validation.locating.locate import look_inside
from validation.newcomers import newcomers
from validation.sides.engine_graphs import graph_runners, graphs_folder
from validation.sides.peft_side import PeftFolder, peft_version
from validation.sides.portable import portable_runners, portable_target
from validation.sides.reference import Reference
from validation.sides.rounding import unrounded_session, with_rounded_weights

OpenSession = Callable[[TargetSpec, bool], Session]
"""Takes a target, and whether its cache is written in place; the session is not active yet."""


def validate_bundle(
    bundle: Path,
    manifest: BundleManifest,
    backbone: Any,
    settings: Settings,
    on_step: OnStep = lambda _: None,
    name: str = "",
    peft_folders: Mapping[str, PeftFolder] | None = None,
    graph_folders: Sequence[Path] = (),
) -> Report:
    """Compare a bundle with PyTorch.

    Args:
        bundle: its folder.
        manifest: its manifest, already checked against the files.
        backbone: the `trainers.decoder.backbone.Backbone` that the bundle was built from, in fp32.
        settings: how much is compared.
        on_step: called with a word on each step, for progress.
        name: what the report calls the bundle; its folder's name unless it stands under a temporary one.
        peft_folders: tenant to the adapter directory that it was built from, where PEFT reads it; None writes such
            directories from the bundle.
        graph_folders: where graphs may lie that TensorRT's engines were built from, beside the bundle.

    Returns:
        The report; its verdict is ``fail`` when any check fails, or when no target at all could be run.

    Raises:
        IaptError: the backbone is another one, the example prompts cannot be read, or an adapter of the settings is
            none for this bundle.
    """
    if settings.adapters:
        with newcomers(settings.adapters, bundle, manifest, backbone) as (others, folders):
            return _report(bundle, others, backbone, settings, on_step, name, folders, graph_folders)
    return _report(bundle, manifest, backbone, settings, on_step, name, peft_folders, graph_folders)


def _report(
    bundle: Path,
    manifest: BundleManifest,
    backbone: Any,
    settings: Settings,
    on_step: OnStep,
    name: str,
    peft_folders: Mapping[str, PeftFolder] | None,
    graph_folders: Sequence[Path],
) -> Report:
    targets = compared_targets(manifest, settings.runner, settings.device)
    open_graphs = portable_runners if settings.runner else functools.partial(open_runners, device=settings.device)

    def open_session(target: TargetSpec, in_place: bool) -> Session:
        stepper = stepper_over(bundle, manifest, target, open_graphs(bundle, target), in_place=in_place)
        return Session(bundle, manifest, target, stepper)

    reference = Reference(bundle, manifest, backbone)
    # a target whose tokens are mostly PyTorch's saves it most of its steps; over a streamed backbone, where each takes
    # a reading of all weights, any target's do
    drafting = [target for target in targets if is_streamed(reference.model) or not target.rounding]
    first, drafts = _first_answers(open_session, drafting if settings.wants(PROMPTS) else [], settings, on_step)
    truths = measure_truth(bundle, manifest, reference, settings, on_step, drafts)
    results = []
    for target in targets:
        try:
            for in_place in cache_kinds(target):
                answers = drafts if (target, in_place) == first else None
                results += _compared(open_session, target, in_place, reference, truths, settings, on_step, answers)
        except NotRunnableError as error:
            on_step(f"{target.name}: not runnable here, checking the built engines")
            results.append(_not_run(bundle, manifest, target, str(error)))
            folder = graphs_folder(target, [bundle, *graph_folders])
            if folder and target.rounding:
                open_graphs_of = functools.partial(_graph_session, bundle, manifest, folder)
                same = dataclasses.replace(target, name=f"graphs of {target.name} in onnxruntime")
                results.append(_with_rounded(open_graphs_of, same, target, reference, settings, on_step))
    ran = [result for result in results if result.status in ("pass", "fail")]
    shipped = compare_shipped(reference, on_step) if settings.wants(PROMPTS) else None
    results += [shipped] if shipped else []
    if settings.peft_check and truths.prompts:
        peft = compare_peft(reference, truths.prompts, peft_folders, on_step)
        results += [peft] if peft else []
    passed = bool(ran) and all(check.passed for result in results for check in result.checks)
    name = name or bundle.name
    return Report(
        bundle=name,
        verdict="pass" if passed else "fail",
        backbone=manifest.backbone.name_or_path,
        method=", ".join(dict.fromkeys(tenant.trained_form for tenant in manifest.tenants)) or "none",
        tenants=[tenant.name for tenant in manifest.tenants],
        seed=settings.seed,
        created="",
        environment=environment(settings.device) | {"backbone": how_computed(reference.model)},
        tolerances=rows_for({result.dtype for result in results}),
        targets=results,
        command=command_again(name, manifest.backbone.name_or_path, settings),
        depth=f"case {settings.case}" if settings.case else settings.depth,
    )


def command_again(bundle: str, model: str, settings: Settings) -> str:
    """What a shell takes to compare as much once more; all cases where a build chose among them by itself."""
    words = ["iapt-export", "validate", bundle, "--model", model]
    words += ["--seed", str(settings.seed), "--new-tokens", str(settings.new_tokens)]
    words += ["--case", settings.case] if settings.case else ["--quick"] if settings.is_quick else []
    words += ["--device", settings.device] if settings.device != "cpu" else []
    words += ["--runner", settings.runner] if settings.runner else []
    words += [] if settings.peft_check else ["--no-peft-check"]
    words += [word for adapter in settings.adapters for word in ("--adapter", adapter)]
    return shlex.join(words)


def loader_for(manifest: BundleManifest) -> Callable[..., Backbone]:
    """What loads a bundle's backbone for a comparison: streamed where there is no room for it.

    A backbone that an adapter was merged into is loaded as a whole, because its weights are computed.
    """
    if any(tenant.method is None for tenant in manifest.tenants):
        return load_backbone
    copies = copies_compared(target.rounding for target in manifest.targets)
    return functools.partial(load_or_stream, copies=copies)


def compared_targets(manifest: BundleManifest, runner: str = "", device: str = "cpu") -> list[TargetSpec]:
    """What is compared: the bundle's targets, or its portable graphs in another runtime.

    Raises:
        NotRunnableError: that runtime is not installed, or does not run on that device.
        IaptError: the bundle has no graphs for it.
    """
    return [portable_target(manifest)] if runner else [on_device(target, device) for target in manifest.targets]


def _first_answers(
    open_session: OpenSession, targets: list[TargetSpec], settings: Settings, on_step: OnStep
) -> tuple[tuple[TargetSpec, bool] | None, Answers | None]:
    """The first target that runs here, with its kind of cache, and its answers to the prompts; None where none does."""
    for target in targets:
        in_place = cache_kinds(target)[0]
        try:
            with open_session(target, in_place) as session:
                return (target, in_place), answers_of(session, settings, on_step)
        except NotRunnableError:
            continue
    return None, None


def _compared(
    open_session: OpenSession,
    target: TargetSpec,
    in_place: bool,
    reference: Reference,
    truths: Truths,
    settings: Settings,
    on_step: OnStep,
    answers: Answers | None,
) -> list[TargetResult]:
    """What comes of a target over one kind of cache; its answers to the prompts where they are known already."""
    rounding = target.rounding
    if rounding and rounding.is_scaled:
        with open_session(target, in_place) as session:
            served = _served(session, reference, truths, settings, on_step, answers)
        return [served, _with_rounded(open_session, target, target, reference, settings, on_step)]
    with open_session(target, in_place) as session:
        result = _served(session, reference, truths, settings, on_step, answers)
    if rounding:
        return _without_rounding(session, reference, truths, result, settings, on_step)
    return [look_inside(session, reference, truths, result, settings, on_step)]


def _served(
    session: Session,
    reference: Reference,
    truths: Truths,
    settings: Settings,
    on_step: OnStep,
    answers: Answers | None,
) -> TargetResult:
    """A target as it is served, against PyTorch: with the same weights where a user chose how they are rounded.

    int8's and int4's limits against fp32 were measured with these types' own rounding. What another costs is for the
    user's own task to say; what the kernels add to it, by rounding activations, has to stay within the same limits.
    """
    target = session.target
    if not target.rounding or not target.quantise:
        return compare_target(session, reference, truths, settings, on_step, answers)
    stored = in_words(target.dtype, target.quantise)
    on_step(f"{target.name}: rounding PyTorch's weights to {stored}")
    rounded = with_rounded_weights(reference, target.rounding)
    answers = answers or answers_of(session, settings, on_step)
    same = measure_truth(session.bundle, session.manifest, rounded, settings, on_step, answers)
    result = compare_target(session, rounded, same, settings, on_step, answers)
    return dataclasses.replace(result, name=f"{result.name} beside PyTorch with {stored} weights")


def _without_rounding(
    session: Session, reference: Reference, truths: Truths, result: TargetResult, settings: Settings, on_step: OnStep
) -> list[TargetResult]:
    """A quantised target's result, and that of the same graphs with rounded weights and nothing else, on both sides.

    Where the first failed, it is looked into without the rounding of activations as well, which would hide where an
    error begins; but not where the backbone is read layer by layer, once for each row and step that is looked into.
    """
    target = session.target
    stored = in_words(target.dtype, target.quantise)
    on_step(f"{target.name}: rounding PyTorch's weights to {stored}")
    rounding = target.rounding
    assert rounding is not None
    reference = with_rounded_weights(reference, rounding)
    less = settings.without_rounding
    exact = unrounded_session(session)
    with exact:
        answers = answers_of(exact, less, on_step)
    # closed meanwhile: of a large backbone, its packed weights and PyTorch's work take a few GiB each
    exact_truths = measure_truth(session.bundle, session.manifest, reference, less, on_step, answers)
    with exact:
        exact_result = compare_target(exact, reference, exact_truths, less, on_step, answers)
    name = f"{target.name} with {stored} weights, otherwise"  # its type, fp32, follows wherever it is shown
    if not is_streamed(reference.model):
        result = look_inside(exact, reference, truths, result, dataclasses.replace(settings, bisect=False), on_step)
    exact_result = dataclasses.replace(exact_result, name=name)
    return [result, look_inside(exact, reference, exact_truths, exact_result, less, on_step)]


def _with_rounded(
    open_session: OpenSession,
    shown: TargetSpec,
    target: TargetSpec,
    reference: Reference,
    settings: Settings,
    on_step: OnStep,
) -> TargetResult:
    """What TensorRT's rounded weights compute, against PyTorch with the same weights.

    Nothing rounds activations to fewer bits than fp16 has, so fp16's limits hold.

    Args:
        open_session: opens engines, or their graphs in ONNX Runtime.
        shown: the target under the name that it has in the report.
        target: as the bundle has it.
        reference: with the weights as they were.
        settings: how much is compared; as much as int8 and int4 without rounding of activations.
        on_step: called with a word on each step, for progress.
    """
    rounding = target.rounding
    assert rounding is not None
    stored = in_words(target.dtype, target.quantise)
    on_step(f"{shown.name}: rounding PyTorch's weights to {stored}")
    rounded, less = with_rounded_weights(reference, rounding), settings.without_rounding
    with open_session(dataclasses.replace(shown, dtype="fp16"), True) as session:
        answers = answers_of(session, less, on_step)
        same = measure_truth(session.bundle, session.manifest, rounded, less, on_step, answers)
        result = compare_target(session, rounded, same, less, on_step, answers)
    return dataclasses.replace(result, name=f"{shown.name} with {stored} weights, otherwise")


def _graph_session(bundle: Path, manifest: BundleManifest, folder: Path, target: TargetSpec, in_place: bool) -> Session:
    """A session over the graphs of engines, in ONNX Runtime; not active yet."""
    stepper = stepper_over(bundle, manifest, target, graph_runners(folder, target), in_place=in_place)
    return Session(bundle, manifest, target, stepper)


def parity_from_report(report: Report) -> Parity:
    """What the manifest keeps of a report: the limits, the worst figure of each stage and target, what was compared."""
    limits: dict[str, dict[str, float]] = {}
    for row in report.tolerances:
        limits.setdefault(f"{row['stage']} {row['dtype']}", {})[row["metric"]] = row["limit"]
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for target in report.targets:
        stages = measured.setdefault(f"{target.name}:{target.dtype}", {})
        for check in target.checks:
            worst = stages.get(check.stage)
            if worst is None or check.measured.get("relative", 0) > worst.get("relative", 0):
                stages[check.stage] = check.measured
    cases = {
        f"{target.name}:{target.dtype}": list(dict.fromkeys(check.case for check in target.checks))
        for target in report.targets
    }
    return Parity(report.verdict, limits, measured, report.depth, cases)


def how_computed(model: Any) -> str:
    """Where PyTorch's side had its weights."""
    return "read layer by layer" if is_streamed(model) else "in memory"


def environment(device: str) -> dict[str, str]:
    """Versions, hardware and kernels that the figures depend on."""
    import numpy
    import onnxruntime
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": numpy.__version__,
        "peft": peft_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "ai.iapt::Rational": add_kernels(onnxruntime.SessionOptions(), device),
        "threads": str(torch.get_num_threads()),
    }


def _not_run(bundle: Path, manifest: BundleManifest, target: TargetSpec, reason: str) -> TargetResult:
    return TargetResult(
        name=target.name,
        dtype=target.dtype,
        status="checked, not run",
        reason=reason,
        checks=check_built_engines(bundle, manifest, target),
    )
