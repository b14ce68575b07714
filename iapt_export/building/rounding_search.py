"""Measure settings of ``--quantise`` on this machine: how fast each decodes, and how near its answers are to PyTorch's.

Like the build itself, this file may look into every room; nothing but the build imports it.
`iapt_export.building.rounding_choice` says what is measured, and chooses.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.onnxruntime.cores import available_cores
from engines.serving.loading import open_runners, stepper_over
from engines.serving.session import Session
from engines.serving.stepper import Instruction
from engines.serving.text import TextCodec
from iapt_export.building import layout as layout
from iapt_export.building.plan import TargetPlan
from iapt_export.building.rounding_choice import Measured
from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import in_words
from iapt_export.contract.manifest import BundleManifest, TargetSpec
from iapt_export.graphs.save import WEIGHTS_FILE
from trainers.decoder.backbone import Backbone
from trainers.decoder.streamed import has_room_for
from validation.judging.metrics import kl
from validation.sides.cases import Prompt, own_prompts
from validation.sides.reference import Reference
from validation.sides.stepping import Row, run_steps
from validation.sides.truth import record_truth

OnStep = Callable[[str], None]
ANSWER_TOKENS = 16
"""Tokens of an answer that are compared at most; fewer where it ends before."""
SHORT_TOKENS = 4
"""So many are asked for first: a classifier's answers end within them, and need no more steps of PyTorch."""
MAX_PROMPTS = 256
"""Example prompts of all tenants that are compared at most."""
LOGITS_BYTES = 2**30
"""What PyTorch's logits may take in memory; a large vocabulary makes it fewer prompts."""
TOGETHER = 8
"""Prompts that PyTorch answers at a time."""
ROUNDS = 5
WARM_STEPS, TIMED_STEPS = 4, 16
"""Of each setting in each round; after another setting's turn the first steps find other weights in the caches."""
PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Answer:
    """What PyTorch answers to an example prompt."""

    prompt: Prompt
    tokens: tuple[int, ...]
    """Its greedy tokens, the one that ends it included."""
    logits: list[np.ndarray]
    """``[V]`` fp32 from which each of them was chosen."""


@dataclass(frozen=True)
class Asked:
    """A bundle without graphs, and PyTorch's answers to its tenants' prompts."""

    bundle: Path
    manifest: BundleManifest
    answers: list[Answer]
    """Those of one length together, so that rows which step together end together."""


def check_searchable(plan: Any, backbone: Backbone) -> None:
    """Refuse, before any export, a search that could not hold a setting against PyTorch.

    Args:
        plan: the `iapt_export.building.jobs.BuildPlan` with the type's own settings, which only the build may import.
        backbone: in fp32; its weights may be in their files.

    Raises:
        IaptError: an adapter was trained on rounded weights, or the backbone does not fit into memory in fp32.
    """
    for name, adapter in plan.tenants.adapters.items():
        if adapter.config.weights != "fp32":
            given = f" --quantise {adapter.config.quantise}" if adapter.config.quantise else ""
            raise IaptError(
                f"--quantise auto compares with PyTorch in fp32, and tenant {name} was trained on "
                f"{in_words(adapter.config.weights, adapter.config.quantise)} weights, on which it answers best; build "
                f"--target onnxruntime:{adapter.config.weights}{given}"
            )
    if not has_room_for(backbone.model, 1):
        raise IaptError(
            "--quantise auto compares with PyTorch in fp32, for which this backbone is too large here; give settings, "
            "such as --quantise block=64, and measure that bundle with your own data and iapt-export bench"
        )


def machine() -> list[str]:
    """What speeds depend on besides the files: the processor, and how much of it this process has."""
    lines = PROCESSORS.read_text(encoding="utf-8").splitlines() if PROCESSORS.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return [platform.system(), platform.machine(), *dict.fromkeys(names), str(available_cores())]


def searched_target(plan: Any) -> TargetPlan:
    """The target whose settings are searched."""
    targets: list[TargetPlan] = plan.targets
    return next(target for target in targets if target.rounding)


def ask_pytorch(plan: Any, bundle: Path, backbone: Backbone, on_step: OnStep) -> Asked:
    """Lay out what a session needs besides graphs, and record what PyTorch answers.

    Args:
        plan: with the type's own settings.
        bundle: an empty folder.
        backbone: in fp32, in memory.
        on_step: called with a word on each step, for progress.

    Raises:
        IaptError: an examples file cannot be read.
        BundleError: no prompt of some tenant fits the bundle.
    """
    layout.place_tokenizer(backbone, bundle)
    tenants = layout.place_tenants(plan.tenants, bundle, plan.backbone)
    manifest = layout.new_manifest(plan, tenants, [_target_spec(plan)])
    new_tokens = min(plan.request.new_tokens, ANSWER_TOKENS)
    fitting = LOGITS_BYTES // (4 * plan.backbone.vocab_size * new_tokens)
    most, room = max(1, min(MAX_PROMPTS, fitting)), max(new_tokens, WARM_STEPS + TIMED_STEPS + 1)
    prompts = own_prompts(bundle, manifest, TextCodec(bundle), room, most)
    reference = Reference(bundle, manifest, backbone)
    answers: list[Answer] = []
    for start in range(0, len(prompts), TOGETHER):
        on_step(f"PyTorch answers example prompts, {start} of {len(prompts)} done")
        answers += _answers(reference, prompts[start : start + TOGETHER], new_tokens)
    answers.sort(key=lambda answer: (len(answer.tokens), len(answer.prompt.tokens)))
    return Asked(bundle, manifest, answers)


def _answers(reference: Reference, prompts: list[Prompt], new_tokens: int) -> list[Answer]:
    """The answers to a few prompts, of at most so many tokens."""
    ends, made = reference.manifest.backbone.eos_token_ids, []
    for limit in (SHORT_TOKENS, new_tokens):
        truths = record_truth(reference, prompts, new_tokens=min(limit, new_tokens), num_kept=len(prompts))
        prompts = []
        for truth in truths:
            length = next((place for place, token in enumerate(truth.tokens, 1) if token in ends), None)
            if length is None and limit < new_tokens:
                prompts.append(truth.prompt)
            else:
                made.append(Answer(truth.prompt, tuple(truth.tokens[:length]), truth.logits[:length]))
    return made


def measure(asked: Asked, rivals: Sequence[Any], graphs: Sequence[Path], on_step: OnStep) -> list[Measured]:
    """Open all settings at once, let them decode in turns, and compare their answers.

    Args:
        asked: of `ask_pytorch`.
        rivals: a plan for each setting.
        graphs: the folder with each one's graphs.
        on_step: called with a word on each step, for progress.
    """
    with ExitStack() as stack:
        on_step("opening a session for each setting")
        sessions = [
            stack.enter_context(_session(asked, rival, folder)) for rival, folder in zip(rivals, graphs, strict=True)
        ]
        seconds = _decode_seconds(asked, sessions, on_step)
        measured = []
        for session, folder, rounds in zip(sessions, graphs, seconds, strict=True):
            on_step(
                f"comparing the answers of {in_words(session.target.dtype, session.target.quantise)} with PyTorch's"
            )
            agreed, divergence = _compare(asked, session)
            paths = {folder / spec.path for spec in session.target.graphs.values()} | {folder / WEIGHTS_FILE}
            size = sum(path.stat().st_size for path in paths)
            measured.append(Measured(session.target.quantise, size, rounds, agreed, divergence))
    return measured


def _target_spec(plan: Any) -> TargetSpec:
    target = searched_target(plan)
    specs = plan.specs[target.name]
    return TargetSpec(target.name, target.dtype, target.opset, specs, "", quantise=target.quantise)


def _session(asked: Asked, rival: Any, graphs: Path) -> Session:
    target = _target_spec(rival)
    runners = open_runners(graphs, target)
    stepper = stepper_over(asked.bundle, asked.manifest, target, runners, in_place=True)
    return Session(asked.bundle, asked.manifest, target, stepper)


def _decode_seconds(asked: Asked, sessions: list[Session], on_step: OnStep) -> list[dict[int, list[float]]]:
    """Rows to the median of a decode step in each round, for each session; every other round in reverse."""
    batches = [_shortest(asked.answers, rows) for rows in dict.fromkeys((1, asked.manifest.ranges.batch.max))]
    seconds: list[dict[int, list[float]]] = [{len(batch): [] for batch in batches} for _ in sessions]
    for number in range(ROUNDS):
        on_step(f"timing {len(sessions)} settings, round {number + 1} of {ROUNDS}")
        turns = list(zip(sessions, seconds, strict=True))
        for session, own in reversed(turns) if number % 2 else turns:
            for batch in batches:
                own[len(batch)].append(_step_seconds(session, batch))
    return seconds


def _shortest(answers: list[Answer], rows: int) -> list[Prompt]:
    """Short prompts of all tenants in turn."""
    by_tenant: dict[str, Prompt] = {}
    for answer in sorted(answers, key=lambda answer: len(answer.prompt.tokens)):
        by_tenant.setdefault(answer.prompt.tenant, answer.prompt)
    prompts = list(by_tenant.values())
    return [prompts[row % len(prompts)] for row in range(rows)]


def _step_seconds(session: Session, prompts: list[Prompt]) -> float:
    """The median time of a step of these rows, from their instructions on."""
    stepper, times = session.stepper, []
    try:
        stepper.read([Instruction(stepper.bank.get(prompt.tenant), prompt.tokens) for prompt in prompts])
        for _ in range(WARM_STEPS + TIMED_STEPS):
            started = time.perf_counter()
            stepper.step([prompt.tokens[0] for prompt in prompts])
            times.append(time.perf_counter() - started)
    finally:
        while stepper.num_rows:
            stepper.leave(stepper.num_rows - 1)
    return statistics.median(times[WARM_STEPS:])


def _compare(asked: Asked, session: Session) -> tuple[dict[str, list[bool]], float | None]:
    """Tenant to whether each token of its answers is PyTorch's, fed PyTorch's own; and the mean divergence."""
    agreed: dict[str, list[bool]] = {}
    divergences, size = [], asked.manifest.ranges.batch.max
    for start in range(0, len(asked.answers), size):
        answers = asked.answers[start : start + size]
        steps = max(len(answer.tokens) for answer in answers)
        fed = [answer.tokens + answer.tokens[-1:] * (steps - len(answer.tokens)) for answer in answers]
        rows = [Row(answer.prompt.tenant, answer.prompt.tokens, own) for answer, own in zip(answers, fed, strict=True)]
        for step in run_steps(session, rows, steps):
            for logits, answer in zip(step.logits, answers, strict=True):
                if step.number < len(answer.tokens):
                    same = int(logits.argmax()) == answer.tokens[step.number]
                    agreed.setdefault(answer.prompt.tenant, []).append(same)
                    divergences.append(kl(logits, answer.logits[step.number]))
    mean = float(np.mean(divergences))
    return agreed, mean if np.isfinite(mean) else None
