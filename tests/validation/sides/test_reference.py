"""PyTorch's side: the trained modules themselves, tenant by tenant, also behind the runner contract."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.serving.session import Request, Session
from engines.serving.text import TextCodec
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import NEW_TOKENS, PROMPTED, TENANTS, TinyBuild, session_over, tokens_of
from tests.graphs import flat, trained_prefill, trained_prompt, worst
from tests.tiny import padded
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.generate import greedy
from trainers.decoder.method import rows_of
from validation.sides import truth
from validation.sides.cases import GENERAL_PROMPTS, MIN_PROMPTS, prompts_from_bundle, read_examples
from validation.sides.reference import Reference, TorchRunner
from validation.sides.truth import record_truth

REQUESTS = [
    Request("gamma", "the film is a quiet joy", max_new_tokens=NEW_TOKENS),
    Request("alpha", "a dull and noisy story that nobody will remember", max_new_tokens=NEW_TOKENS),
    Request("beta", "yes", max_new_tokens=3),
    Request("gamma", "grain oil", max_new_tokens=NEW_TOKENS),
]

PREFILL = Reference.prefill
FORCED = truth._record_forced


@pytest.fixture(scope="module")
def manifest(tiny_build: TinyBuild) -> BundleManifest:
    return BundleManifest.load(tiny_build.bundle)


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Backbone:
    return load_backbone(str(tiny_build.model))


@pytest.fixture(scope="module")
def reference(tiny_build: TinyBuild, manifest: BundleManifest, backbone: Backbone) -> Reference:
    return Reference(tiny_build.bundle, manifest, backbone)


@pytest.fixture
def torch_session(tiny_build: TinyBuild, manifest: BundleManifest, reference: Reference) -> Iterator[Session]:
    target = manifest.target()
    runners: Any = {name: TorchRunner(name, target.graphs[name], reference) for name in ("prefill", "decode")}
    with session_over(tiny_build.bundle, runners) as session:
        yield session


def test_a_session_on_pytorch_and_one_on_onnx_runtime_answer_alike(
    tiny_build: TinyBuild, torch_session: Session
) -> None:
    with Session.open(tiny_build.bundle) as session:
        assert tokens_of(torch_session, REQUESTS) == tokens_of(session, REQUESTS)


def test_torch_runner_outputs_equal_onnx_runtimes(tiny_build: TinyBuild, torch_session: Session) -> None:
    ids, mask = padded([5, 9, 2, 7], "left")
    bank = torch_session.stepper.bank
    tenants = {**bank.stacks, **bank.indices([bank.get(name) for name in ("gamma", "alpha", "beta", "gamma")])}
    assert tenants["iapt.tenant_index"].tolist() == [2, 0, 1, 2]
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **tenants}
    with Session.open(tiny_build.bundle, in_place=False) as session:
        wanted = session.stepper.runners["prefill"].infer(feeds)
    made = torch_session.stepper.runners["prefill"].infer(feeds)
    assert list(made) == list(wanted)
    for name in wanted:
        real = slice(None) if name == "logits" else (np.s_[:, :, -2:])  # the last two tokens are real in every row
        assert worst(made[name][real], wanted[name][real]) < 2e-5


def test_prefill_is_the_trained_module(tiny_build: TinyBuild, reference: Reference, backbone: Backbone) -> None:
    methods = [load_adapter(folder).module() for folder in tiny_build.adapters.values()]
    ids, mask = padded([6, 6])
    for index, tenant in enumerate(TENANTS):
        logits, cache = reference.prefill(tenant, ids, mask)
        wanted, layers = trained_prefill(backbone.model, methods, [index] * 2, ids, mask)
        assert worst(logits, wanted) < 1e-5
        assert all(worst(a, b) < 1e-5 for a, b in zip(flat(cache), layers, strict=True))


def test_prompts_and_what_they_were_made_from(reference: Reference) -> None:
    ids, mask = padded([6, 3], "left")
    prompts, hidden = reference.prompts_and_hidden("beta", ids, mask)
    assert (prompts.shape, hidden.shape) == ((2, 2, 4, 32), (2, 2, 6, 32))
    embedded = reference.model.get_input_embeddings()(ids)
    assert torch.equal(hidden[:, 0], embedded)
    for layer in range(2):
        wanted = trained_prompt(reference.methods["beta"], layer, hidden[:, layer], mask)
        assert torch.equal(prompts[:, layer], wanted)
    assert "slots" not in vars(reference.methods["beta"]), "the reference itself goes on unrecorded"


def test_a_truth_is_what_the_trainer_generates(
    tiny_build: TinyBuild, manifest: BundleManifest, reference: Reference, backbone: Backbone
) -> None:
    prompts = prompts_from_bundle(tiny_build.bundle, manifest, TextCodec(tiny_build.bundle), 0, NEW_TOKENS)
    truths = record_truth(reference, prompts, new_tokens=NEW_TOKENS, num_kept=2)
    for one in truths[:6]:
        ids = torch.tensor([one.prompt.tokens])
        tokens, margins = greedy(
            backbone.model,
            rows_of(reference.methods[one.prompt.tenant]),
            ids,
            torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            eos_token_ids=tuple(manifest.backbone.eos_token_ids),
        )
        assert one.tokens == tokens[0]
        assert one.margins == pytest.approx(margins[0], abs=1e-3)
    kept = truths[0]
    assert len(kept.logits) == len(kept.tokens) and kept.peak == max(float(np.abs(x).max()) for x in kept.logits)
    entries = 4 + len(kept.prompt.tokens)
    assert {array.shape[1] for pair in kept.prefill_cache for array in pair} == {entries}
    assert {array.shape[1] for pair in kept.final_cache for array in pair} == {entries + len(kept.tokens) - 1}
    assert not truths[2].logits and not truths[2].prefill_cache


def test_a_row_is_what_it_is_alone(
    tiny_build: TinyBuild, manifest: BundleManifest, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows drafted together: what padding does to a row must not reach the reference."""
    prompts = prompts_from_bundle(tiny_build.bundle, manifest, TextCodec(tiny_build.bundle), 0, 6)[:3]
    wanted = record_truth(reference, prompts, new_tokens=6, num_kept=1)

    def wrong(_: Any, __: str, prompts: list[Any], new_tokens: int, ___: Any) -> list[list[int]]:
        return [[3] * new_tokens for _ in prompts]

    monkeypatch.setattr(truth, "_draft", wrong)
    made = record_truth(reference, prompts, new_tokens=6, num_kept=1)
    assert [row.tokens for row in made] == [row.tokens for row in wanted] and made[0].fed == wanted[0].fed
    np.testing.assert_allclose(made[0].logits, wanted[0].logits, atol=1e-4)


@pytest.mark.parametrize("at_once", [False, True], ids=["after the prompt", "with the prompt"])
def test_feeding_tokens_in_one_pass_is_stepping_through_them(
    at_once: bool,
    tiny_build: TinyBuild,
    manifest: BundleManifest,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of several tenants and lengths, so that batches hold padding."""
    prompts = prompts_from_bundle(tiny_build.bundle, manifest, TextCodec(tiny_build.bundle), 0, NEW_TOKENS)[:7]
    assert len({len(prompt.tokens) for prompt in prompts}) > 1 < len({prompt.tenant for prompt in prompts})
    stepped = record_truth(reference, prompts, new_tokens=NEW_TOKENS, num_kept=len(prompts))
    monkeypatch.setattr(truth, "is_streamed", lambda _: at_once)
    given = [(row.prompt, row.fed) for row in stepped]
    fed = record_truth(reference, [], new_tokens=1, num_kept=0, given=given)
    for made, wanted in zip(fed, stepped, strict=True):
        assert (made.prompt, made.tokens, made.fed) == (wanted.prompt, wanted.tokens, wanted.fed)
        assert made.margins == pytest.approx(wanted.margins, abs=1e-4)
        pairs = list(zip(made.logits, wanted.logits, strict=True))
        for cache in ("prefill_cache", "final_cache"):
            for mine, theirs in zip(getattr(made, cache), getattr(wanted, cache), strict=True):
                pairs += zip(mine, theirs, strict=True)  # keys and values
        assert all(worst(*pair) < 1e-5 for pair in pairs)


def test_drafts_decide_nothing_but_how_often_the_backbone_is_asked(
    tiny_build: TinyBuild, manifest: BundleManifest, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_from_bundle(tiny_build.bundle, manifest, TextCodec(tiny_build.bundle), 0, 6)[:3]
    wanted = [row.tokens for row in record_truth(reference, prompts, new_tokens=6, num_kept=0)]
    monkeypatch.setattr(truth, "_draft", lambda *_: pytest.fail("PyTorch drafts although there are drafts"))
    asked: list[Any] = []
    monkeypatch.setattr(Reference, "prefill", lambda *args: asked.append(args) or PREFILL(*args))
    wrong_once, wrong = [[tokens[0], 3, *tokens[2:]] for tokens in wanted], [[3] * 6 for _ in wanted]
    for drafts, passes in ((wanted, 3), (wrong_once, 9), (wrong, 9)):  # read, gone on from, and read again
        asked.clear()
        made = record_truth(reference, prompts, new_tokens=6, num_kept=0, drafts=drafts)
        assert [row.tokens for row in made] == wanted and len(asked) == passes


def test_over_a_streamed_backbone_a_draft_is_read_once(
    tiny_build: TinyBuild, manifest: BundleManifest, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further token of PyTorch's own would be another reading of all weights."""
    prompts = prompts_from_bundle(tiny_build.bundle, manifest, TextCodec(tiny_build.bundle), 0, 6)[:3]
    wanted = record_truth(reference, prompts, new_tokens=6, num_kept=0)
    assert [row.free for row in wanted] == [row.tokens for row in wanted]
    other = [[*row.tokens[:2], row.tokens[2] + 1, *row.tokens[3:]] for row in wanted]
    monkeypatch.setattr(truth, "is_streamed", lambda _: True)
    asked: list[Any] = []
    monkeypatch.setattr(truth, "_record_forced", lambda *args, **kept: asked.append(args) or FORCED(*args, **kept))
    made = record_truth(reference, prompts, new_tokens=6, num_kept=3, drafts=other)
    assert len(asked) == 3 and [len(row.logits) for row in made] == [6] * 3
    assert [row.free for row in made] == [row.tokens[:3] for row in wanted]
    assert [row.fed for row in made] == [tuple(draft[:-1]) for draft in other]
    asked.clear()
    same = record_truth(reference, prompts, new_tokens=6, num_kept=0, drafts=[row.tokens for row in wanted])
    assert len(asked) == 3 and [row.free for row in same] == [row.tokens for row in wanted]


def test_a_reference_for_another_backbone_is_refused(tiny_build: TinyBuild, manifest: BundleManifest) -> None:
    from tests.tiny import tiny_llama

    other = Backbone(tiny_llama(num_hidden_layers=3), None, "other")
    with pytest.raises(BundleError, match=r"other has fingerprint .* with .*; give that one with --model"):
        Reference(tiny_build.bundle, manifest, other)


def test_torch_runner_checks_what_it_is_fed(manifest: BundleManifest, reference: Reference) -> None:
    spec = manifest.target().graphs["decode"]
    runner = TorchRunner("decode", spec, reference)
    with pytest.raises(IaptError, match=r"decode.onnx: the runner is not active; use it in a with block or call act"):
        runner.infer({})
    past = {t.name: np.zeros((1, 2, 3, 8), np.float32) for t in spec.inputs if t.name.startswith("past")}
    feeds = {"input_ids": np.array([[5]]), "attention_mask": np.array([[1, 0, 1, 1]]), **past}
    with runner:
        assert runner.infer({**feeds, "position_ids": np.array([[2]])})["logits"].shape == (1, 1, 320)
        with pytest.raises(IaptError, match="position_ids do not count the mask's real tokens; expected the number"):
            runner.infer({**feeds, "position_ids": np.array([[3]])})
        with pytest.raises(IaptError, match="input position_ids is missing"):
            runner.infer(feeds)
    with pytest.raises(IaptError, match="not active"):
        runner.infer(feeds)


def test_prompts_mix_tenants_and_fill_up(tiny_build: TinyBuild, manifest: BundleManifest) -> None:
    codec = TextCodec(tiny_build.bundle)
    prompts = prompts_from_bundle(tiny_build.bundle, manifest, codec, 0, NEW_TOKENS)
    assert len(prompts) == MIN_PROMPTS
    assert len({(prompt.tenant, prompt.text) for prompt in prompts}) == MIN_PROMPTS
    assert {prompt.tenant for prompt in prompts[:3]} == set(TENANTS), "the first batch has everybody"
    assert prompts == prompts_from_bundle(tiny_build.bundle, manifest, codec, 0, NEW_TOKENS)
    assert prompts != prompts_from_bundle(tiny_build.bundle, manifest, codec, 1, NEW_TOKENS)
    formats = {tenant.name: tenant.prompt_format for tenant in manifest.tenants}
    assert formats == PROMPTED
    assert all(list(p.tokens) == codec.encode(p.text, formats[p.tenant]) for p in prompts)


def test_one_tenant_without_examples_gets_distinct_general_prompts(
    tiny_build: TinyBuild, manifest: BundleManifest
) -> None:
    alone = dataclasses.replace(manifest, tenants=[dataclasses.replace(manifest.tenants[0], examples=None)])
    prompts = prompts_from_bundle(tiny_build.bundle, alone, TextCodec(tiny_build.bundle), 0, NEW_TOKENS)
    assert len({prompt.text for prompt in prompts}) >= MIN_PROMPTS - 4  # a few are longer than the range
    assert any(prompt.text in GENERAL_PROMPTS for prompt in prompts)


def test_every_tenant_must_be_compared(tiny_bundle: Path, manifest: BundleManifest) -> None:
    long = "the film " * 200
    (tiny_bundle / "tenants/beta.examples.jsonl").write_text(json.dumps({"prompt": long}), encoding="utf-8")
    with pytest.raises(
        BundleError, match="tenant beta: no example prompt has at most 96 tokens, so nothing to compare"
    ):
        prompts_from_bundle(tiny_bundle, manifest, TextCodec(tiny_bundle), 0, NEW_TOKENS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", r':1: expected a JSON object like {"prompt": "..."}'),
        ('{"prompt": "a"}\n{"text": "b"}', r':2: expected a JSON object like {"prompt": "..."}'),
        ('{"prompt": "a"}\n\n{"prompt": "b"}', ":2: expected a JSON object"),
        ("[1]", ":1: expected a JSON object"),
        ('{"prompt": " "}', ":1: the prompt is empty or no text"),
        ('{"prompt": 3}', ":1: the prompt is empty or no text"),
        ("", "is empty; expected a JSON object"),
    ],
)
def test_bad_examples_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(IaptError) as caught:
        read_examples(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_backbone_with_other_weights_is_refused(tiny_build: TinyBuild, manifest: BundleManifest) -> None:
    other = load_backbone(str(tiny_build.model))
    with torch.no_grad():
        other.model.get_input_embeddings().weight[5, 3] += 1e-3
    with pytest.raises(BundleError, match="the architecture but not the weights of the bundle's backbone"):
        Reference(tiny_build.bundle, manifest, other)


def test_one_of_each_method_is_in_the_first_batch(tiny_build: TinyBuild, manifest: BundleManifest) -> None:
    """The first batch is compared logit by logit; a method that is not in it would only show in its tokens."""
    crowd = [
        dataclasses.replace(manifest.tenants[number % 3], name=f"t{number}", method="lora" if number == 11 else "iapt")
        for number in range(12)
    ]
    many = dataclasses.replace(manifest, tenants=crowd)
    for seed in range(5):
        prompts = prompts_from_bundle(tiny_build.bundle, many, TextCodec(tiny_build.bundle), seed, NEW_TOKENS)
        assert "t11" in {prompt.tenant for prompt in prompts[:2]}
        assert len({prompt.tenant for prompt in prompts[:12]}) == 12
