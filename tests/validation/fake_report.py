"""A report of realistic size and shape: 30 layers, 64 steps, 24 prompts, one target run and one only checked."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from validation.judging.result import Bisection, Check, Finding, Report, TargetResult, TokenRow

TENANTS = ["movie-sentiment", "sarcasm", "reuters-r8"]
PROMPTS = {
    "movie-sentiment": "Is this movie review positive or negative?\n\nThe acting, costumes, music, cinematography and "
    "sound are all astounding given the production's austere locales.",
    "sarcasm": "Is this headline sarcastic? Answer yes or no.\n\narea man consults internet whenever possible",
    "reuters-r8": "What is the topic of this news: acquisition, currency, earnings, grain, interest, oil, shipping, "
    "trade?\n\nshell canada raises crude prices by canadian cts a barrel effective today",
}
ANSWERS = {"movie-sentiment": "positive", "sarcasm": "yes", "reuters-r8": "oil"}
FP32_REASON = "summation order differs between runtimes; 30 layers leave a few 1e-6, the limit is about ten times that"
TOLERANCES: list[dict[str, Any]] = [
    {"stage": stage, "dtype": "fp32", "metric": metric, "limit": limit, "reason": reason}
    for stage, metric, limit, reason in (
        ("generator", "relative", 2e-5, "two projections and a softmax; fp32 rounding only"),
        ("prefill logits", "relative", 1e-4, FP32_REASON),
        ("prefill cache", "relative", 1e-4, FP32_REASON),
        ("decode logits", "relative", 1e-4, FP32_REASON),
        ("top-1 agreement", "agreement", 0.999, "only ties within the logits' tolerance may differ"),
        ("greedy tokens", "identical", 1.0, "every row identical, or its first difference an excused tie"),
    )
]


def token_rows(diverging: dict[int, tuple[int, float, bool]]) -> list[TokenRow]:
    """24 prompts; ``diverging``: prompt to first differing step, the reference's margin, whether it is excused."""
    rows = []
    for index in range(24):
        tenant = TENANTS[index % 3]
        reference = [3524, 2731, *range(100, 162)]
        step, margin, excused = diverging.get(index, (None, None, False))
        target = list(reference) if step is None else [*reference[:step], *(7 for _ in reference[step:])]
        answer = f"{ANSWERS[tenant]}, because the text of example {index} says so in its first sentence."
        rows.append(
            TokenRow(
                tenant=tenant,
                prompt=PROMPTS[tenant],
                reference=reference,
                target=target,
                reference_text=answer,
                target_text=answer if step is None else answer.replace("because", "since"),
                first_divergence=step,
                margin=margin,
                excused=excused,
            )
        )
    return rows


def onnxruntime_target(seed: int = 0) -> TargetResult:
    """A target that ran and passed, one near-tie excused."""
    source = random.Random(seed)
    measured = {"relative": 2.4e-7, "max_abs": 9.1e-7, "cosine": 1 - 2e-13}
    checks = [Check("generator", "batch 3, one row a tenant", True, measured, {"relative": 2e-5}, "worst in layer 28")]
    for case in ("batch 8, mixed tenants, left padding", "batch 1, one row"):
        for stage in ("prefill logits", "prefill cache", "decode logits", "decode cache"):
            measured = {"relative": source.uniform(8e-7, 9e-6)}
            if "logits" in stage:
                measured |= {"max_abs": source.uniform(2e-5, 9e-5), "cosine": 0.99999999999, "step": 31}
            detail, part = ("keys, worst in layer 17", "keys") if "cache" in stage else ("", "")
            checks.append(Check(stage, case, True, measured, {"relative": 1e-4}, detail, part))
        checks.append(Check("top-1 agreement", case, True, {"agreement": 1.0, "steps": 512}, {"agreement": 0.999}))
    measured = {"identical": 1.0, "rows": 24, "excused": 1, "tokens": 1536}
    detail = "23 of 24 rows identical, 1 excused as ties"
    checks.append(Check("greedy tokens", "24 prompts, mixed batches", True, measured, {"identical": 1.0}, detail))
    return TargetResult(
        name="onnxruntime",
        dtype="fp32",
        status="pass",
        checks=checks,
        by_layer={
            name: [scale * 1.09**layer * source.uniform(0.6, 1.4) for layer in range(30)]
            for name, scale in (("prompt", 2e-7), ("key", 1.5e-6), ("value", 6e-7))
        },
        by_step=[source.uniform(2e-5, 8e-5) for _ in range(65)],
        histogram={
            "edges": [-9 + 0.25 * index for index in range(21)],
            "counts": [max(1.0, 4e6 * 2.718 ** (-((index - 11) ** 2) / 9)) for index in range(20)],
        },
        tokens=token_rows({13: (40, 2.1e-5, True)}),
        seconds=83.4,
    )


def rtx_target() -> TargetResult:
    """A target that was built and checked, but cannot run here."""
    checks = [
        Check("interface", f"{graph} engine", True, {"differences": 0}, {"differences": 0}, "66 tensors, 1 profile")
        for graph in ("prefill", "decode")
    ]
    reason = (
        "This machine has no NVIDIA GPU, so the engine cannot run; its inputs, outputs, shapes, profiles and types "
        "were checked. A GeForce RTX card (Turing or newer) with driver 580 or newer runs it: 'iapt-export validate'."
    )
    return TargetResult(name="tensorrt-rtx", dtype="fp16", status="checked, not run", reason=reason, checks=checks)


def passing_report() -> Report:
    """What a good build reports."""
    return Report(
        bundle="demo-bundle",
        verdict="pass",
        backbone="SmolLM2-135M-Instruct",
        method="IAPT",
        tenants=TENANTS,
        seed=0,
        created="",
        environment={"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.31.1", "processor": "x86_64, 2 threads"},
        tolerances=TOLERANCES,
        targets=[onnxruntime_target(), rtx_target()],
        command="iapt-export validate demo-bundle --model .cache/smollm2-135m-instruct",
    )


def failing_report() -> Report:
    """One cache check out of bounds, a broken step, and tokens that differ."""
    target = onnxruntime_target()
    bad = Check(
        "prefill cache",
        "batch 8, mixed tenants, left padding",
        False,
        {"relative": 0.41},
        {"relative": 1e-4},
        "keys, worst in layer 17",
        "keys",
    )
    worse = Check("decode logits", "batch 1, one row", False, {"relative": float("nan")}, {"relative": 1e-4})
    by_layer = {
        name: [*errors[:17], *(error * 4e4 for error in errors[17:])] for name, errors in target.by_layer.items()
    }
    target = dataclasses.replace(
        target,
        status="fail",
        checks=[*target.checks[:3], bad, *target.checks[3:], worse],
        by_layer=by_layer,
        by_step=[*target.by_step[:40], float("inf"), float("nan"), *target.by_step[42:]],
        tokens=token_rows({2: (0, 3.2, False), 5: (17, 0.8, False), 13: (40, 2.1e-5, True)}),
    )
    return dataclasses.replace(passing_report(), verdict="fail", targets=[target, rtx_target()])


def located_report() -> Report:
    """The failing report after somebody looked inside: attention of layer 17 reads padding."""
    report = failing_report()
    parts = ("input_layernorm.output", "self_attn.query", "self_attn.o_proj.input", "mlp.down_proj.output")
    errors: list[tuple[str, int | None, float]] = [
        (f"model.layers.{layer}.{part}", layer, (2e-6 if (layer, place) < (17, 2) else 0.3) * 1.03**layer)
        for layer in range(30)
        for place, part in enumerate(parts)
    ]
    finding = Finding(
        step=0,
        graph="prefill",
        tensor="model.layers.17.self_attn.o_proj.input",
        layer=17,
        part="tokens",
        operators=["model.layers.17.self_attn/Attention", "model.layers.17.self_attn/Reshape_4"],
        module="model.layers.17.self_attn",
        row=2,
        tenant="reuters-r8",
        source="mask",
        evidence="the row's padding is attended to",
        error=0.41,
        limit=5e-4,
    )
    generated = [
        Check(stage, case, True, {"relative": error}, {"relative": 5e-4})
        for case in ("one-token", "largest-batch", "most-padding", "full-cache")
        for stage, error in (("prefill logits", 3e-6), ("prefill cache", 1e-4), ("decode logits", 4e-4))
    ]
    target = report.targets[0]
    looked = dataclasses.replace(
        target, checks=[*target.checks, *generated], bisection=Bisection("most-padding", finding, errors, 1)
    )
    return dataclasses.replace(report, targets=[looked, report.targets[1]])
