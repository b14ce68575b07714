"""The stages of a comparison that a session steps through: prefill, every decode step, greedy tokens, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.serving.session import Generation, Request, Session
from engines.serving.stepper import RowCache
from iapt_export.contract.errors import IaptError
from validation.judging.metrics import (
    HISTOGRAM_EDGES,
    cosine,
    entry_errors,
    error_counts,
    kl,
    max_abs,
    quantiles,
    relative,
    worst_but,
)
from validation.judging.result import Bisection, Check, TokenRow
from validation.judging.tolerances import COMPARED_FOR_A_SHARE, OUTLIERS, tolerances
from validation.sides.cases import Case, Prompt
from validation.sides.reference import BACKBONE
from validation.sides.stepping import Row, Step, run_steps
from validation.sides.truth import Truth, num_equal

OnStep = Callable[[str], None]


@dataclass
class Errors:
    """The figures of one comparison as they come in."""

    bisection: Bisection | None = None
    """Where the generator graph is wrong, when it is."""

    checks: list[Check] = field(default_factory=list)
    by_layer: dict[str, list[float]] = field(default_factory=dict)
    by_step: list[float] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1))
    tenants: list[str] = field(default_factory=list)
    """Whose rows the next checks are of."""
    of_tenant: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """The figures of every step of a tenant's rows, whatever they shared a batch with."""
    of_short: dict[str, list[float]] = field(default_factory=dict)
    """Each tenant's top-1 agreement in cases that are too short to be judged by it alone."""

    def feed(self, tenants: Iterable[str]) -> None:
        """Say whose rows the next checks are of."""
        self.tenants = list(dict.fromkeys(name or BACKBONE for name in tenants))

    def judge(
        self, stage: str, case: str, dtype: str, measured: dict[str, float], detail: str = "", part: str = ""
    ) -> None:
        """Add a check of ``measured`` against the table's limit for the stage."""
        rows = tolerances(stage, dtype)
        passed = all(row.holds(measured[row.metric]) for row in rows)
        limits = {row.metric: row.limit for row in rows}
        self.checks.append(Check(stage, case, passed, measured, limits, detail, part, self.tenants))

    def layers(self, part: str, errors: list[float]) -> None:
        """Keep the worst error of each layer over all cases."""
        before = self.by_layer.get(part, [0.0] * len(errors))
        self.by_layer[part] = [max(pair) for pair in zip(before, errors, strict=True)]


def compare_steps(session: Session, case: str, truths: list[Truth], errors: Errors) -> None:
    """Feed the reference's own tokens, so that each step is compared on equal ground."""
    dtype, num_steps = session.target.dtype, min(len(truth.tokens) for truth in truths)
    rows = [Row(truth.prompt.tenant, truth.prompt.tokens, truth.fed) for truth in truths]
    errors.feed(truth.prompt.tenant for truth in truths)
    every: list[dict[str, float]] = []  # all rows of the first step, then of the next
    for step in run_steps(session, rows, num_steps):
        every += _compare_logits(step.logits, truths, step.number, errors)
        if step.number == 0:
            errors.judge("prefill logits", case, dtype, judged(every, dtype))
            _compare_cache(step, [truth.prefill_cache for truth in truths], "prefill cache", case, dtype, errors)
        elif step.number == num_steps - 1:
            decoded = every[len(rows) :]
            worst = 1 + int(np.argmax([each["relative"] for each in decoded])) // len(rows)
            figures = judged(decoded, dtype) | {"step": float(worst)}
            errors.judge("decode logits", case, dtype, figures, f"worst at step {worst}")
            _compare_cache(step, [truth.final_cache for truth in truths], "decode cache", case, dtype, errors)
    for place, figures in enumerate(every):
        errors.of_tenant.setdefault(rows[place % len(rows)].tenant, []).append(figures)
    if dtype != "fp32" and len(every) < COMPARED_FOR_A_SHARE:
        for place, each in enumerate(every):
            errors.of_short.setdefault(rows[place % len(rows)].tenant, []).append(each["agreed"])
        return
    other = next((place // len(rows) for place, each in enumerate(every) if not each["agreed"]), None)
    detail = "" if other is None else f"first other token at step {other}"
    errors.judge("top-1 agreement", case, dtype, _agreement([each["agreed"] for each in every]), detail)
    if tolerances("typical logits", dtype):
        errors.judge("typical logits", case, dtype, _typical(every), "median over rows and steps")


def judge_short_cases(dtype: str, errors: Errors) -> None:
    """Judge the top-1 agreement of all short cases as one: a near tie that changes sides is a large share of each.

    Coarse weights' are not: two short rows may be outliers throughout, see `OUTLIERS`.
    """
    agreed = [each for every in errors.of_short.values() for each in every]
    if dtype not in OUTLIERS and len(agreed) >= COMPARED_FOR_A_SHARE:
        errors.feed(errors.of_short)
        errors.judge("top-1 agreement", "every short case", dtype, _agreement(agreed))


def judge_tenants(dtype: str, errors: Errors) -> None:
    """Judge what is typical of each tenant, so that one that rounding spoils does not hide among the others' rows."""
    if len(errors.of_tenant) < 2 or not tolerances("typical logits", dtype):
        return
    for tenant, every in errors.of_tenant.items():
        if len(every) >= COMPARED_FOR_A_SHARE:
            errors.feed([tenant])
            errors.judge("typical logits", f"every row of {tenant or BACKBONE}", dtype, _typical(every), "median")


def _agreement(agreed: list[float]) -> dict[str, float]:
    return {"agreement": float(np.mean(agreed)), "compared": float(len(agreed))}


def _typical(every: list[dict[str, float]]) -> dict[str, float]:
    typical = {name: float(np.median([each[name] for each in every])) for name in ("relative", "kl")}
    return typical | {"compared": float(len(every))}


def compare_rows(case: str, truth: Truth, tokens: list[int], logits: list[np.ndarray], errors: Errors) -> None:
    """Compare one row's own greedy answer, whose steps count as long as its tokens are the reference's.

    Args:
        case: what it is called.
        truth: the reference's row.
        tokens: the answer's, one a step.
        logits: each step's ``[V]``.
        errors: where the figures go.
    """
    wanted = truth.tokens[: len(tokens)]
    same = next((step for step, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), None)
    steps = len(tokens) if same is None else same + 1
    figures = [_compare_logits(logits[step][None], [truth], step, errors)[0] for step in range(steps)]
    errors.judge("prefill logits", case, "fp32", judged(figures[:1], "fp32"))
    if figures[1:]:
        errors.judge("decode logits", case, "fp32", judged(figures[1:], "fp32"))
    excused = same is not None and truth.margins[same] < tie_margin(truth)
    detail = "" if same is None else f"first other token at step {same}" + (", a tie" if excused else "")
    measured = {"identical": float(same is None or excused), "answered": 1.0, "rows": 1.0, "excused": float(excused)}
    errors.judge("greedy tokens", case, "fp32", {**measured, "tokens": float(len(tokens))}, detail)


def judged(figures: list[dict[str, float]], dtype: str) -> dict[str, float]:
    """What is held against the limits, of the figures of rows and steps: the worst that counts in the type."""
    summary: dict[str, float] = {}
    for name in figures[0]:
        values = [each[name] for each in figures]
        if name == "agreed":
            summary[name] = float(np.mean(values))
        elif name == "cosine":
            summary[name] = min(values)
        else:
            summary[name] = worst_but(values, OUTLIERS.get(dtype, 0.0))
    return summary


def _compare_logits(logits: np.ndarray, truths: list[Truth], step: int, errors: Errors) -> list[dict[str, float]]:
    """The figures of each row at one step."""
    figures = []
    for row, truth in enumerate(truths):
        actual, wanted = logits[row].astype(np.float32), truth.logits[step]
        figures.append(
            {
                "relative": relative(actual, wanted),
                "max_abs": max_abs(actual, wanted),
                "kl": kl(actual, wanted),
                "cosine": cosine(actual, wanted),
                "agreed": float(agrees(actual, truth, step)),
                **quantiles(actual, wanted),
            }
        )
        errors.counts += error_counts(np.nan_to_num(actual), wanted)
    errors.by_step += [0.0] * (step + 1 - len(errors.by_step))
    errors.by_step[step] = max(errors.by_step[step], *(each["relative"] for each in figures))
    return figures


def agrees(made: np.ndarray, truth: Truth, step: int) -> bool:
    """Same best token, or the reference itself all but ties."""
    return int(made.argmax()) == truth.tokens[step] or truth.margins[step] < tie_margin(truth)


def tie_margin(truth: Truth) -> float:
    """Lead of the reference's best logit below which another choice is a tie: twice the logits' tolerance in fp32.

    Narrower types have no margin of their own: int4's would excuse nearly every answer.
    """
    limit = next(row.limit for row in tolerances("decode logits", "fp32") if row.metric == "relative")
    return 2 * limit * truth.peak


def _compare_cache(step: Step, wanted: list[RowCache], stage: str, case: str, dtype: str, errors: Errors) -> None:
    caches = step.caches()
    num_layers = len(wanted[0])
    for part, name in enumerate(("key", "value")):
        by_layer = [
            max(_entries_error(caches[row][layer][part], wanted[row][layer][part], dtype) for row in range(len(wanted)))
            for layer in range(num_layers)
        ]
        errors.layers(name, by_layer)
        worst_layer = int(np.argmax(by_layer))
        detail = f"{name}s, worst in layer {worst_layer}"
        errors.judge(stage, case, dtype, {"relative": by_layer[worst_layer]}, detail, f"{name}s")


def _entries_error(actual: np.ndarray, wanted: np.ndarray, dtype: str) -> float:
    """Error of the entries ``[H, S, K]`` that both have; the reference ends before the last token that it chose."""
    return worst_but(entry_errors(actual[:, : wanted.shape[1]], wanted), OUTLIERS.get(dtype, 0.0))


def compare_refusal(session: Session, case: Case, errors: Errors) -> None:
    """Ask for what a session must refuse; an answer, or an error that is no `IaptError`, fails."""
    requests = [Request(row.tenant, tokens=row.tokens, max_new_tokens=case.new_tokens) for row in case.rows]
    errors.feed(row.tenant for row in case.rows)
    try:
        list(session.generate(requests))
        detail = "it was answered"
    except IaptError as error:
        detail = str(error)
        refused = 1.0
    else:
        refused = 0.0
    errors.judge("refusal", case.name, session.target.dtype, {"refused": refused}, detail)


@dataclass(frozen=True)
class Answers:
    """What a target answers to prompts when it chooses freely."""

    tokens: list[list[int]]
    """Of each prompt; fewer than were asked for where the target failed."""
    failures: list[str]
    """What it said then."""


def answer_freely(session: Session, prompts: Sequence[Prompt], new_tokens: int, on_step: OnStep) -> Answers:
    """Generate greedily in mixed batches, past any end token."""
    answers = Answers([], [])
    size = session.manifest.ranges.batch.max
    for start in range(0, len(prompts), size):
        on_step(f"{session.target.name}: greedy tokens, prompts {start + 1} to {min(start + size, len(prompts))}")
        requests = [
            Request(prompt.tenant, tokens=prompt.tokens, max_new_tokens=new_tokens, ignore_eos=True)
            for prompt in prompts[start : start + size]
        ]
        running = [session.submit(request, start + number) for number, request in enumerate(requests)]
        answers.tokens.extend(_tokens(one, answers.failures) for one in running)
    return answers


def compare_tokens(session: Session, truths: list[Truth], answers: Answers, errors: Errors) -> list[TokenRow]:
    """Compare the tokens that a target chose freely."""
    rows = [token_row(session, truth, tokens) for truth, tokens in zip(truths, answers.tokens, strict=True)]
    errors.feed(truth.prompt.tenant for truth in truths)
    identical = sum(row.first_divergence is None for row in rows)
    excused = sum(row.excused for row in rows)
    measured = {
        "identical": (identical + excused) / len(rows),
        "answered": 1 - len(answers.failures) / len(rows),
        "rows": float(len(rows)),
        "excused": float(excused),
        "tokens": float(sum(len(row.reference) for row in rows)),
    }
    detail = "; ".join([f"{identical} of {len(rows)} rows identical, {excused} excused as ties", *answers.failures])
    errors.judge("greedy tokens", f"{len(rows)} prompts, mixed batches", session.target.dtype, measured, detail)
    return rows


def _tokens(generation: Generation, failures: list[str]) -> list[int]:
    """A request's tokens, up to its failure where there is one: a difference to report, which ends no comparison."""
    tokens: list[int] = []
    try:
        tokens.extend(token.token for token in generation)  # keeps those before a failure
    except IaptError as error:
        failures.append(str(error))
    return tokens


def _answer(session: Session, tokens: list[int]) -> str:
    """The text that a user would get: up to the end token, past which the comparison goes on."""
    ends = [step for step, token in enumerate(tokens) if token in session.manifest.backbone.eos_token_ids]
    return session.codec.decode(tokens[: ends[0]] if ends else tokens)


def token_row(session: Session, truth: Truth, tokens: list[int]) -> TokenRow:
    """A prompt's answers side by side, with the first token that differs and whether that is a tie.

    They are compared as far as PyTorch's own answer is known; a target's has as many tokens as were asked for.
    """
    wanted = truth.free
    same = num_equal(wanted, tokens)
    divergence = same if same < min(len(wanted), len(tokens)) else None
    if divergence is None and len(tokens) != len(truth.tokens):
        divergence = min(len(tokens), len(truth.tokens))
    margin = None if divergence is None or divergence >= len(truth.margins) else truth.margins[divergence]
    return TokenRow(
        tenant=truth.prompt.tenant,
        prompt=truth.prompt.text,
        reference=wanted,
        target=tokens,
        reference_text=_answer(session, wanted),
        target_text=_answer(session, tokens),
        first_divergence=divergence,
        margin=margin,
        excused=margin is not None and margin < tie_margin(truth),
    )
