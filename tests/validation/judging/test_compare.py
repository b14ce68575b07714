"""The comparison tells an honest bundle from a wrong one, whatever is wrong, and excuses true ties only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.serving import in_place_stepper, tenants
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.session import Request, Session
from engines.serving.tenants import Tenant
from iapt_export.contract.errors import BundleError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import NEW_TOKENS, Outcome, TinyBuild, rehash, run
from tests.thorough import default_for
from tests.validation.sabotage import SABOTAGES, one_weight
from trainers.decoder.backbone import load_backbone
from validation.judging import stages
from validation.judging.compare import Settings, compare_target, measure_truth
from validation.judging.stages import Answers, Errors, compare_tokens, judge_tenants, judged, tie_margin
from validation.judging.tolerances import tolerances
from validation.sides.cases import Prompt
from validation.sides.reference import Reference
from validation.sides.truth import Truth
from validation.validate import validate_bundle

STAGES = {
    "generator",
    "prefill logits",
    "prefill cache",
    "decode logits",
    "decode cache",
    "top-1 agreement",
    "greedy tokens",
    "refusal",
}


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Any:
    return load_backbone(str(tiny_build.model))


def validate(bundle: Path, *flags: str) -> Outcome:
    return run("validate", bundle, "--json", "--quiet", f"--new-tokens={NEW_TOKENS}", *flags)


def failed_stages(outcome: Outcome) -> set[str]:
    targets = json.loads(outcome.out)["targets"]
    return {check["stage"] for target in targets for check in target["checks"] if not check["passed"]}


def test_an_honest_bundle_passes_every_stage(tiny_bundle: Path) -> None:
    outcome = validate(tiny_bundle)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    served, portable = report["targets"]
    assert (served["name"], portable["name"]) == ("onnxruntime", "onnxruntime, portable graphs")
    assert {check["stage"] for check in portable["checks"]} == STAGES
    assert {check["stage"] for check in served["checks"]} == STAGES - {"generator"}
    for target in (served, portable):
        check_target(target)
    assert report["verdict"] == "pass"


def check_target(target: dict[str, Any]) -> None:
    assert target["status"] == "pass"
    assert all(check["passed"] for check in target["checks"])
    assert len(target["tokens"]) == 24
    assert {row["tenant"] for row in target["tokens"]} == {"alpha", "beta", "gamma"}
    assert all(row["reference"] == row["target"] for row in target["tokens"])
    assert len(target["by_layer"]["key"]) == 2 and len(target["by_step"]) > NEW_TOKENS, "the long cases go further"
    answers = {tuple(row["reference"]) for row in target["tokens"]}
    assert len(answers) > 12, "the tiny tenants must differ, or the comparison compares nothing"


@pytest.mark.parametrize(
    "sabotage", default_for(lambda sabotage: sabotage is one_weight, SABOTAGES), ids=lambda sabotage: sabotage.__name__
)
def test_sabotage_is_found(tiny_bundle: Path, sabotage: Callable[[Path], None]) -> None:
    sabotage(tiny_bundle)
    damaged = validate(tiny_bundle)
    assert damaged.code == 1, "the hashes tell first"
    assert "is damaged" in damaged.err and ("was altered" in damaged.err or "bytes, expected" in damaged.err)
    rehash(tiny_bundle)
    flags = () if sabotage is one_weight else ("--quick",)  # a single number needs all prompts to change a token
    outcome = validate(tiny_bundle, *flags)
    assert outcome.code == 3, outcome.err
    assert "differs from PyTorch in" in outcome.err and "allowed" in outcome.err
    assert json.loads(outcome.out)["verdict"] == "fail"
    must_fail, must_hold = SABOTAGES[sabotage]
    assert must_fail <= failed_stages(outcome)
    assert not must_hold & failed_stages(outcome)


def compared(bundle: Path, backbone: Any) -> set[str]:
    report = validate_bundle(bundle, BundleManifest.load(bundle), backbone, Settings(0, NEW_TOKENS, depth="quick"))
    return {check.stage for check in report.targets[0].checks if not check.passed}


def test_nan_in_one_logit_fails(tiny_build: TinyBuild, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = InPlaceStepper.step

    def step(self: InPlaceStepper, tokens: Any) -> np.ndarray:
        logits = honest(self, tokens).copy()
        logits[0, logits[0].argmin()] = np.nan  # argmax, and with it every token, may stay as it was
        return logits

    monkeypatch.setattr(InPlaceStepper, "step", step)
    assert {"decode logits", "greedy tokens"} <= compared(tiny_build.bundle, backbone)


def test_a_row_of_the_backbone_that_a_tenants_prompts_reach_fails(
    tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = validate(tiny_build.bundle, "--case=backbone-alone")
    assert honest.code == 0, honest.err
    assert json.loads(honest.out)["targets"][0]["checks"][0]["tenants"] == ["the backbone", "gamma"]

    def as_alpha(bundle: Path, manifest: BundleManifest) -> Tenant:
        method = manifest.methods[0]
        return Tenant("base", method.name, 0, method.prompt_length, "plain", "plain")

    monkeypatch.setattr(tenants, "_base", as_alpha)
    wrong = validate(tiny_build.bundle, "--case=backbone-alone")
    assert wrong.code == 3 and "prefill logits" in failed_stages(wrong)
    finding = json.loads(wrong.out)["targets"][0]["bisection"]["finding"]
    assert (finding["row"], finding["tenant"]) == (0, "the backbone")


def test_the_manifest_keeps_every_limit(tiny_build: TinyBuild) -> None:
    kept = BundleManifest.load(tiny_build.bundle).parity.tolerances
    assert kept["prefill logits fp32"] == {row.metric: row.limit for row in tolerances("prefill logits", "fp32")}
    assert set(kept["prefill logits fp32"]) == {"relative", "kl"}


def test_another_backbone_of_the_same_shape_is_refused(tiny_build: TinyBuild, tmp_path: Path) -> None:
    from tests.tiny import save_tiny_backbone, tiny_llama

    other = save_tiny_backbone(tmp_path / "other", tiny_llama(seed=1, num_hidden_layers=2))
    outcome = validate(tiny_build.bundle, f"--model={other}")
    assert outcome.code == 1
    assert "has the architecture but not the weights" in outcome.err


@pytest.mark.parametrize(("name", "other"), [("num_layers", 3), ("vocab_size", 321), ("head_dim", 16)])
def test_sizes_of_the_manifest_that_are_not_the_backbones_are_refused(
    tiny_build: TinyBuild, backbone: Any, name: str, other: int
) -> None:
    manifest = BundleManifest.load(tiny_build.bundle)
    changed = dataclasses.replace(manifest.backbone, **{name: other})
    before = getattr(manifest.backbone, name)
    with pytest.raises(BundleError, match=f"has other sizes than the bundle's backbone: {name} {other} for {before};"):
        Reference(tiny_build.bundle, dataclasses.replace(manifest, backbone=changed), backbone)


def test_a_backbone_of_another_shape_is_refused(tiny_build: TinyBuild, tmp_path: Path) -> None:
    from tests.tiny import save_tiny_backbone, tiny_llama

    other = save_tiny_backbone(tmp_path / "other", tiny_llama(num_hidden_layers=3))
    outcome = validate(tiny_build.bundle, f"--model={other}")
    assert outcome.code == 1
    assert "has fingerprint" in outcome.err and "give that one with --model" in outcome.err


def test_no_runnable_target_is_no_pass(tiny_build: TinyBuild, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider"])
    report = validate_bundle(
        tiny_build.bundle, BundleManifest.load(tiny_build.bundle), backbone, Settings(0, NEW_TOKENS)
    )
    assert (report.verdict, report.targets[0].status) == ("fail", "checked, not run")
    assert "device 'cpu' is not available" in report.targets[0].reason


def test_settings_decide_what_is_compared(tiny_build: TinyBuild, backbone: Any) -> None:
    manifest = BundleManifest.load(tiny_build.bundle)
    reference = Reference(tiny_build.bundle, manifest, backbone)
    steps: list[str] = []
    settings = Settings(1, 3, case="prompts")
    truths = measure_truth(tiny_build.bundle, manifest, reference, settings, steps.append)
    assert not truths.cases and {len(truth.tokens) for truth in truths.prompts} == {3}
    assert [bool(truth.logits) for truth in truths.prompts] == [True] * 8 + [False] * 16
    with Session.open(tiny_build.bundle) as session:
        result = compare_target(session, reference, truths, settings, steps.append)
    assert (result.status, len(result.by_step)) == ("pass", 3)
    kept = truths.prompts[:8]
    assert sum(result.histogram["counts"]) == 320 * sum(len(t.logits) for t in kept) + 320 * len(kept[0].logits)
    assert steps[0] == "PyTorch generates the reference" and steps[-1].endswith("prompts 17 to 24")


def truth(tokens: list[int], margins: list[float], peak: float = 10.0) -> Truth:
    return Truth(Prompt("alpha", "text", (5,)), tokens, margins, peak)


def row(truth: Truth, tokens: list[int], dtype: str = "fp32") -> Any:
    session = SimpleNamespace(
        codec=SimpleNamespace(decode=str),
        target=SimpleNamespace(dtype=dtype),
        manifest=SimpleNamespace(backbone=SimpleNamespace(eos_token_ids=[1])),
    )
    return stages.token_row(session, truth, tokens)  # type: ignore[arg-type]


LIMIT = 2 * 3e-4 * 10.0
"""Twice the tolerance of fp32 logits, times the largest logit."""


def test_identical_tokens_need_no_excuse() -> None:
    made = row(truth([3, 4, 1], [1.0, 0.0, 1.0]), [3, 4, 1])
    assert (made.first_divergence, made.margin, made.excused) == (None, None, False)


def test_tokens_are_compared_as_far_as_pytorch_alone_has_chosen() -> None:
    """It was fed 6 where it would have chosen 4: what it says after that belongs to another answer."""
    known = truth([3, 4, 7, 8], [1.0, 1.0, 1.0, 1.0])
    known.forced = (3, 6, 7)
    same, other, short = row(known, [3, 4, 5, 5]), row(known, [3, 6, 7, 8]), row(known, [3, 4, 5])
    assert (same.reference, same.first_divergence, other.first_divergence) == ([3, 4], None, 1)
    assert short.first_divergence == 3 and not short.excused, "it ended before it was to"


@pytest.mark.parametrize(
    ("margin", "excused"), [(0.0, True), (LIMIT * 0.99, True), (LIMIT * 1.01, False), (5.0, False)]
)
def test_only_a_tie_excuses_another_token(margin: float, excused: bool) -> None:
    example = truth([3, 4, 1], [5.0, margin, 5.0])
    assert tie_margin(example) == pytest.approx(LIMIT)
    made = row(example, [3, 9, 1])
    assert (made.first_divergence, made.margin, made.excused) == (1, margin, excused)


def test_coarse_weights_get_no_wider_excuse() -> None:
    """The limit of int4's logits would take nearly every answer for a tie."""
    assert not row(truth([3, 4, 1], [5.0, LIMIT * 1.01, 5.0]), [3, 9, 1], "int4").excused


def test_a_tie_excuses_the_first_difference_only() -> None:
    """What follows a tie may differ; what precedes it may not."""
    assert row(truth([3, 4, 1], [5.0, 0.0, 5.0]), [3, 9, 9]).excused
    assert not row(truth([3, 4, 1], [5.0, 0.0, 5.0]), [9, 4, 1]).excused


@pytest.mark.parametrize(("tokens", "step"), [([3, 4], 2), ([3, 4, 1, 7], 3), ([], 0)])
def test_an_answer_of_another_length_differs(tokens: list[int], step: int) -> None:
    made = row(truth([3, 4, 1], [5.0, 5.0, 5.0]), tokens)
    assert (made.first_divergence, made.excused) == (step, False)


def test_ties_count_as_agreement_step_by_step() -> None:
    logits = np.zeros(8)
    logits[2] = 1.0
    assert stages.agrees(logits, truth([2], [5.0]), 0)
    assert not stages.agrees(logits, truth([3], [5.0]), 0)
    assert stages.agrees(logits, truth([3], [LIMIT / 2]), 0)


def test_excused_rows_are_counted_and_listed(tiny_build: TinyBuild, backbone: Any) -> None:
    """Two rows are given a wrong truth: one as a tie, one not; the figures tell them apart."""
    manifest = BundleManifest.load(tiny_build.bundle)
    reference = Reference(tiny_build.bundle, manifest, backbone)
    truths = measure_truth(tiny_build.bundle, manifest, reference, Settings(0, NEW_TOKENS), lambda _: None)
    for number, margin in ((20, 0.0), (21, 1.0)):
        wrong = truths.prompts[number]
        wrong.tokens[0] = (wrong.tokens[0] + 1) % 320
        wrong.margins[0] = margin
    with Session.open(tiny_build.bundle) as session:
        result = compare_target(session, reference, truths, Settings(0, NEW_TOKENS), lambda _: None)
    (check,) = [check for check in result.checks if check.stage == "greedy tokens"]
    assert (check.measured["identical"], check.measured["excused"], check.passed) == (23 / 24, 1.0, False)
    assert check.detail == "22 of 24 rows identical, 1 excused as ties"
    assert [row.excused for row in result.tokens if row.first_divergence is not None] == [True, False]
    assert result.status == "fail"


@pytest.mark.parametrize(("wrong", "passed"), [(1, True), (12, False)])
def test_short_cases_of_half_precision_are_judged_together(
    tiny_build: TinyBuild, backbone: Any, wrong: int, passed: bool
) -> None:
    """A near tie that changes sides is more than three percent of sixteen steps, and less than that of all."""
    manifest = BundleManifest.load(tiny_build.bundle)
    reference = Reference(tiny_build.bundle, manifest, backbone)
    truths = measure_truth(tiny_build.bundle, manifest, reference, Settings(0, NEW_TOKENS), lambda _: None)
    last = [truth for _, rows in truths.cases for truth in rows if len(rows) * len(truth.tokens) < 64]
    for truth in last[:wrong]:
        truth.forced = truth.fed
        truth.tokens[-1] = (truth.tokens[-1] + 1) % 320
        truth.margins[-1] = 1.0
    with Session.open(tiny_build.bundle) as session:
        session.target = dataclasses.replace(session.target, dtype="fp16")
        result = compare_target(session, reference, truths, Settings(0, NEW_TOKENS), lambda _: None)
    checks = {check.case: check for check in result.checks if check.stage == "top-1 agreement"}
    (short,) = [check for case, check in checks.items() if case == "every short case"]
    compared = short.measured["compared"]
    assert short.measured["agreement"] == pytest.approx(1 - min(wrong, len(last)) / compared)
    assert compared >= 64 and all(check.measured["compared"] >= 64 for check in checks.values())
    assert (short.passed, result.status == "pass") == (passed, passed)


@pytest.mark.parametrize(
    ("dtype", "others", "count", "judged_alone"),
    [("int8", 200, 64, True), ("int8", 200, 63, False), ("int8", 0, 64, False), ("fp32", 200, 64, False)],
)
def test_a_tenant_that_rounding_spoils_does_not_hide_among_others(
    dtype: str, others: int, count: int, judged_alone: bool
) -> None:
    """The median over everybody's rows is as good as ever; one tenant by itself would be refused, as it is here."""
    figures = {"good": [{"relative": 0.03, "kl": 1e-3}] * others, "bad": [{"relative": 0.11, "kl": 1e-3}] * count}
    errors = Errors(of_tenant={name: each for name, each in figures.items() if each})
    judge_tenants(dtype, errors)
    found = {check.case: (check.passed, check.tenants) for check in errors.checks}
    expected = {"every row of good": (True, ["good"]), "every row of bad": (False, ["bad"])}
    if not judged_alone:
        expected.pop("every row of bad")
    assert found == (expected if others and dtype == "int8" else {})


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_a_prompt_that_gets_no_answer_fails_in_every_type(tiny_build: TinyBuild, backbone: Any, dtype: str) -> None:
    """No limit of rounding holds it: logits of a prompt of the tenant's own that overflow, say."""
    manifest = BundleManifest.load(tiny_build.bundle)
    reference = Reference(tiny_build.bundle, manifest, backbone)
    truths = measure_truth(tiny_build.bundle, manifest, reference, Settings(0, NEW_TOKENS), lambda _: None).prompts
    with Session.open(tiny_build.bundle) as session:
        session.target = dataclasses.replace(session.target, dtype=dtype)
        for failures in ([], ["request 3 failed: its logits hold NaN or infinity"]):
            errors = Errors()
            compare_tokens(session, truths, Answers([list(truth.free) for truth in truths], failures), errors)
            (check,) = errors.checks
            assert check.passed == (not failures) and check.measured["answered"] == 1 - len(failures) / 24
            assert check.detail.endswith("; ".join(["0 excused as ties", *failures]))


def test_a_prompt_list_that_does_not_fit(tiny_build: TinyBuild) -> None:
    outcome = run("validate", tiny_build.bundle, "--quiet", "--new-tokens=157")
    assert outcome.code == 1
    assert "tenant alpha: no example prompt has at most 0 tokens" in outcome.err and "lower --new-tokens" in outcome.err
    with pytest.raises(BundleError, match="not in this bundle"):
        Session.open(tiny_build.bundle, "tensorrt")
    assert Request("alpha").max_new_tokens == 64


def test_coarse_weights_may_be_wrong_at_one_step_and_others_at_none() -> None:
    figures = [{"relative": 0.1, "cosine": 0.9, "agreed": 1.0}] * 7 + [{"relative": 1.8, "cosine": 0.1, "agreed": 0.0}]
    assert [judged(figures, dtype)["relative"] for dtype in ("fp32", "fp16", "int8", "int4")] == [1.8, 1.8, 0.1, 0.1]
    assert judged(figures[1:], "int8")["relative"] == 1.8, "of seven, none"
    assert judged(figures, "int8") == {"relative": 0.1, "cosine": 0.1, "agreed": 7 / 8}


@pytest.mark.parametrize(("scale", "failed"), [(1.0, set()), (1.3, {"typical logits"})])
def test_coarse_weights_are_judged_by_the_median_as_well(
    tiny_build: TinyBuild, backbone: Any, monkeypatch: pytest.MonkeyPatch, scale: float, failed: set[str]
) -> None:
    """A fault in every row that int8's limit of the worst lets through; of few tokens the median is not judged."""
    manifest = BundleManifest.load(tiny_build.bundle)
    reference = Reference(tiny_build.bundle, manifest, backbone)
    settings = Settings(new_tokens=NEW_TOKENS, depth="quick")
    truths = measure_truth(tiny_build.bundle, manifest, reference, settings, lambda _: None)
    honest = in_place_stepper._run
    monkeypatch.setattr(in_place_stepper, "_run", lambda *args: honest(*args) * scale)
    with Session.open(tiny_build.bundle) as session:
        session.target = dataclasses.replace(session.target, dtype="int8")
        result = compare_target(session, reference, truths, settings, lambda _: None)
    assert {check.stage for check in result.checks if not check.passed} - {"prefill logits", "decode logits"} == failed
    medians = {check.case: check.measured for check in result.checks if check.stage == "typical logits"}
    assert medians and all(figures["compared"] >= 64 for figures in medians.values())
    assert "one-token" not in medians
