"""Hold a bundle's targets against PyTorch: generators, prefill, every decode step, greedy tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engines.in_place import InPlaceStepper
from engines.request import Request
from engines.runner import Arrays
from engines.session import Session
from engines.stepper import Instruction, Stepper
from engines.text import TextCodec
from iapt_export.manifest import BundleManifest
from validation.cases import prompts_from_bundle
from validation.metrics import HISTOGRAM_EDGES, cosine, error_counts, max_abs, relative
from validation.reference import Reference, numpy
from validation.result import Check, TargetResult, TokenRow
from validation.tolerances import tolerance
from validation.truth import RowCache, Truth, padded, record_truth

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How much is compared."""

    seed: int = 0
    """Order of the prompts."""
    new_tokens: int = 64
    """Greedy tokens for each prompt."""
    device: str = "cpu"
    """``cpu`` or ``cuda``, for ONNX Runtime."""


@dataclass
class _Errors:
    """The figures of one comparison as they come in."""

    checks: list[Check] = field(default_factory=list)
    by_layer: dict[str, list[float]] = field(default_factory=dict)
    by_step: list[float] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1))

    def judge(self, stage: str, case: str, dtype: str, measured: dict[str, float], detail: str = "") -> None:
        """Add a check of ``measured`` against the table's limit for the stage."""
        limit = tolerance(stage, dtype)
        passed = limit is None or limit.holds(measured[limit.metric])
        limits = {} if limit is None else {limit.metric: limit.limit}
        self.checks.append(Check(stage, case, passed, measured, limits, detail))

    def layers(self, part: str, errors: list[float]) -> None:
        """Keep the worst error of each layer over all cases."""
        before = self.by_layer.get(part, [0.0] * len(errors))
        self.by_layer[part] = [max(pair) for pair in zip(before, errors, strict=True)]


def measure_truth(
    bundle: Path, manifest: BundleManifest, reference: Reference, settings: Settings, on_step: OnStep
) -> list[Truth]:
    """The reference's answers to the bundle's prompts, logits and caches kept for a full batch and each tenant."""
    codec = TextCodec(bundle)
    prompts = prompts_from_bundle(bundle, manifest, codec, settings.seed, settings.new_tokens)
    return record_truth(
        reference,
        prompts,
        new_tokens=settings.new_tokens,
        num_kept=_num_kept(manifest),
        on_step=lambda: on_step("PyTorch generates the reference"),
    )


def _num_kept(manifest: BundleManifest) -> int:
    """Prompts whose logits and caches are compared: a full batch, and one of each tenant; they stand first."""
    return max(manifest.ranges.batch.max, len(manifest.tenants))


def compare_target(
    session: Session, reference: Reference, truths: list[Truth], settings: Settings, on_step: OnStep
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
    errors = _Errors()
    target = session.target
    size = session.manifest.ranges.batch.max
    first = truths[: _num_kept(session.manifest)]
    in_place = isinstance(session.stepper, InPlaceStepper)
    if "generator" in target.graphs and not in_place:
        on_step(f"{target.name}: generators")
        generated = {spec.name for spec in session.manifest.methods if spec.form == "IAPT"}
        one_each = list(
            {
                t.prompt.tenant: t for t in truths if session.manifest.tenant(t.prompt.tenant).method in generated
            }.values()
        )
        for start in range(0, len(one_each), size):
            _compare_generator(session, reference, one_each[start : start + size], errors)
    methods = {tenant.name: tenant.method for tenant in session.manifest.tenants}
    one_of_each = {methods[truth.prompt.tenant]: truth for truth in reversed(first)}
    batches = [("mixed tenants, left padding", first[start : start + size]) for start in range(0, len(first), size)]
    batches += [("one row", [truth]) for truth in reversed(one_of_each.values())]
    for case, rows in batches:
        on_step(f"{target.name}: prefill and decode, {case}")
        _compare_steps(session, f"batch {len(rows)}, {case}", rows, errors)
    tokens = _compare_tokens(session, truths, settings, errors, on_step)
    passed = all(check.passed for check in errors.checks)
    return TargetResult(
        name=target.name if in_place or "serve" not in target.graphs else f"{target.name}, portable graphs",
        dtype=target.dtype,
        status="pass" if passed else "fail",
        checks=errors.checks,
        by_layer=errors.by_layer,
        by_step=errors.by_step,
        histogram={"edges": HISTOGRAM_EDGES.tolist(), "counts": errors.counts.tolist()},
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )


def _compare_generator(session: Session, reference: Reference, rows: list[Truth], errors: _Errors) -> None:
    """Feed the generator graph what the reference's generators read, rows of different tenants in one batch."""
    length = max(len(row.prompt.tokens) for row in rows)
    backbone = session.manifest.backbone
    hidden = np.zeros((len(rows), backbone.num_layers, length, backbone.hidden_size), np.float32)
    wanted = []
    mask = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        ids, ones = padded([row.prompt.tokens], 0)
        prompts, states = reference.prompts_and_hidden(row.prompt.tenant, ids, ones)
        hidden[index, :, length - ids.shape[1] :] = numpy(states[0])
        mask[index, length - ids.shape[1] :] = 1
        wanted.append(numpy(prompts[0]))
    bank = session.stepper.bank
    feeds: Arrays = {**bank.stacks, **bank.indices([bank.get(row.prompt.tenant) for row in rows])}
    dtype = next(array.dtype for name, array in feeds.items() if name.endswith(".down_weight"))
    feeds |= {"hidden_states": hidden.astype(dtype), "attention_mask": mask}
    with session.stepper.runners["generator"] as runner:
        made = runner.infer({t.name: feeds[t.name] for t in runner.spec.inputs})["prompts"].astype(np.float32)
    expected: np.ndarray = np.zeros_like(made)
    for index, array in enumerate(wanted):  # shorter prompts stand at the end, before the instruction
        expected[index, :, -array.shape[1] :] = array
    by_layer = [relative(made[:, layer], expected[:, layer]) for layer in range(made.shape[1])]
    errors.layers("prompt", by_layer)
    worst = int(np.argmax(by_layer))
    measured = {"relative": by_layer[worst], "max_abs": max_abs(made, expected), "cosine": cosine(made, expected)}
    case = f"batch {len(rows)}, one row a tenant"
    errors.judge("generator", case, session.target.dtype, measured, f"worst in layer {worst}")


def _compare_steps(session: Session, case: str, truths: list[Truth], errors: _Errors) -> None:
    """Feed the reference's own tokens, so that each step is compared on equal ground."""
    dtype = session.target.dtype
    stepper = session.stepper
    logits = stepper.read([Instruction(stepper.bank.get(truth.prompt.tenant), truth.prompt.tokens) for truth in truths])
    measured = _compare_logits(logits, truths, 0, errors)
    errors.judge("prefill logits", case, dtype, measured)
    _compare_cache(stepper, [truth.prefill_cache for truth in truths], "prefill cache", case, dtype, errors)
    num_steps, agreed = len(truths[0].tokens), measured["agreed"]
    worst: dict[str, float] = {}
    for step in range(1, num_steps):
        logits = stepper.step([truth.tokens[step - 1] for truth in truths])
        measured = _compare_logits(logits, truths, step, errors)
        agreed += measured["agreed"]
        if not worst or measured["relative"] > worst["relative"]:
            worst = {**measured, "step": step}
    if worst:
        errors.judge("decode logits", case, dtype, worst, f"worst at step {worst['step']}")
        _compare_cache(stepper, [truth.final_cache for truth in truths], "decode cache", case, dtype, errors)
    compared = {"agreement": agreed / num_steps, "compared": float(num_steps * len(truths))}
    errors.judge("top-1 agreement", case, dtype, compared)
    while stepper.num_rows:
        stepper.leave(0)


def _compare_logits(logits: np.ndarray, truths: list[Truth], step: int, errors: _Errors) -> dict[str, float]:
    rows = [(logits[i].astype(np.float32), truth.logits[step], truth) for i, truth in enumerate(truths)]
    worst = {
        "relative": max(relative(made, wanted) for made, wanted, _ in rows),
        "max_abs": max(max_abs(made, wanted) for made, wanted, _ in rows),
        "cosine": min(cosine(made, wanted) for made, wanted, _ in rows),
        "agreed": sum(_agrees(made, truth, step) for made, _, truth in rows) / len(rows),
    }
    for made, wanted, _ in rows:
        errors.counts += error_counts(np.nan_to_num(made), wanted)
    errors.by_step += [0.0] * (step + 1 - len(errors.by_step))
    errors.by_step[step] = max(errors.by_step[step], worst["relative"])
    return worst


def _agrees(made: np.ndarray, truth: Truth, step: int) -> bool:
    """Same best token, or the reference itself all but ties."""
    return int(made.argmax()) == truth.tokens[step] or truth.margins[step] < tie_margin(truth, "fp32")


def tie_margin(truth: Truth, dtype: str) -> float:
    """Lead of the reference's best logit below which another choice is a tie: twice the logits' tolerance."""
    limit = tolerance("decode logits", dtype)
    assert limit is not None
    return 2 * limit.limit * truth.peak


def _compare_cache(
    stepper: Stepper,
    wanted: list[RowCache],
    stage: str,
    case: str,
    dtype: str,
    errors: _Errors,
) -> None:
    parts: dict[str, list[float]] = {"key": [], "value": []}
    made = [stepper.row_cache(row) for row in range(stepper.num_rows)]
    for layer in range(len(wanted[0])):
        for part, name in enumerate(("key", "value")):
            worst = 0.0
            for row, rows in enumerate(wanted):
                expected = rows[layer][part]
                array = made[row][layer][part][:, : expected.shape[1]].astype(np.float32)
                worst = max(worst, relative(array, expected))
            parts[name].append(worst)
    for name, by_layer in parts.items():
        errors.layers(name, by_layer)
        worst_layer = int(np.argmax(by_layer))
        detail = f"{name}s, worst in layer {worst_layer}"
        errors.judge(stage, case, dtype, {"relative": by_layer[worst_layer]}, detail)


def _compare_tokens(
    session: Session, truths: list[Truth], settings: Settings, errors: _Errors, on_step: OnStep
) -> list[TokenRow]:
    """Generate freely in mixed batches and compare the tokens."""
    rows: list[TokenRow] = []
    size = session.manifest.ranges.batch.max
    for start in range(0, len(truths), size):
        on_step(f"{session.target.name}: greedy tokens, prompts {start + 1} to {min(start + size, len(truths))}")
        batch = truths[start : start + size]
        requests = [
            Request(t.prompt.tenant, tokens=t.prompt.tokens, max_new_tokens=settings.new_tokens, ignore_eos=True)
            for t in batch
        ]
        rows += [_token_row(session, t, answer.tokens) for t, answer in zip(batch, session.generate(requests), strict=True)]
    identical = sum(row.first_divergence is None for row in rows)
    excused = sum(row.excused for row in rows)
    measured = {
        "identical": (identical + excused) / len(rows),
        "rows": float(len(rows)),
        "excused": float(excused),
        "tokens": float(sum(len(row.reference) for row in rows)),
    }
    detail = f"{identical} of {len(rows)} rows identical, {excused} excused as ties"
    errors.judge("greedy tokens", f"{len(rows)} prompts, mixed batches", session.target.dtype, measured, detail)
    return rows


def _answer(session: Session, tokens: list[int]) -> str:
    """The text that a user would get: up to the end token, past which the comparison goes on."""
    ends = [step for step, token in enumerate(tokens) if token in session.manifest.backbone.eos_token_ids]
    return session.codec.decode(tokens[: ends[0]] if ends else tokens)


def _token_row(session: Session, truth: Truth, tokens: list[int]) -> TokenRow:
    pairs = zip(truth.tokens, tokens, strict=False)
    divergence = next((step for step, (wanted, made) in enumerate(pairs) if wanted != made), None)
    if divergence is None and len(tokens) != len(truth.tokens):
        divergence = min(len(tokens), len(truth.tokens))
    margin = None if divergence is None or divergence >= len(truth.margins) else truth.margins[divergence]
    return TokenRow(
        tenant=truth.prompt.tenant,
        prompt=truth.prompt.text,
        reference=truth.tokens,
        target=tokens,
        reference_text=_answer(session, truth.tokens),
        target_text=_answer(session, tokens),
        first_divergence=divergence,
        margin=margin,
        excused=margin is not None and margin < tie_margin(truth, session.target.dtype),
    )
