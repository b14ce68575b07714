"""Tenants of several methods in one bundle, through the command line: each row is as if its tenant were alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engines.serving.loading import open_runners
from engines.serving.session import Request, Session
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import (
    MIXED,
    NEW_TOKENS,
    Outcome,
    TinyBuild,
    change_manifest,
    rehash,
    run,
    session_over,
    tokens_of,
)
from tests.thorough import default_for
from tests.validation.sabotage import between
from trainers.adapters.adapter import PEFT_TYPES
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.generate import greedy
from trainers.decoder.method import rows_of
from trainers.methods.lopa import LoPA
from validation.sides.reference import Reference, TorchRunner

OWNERS = {
    "topics": "prompt_tuning",
    "movies": "iapt",
    "style": "prefix_tuning",
    "taste": "lopa",
    "mood": "prompt_tuning",
}
METHODS_PAGE = Path(__file__).resolve().parents[3] / "docs" / "methods.md"
FORMS = ["PROMPT_TUNING", "IAPT", "PREFIX_TUNING", "LOPA", "LAMP"]
TEXTS = ("the film is a quiet joy", "a dull and noisy story that nobody will remember", "yes")


@pytest.fixture(scope="module")
def build(mixed_build: TinyBuild) -> TinyBuild:
    return mixed_build


@pytest.fixture
def bundle(build: TinyBuild, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(build.bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "concatenated"])
def session(build: TinyBuild, request: pytest.FixtureRequest) -> Iterator[Session]:
    with Session.open(build.bundle, in_place=request.param) as session:
        yield session


@pytest.fixture(scope="module")
def backbone(build: TinyBuild) -> Backbone:
    return load_backbone(str(build.model))


def validate(bundle: Path, *flags: str) -> Outcome:
    return run("validate", bundle, "--json", "--quiet", f"--new-tokens={NEW_TOKENS}", *flags)


def test_every_row_is_as_in_pytorch(build: TinyBuild) -> None:
    report = json.loads((build.bundle / "report.json").read_text(encoding="utf-8"))
    *targets, shipped, peft = report["targets"]
    assert (shipped["name"], shipped["status"]) == ("tenants' files", "pass")
    assert len(targets) == 2 and report["method"] == ", ".join(FORMS)
    assert (peft["name"], peft["status"]) == ("PEFT's own answer", "pass")
    theirs = {name for name, form in zip(MIXED, FORMS, strict=True) if form in PEFT_TYPES}
    assert {check["case"].partition(",")[0] for check in peft["checks"]} == theirs == {"topics", "style"}
    for target in targets:
        assert report["verdict"] == target["status"] == "pass"
        assert {row["tenant"] for row in target["tokens"]} == set(MIXED)
        assert len(target["tokens"]) == 25 and all(row["reference"] == row["target"] for row in target["tokens"])
        assert {check["stage"] for check in target["checks"]} > {"prefill cache", "decode cache"}
    outcome = run("validate", build.bundle, "--quiet", f"--new-tokens={NEW_TOKENS}", "--seed=3")
    assert outcome.code == 0 and "25 of 25 rows identical" in outcome.out, outcome.err + outcome.out


def test_the_manifest_tells_who_is_what(build: TinyBuild) -> None:
    manifest = BundleManifest.load(build.bundle)
    assert {tenant.name: tenant.method for tenant in manifest.tenants} == OWNERS
    assert [tenant.trained_form for tenant in manifest.tenants] == FORMS
    assert {m.name: m.prompt_length for m in manifest.methods} == {
        "prompt_tuning": 4,
        "iapt": 4,
        "prefix_tuning": 7,
        "lopa": 6,
    }
    assert manifest.num_slots == 7
    assert [tenant.trained for tenant in manifest.tenants if tenant.trained] == ["tenants/trained/mood.safetensors"]
    assert set(manifest.target().graphs) == {"encoder", "prefill", "decode", "serve", "generator"}
    outcome = run("inspect", build.bundle, "--all")
    assert "prefix_tuning: PREFIX_TUNING, 7 prompt slots" in outcome.out
    assert "mood: LAMP as prompt_tuning" in outcome.out


def test_the_decode_step_is_the_same_file_as_without_the_others(build: TinyBuild, tiny_build: TinyBuild) -> None:
    """Four methods or one: the step takes nothing of them."""
    made, wanted = (onnx.load(folder / "decode.onnx") for folder in (build.bundle, tiny_build.bundle))
    assert made.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)
    names = [value.name for value in made.graph.input]
    assert all(name.startswith("past_key_values.") for name in names if "." in name)


@pytest.mark.parametrize("tenant", MIXED)
def test_generate_answers_what_the_trainer_answers(build: TinyBuild, backbone: Backbone, tenant: str) -> None:
    outcome = run(
        "generate", build.bundle, f"--tenant={tenant}", f"--prompt={TEXTS[1]}", "--max-new-tokens=12", "--json"
    )
    assert outcome.code == 0, outcome.err
    manifest = BundleManifest.load(build.bundle)
    with Session.open(build.bundle) as session:
        ids = torch.tensor([session.codec.encode(TEXTS[1], manifest.tenant(tenant).prompt_format)])
    module = load_adapter(build.adapters[tenant]).module()
    eos = tuple(manifest.backbone.eos_token_ids)
    wanted, _ = greedy(backbone.model, rows_of(module), ids, torch.ones_like(ids), max_new_tokens=12, eos_token_ids=eos)
    assert json.loads(outcome.out)[0]["tokens"] == wanted[0]


def requests(**fields: Any) -> list[Request]:
    names = [*MIXED, "movies", "style", "taste"]
    return [
        Request(name, TEXTS[row % 3], max_new_tokens=NEW_TOKENS, ignore_eos=True, **fields)
        for row, name in enumerate(names)
    ]


def test_a_row_answers_among_other_methods_what_it_answers_alone(session: Session) -> None:
    together = tokens_of(session, requests())
    assert together == [tokens_of(session, [request])[0] for request in requests()]
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    assert tokens_of(session, [requests()[row] for row in order]) == [together[row] for row in order]
    assert len({tuple(row) for row in together}) == len(together)


def test_a_row_shorter_than_the_longest_prompt_of_the_bundle(
    build: TinyBuild, session: Session, backbone: Backbone
) -> None:
    """Slots of the one method reach beyond the end of what the other's row has."""
    longest, own = session.manifest.num_slots, session.stepper.bank.get("topics").prompt_length
    assert own + 1 < longest
    made = next(iter(session.generate([Request("topics", tokens=(5,), max_new_tokens=4, ignore_eos=True)]))).tokens
    rows, ids = rows_of(load_adapter(build.adapters["topics"]).module()), torch.tensor([[5]])
    assert [made] == greedy(backbone.model, rows, ids, torch.ones_like(ids), max_new_tokens=4)[0]


def test_whose_each_row_is(session: Session) -> None:
    bank = session.stepper.bank
    index = {
        name: a.tolist()
        for name, a in bank.indices([bank.get(n) for n in ("mood", "taste", "topics", "movies")]).items()
    }
    assert index == {
        "prompt_tuning.tenant_index": [1, -1, 0, -1],
        "iapt.tenant_index": [-1, -1, -1, 0],
        "prefix_tuning.tenant_index": [-1, -1, -1, -1],
        "lopa.tenant_index": [-1, 0, -1, -1],
    }


def test_pytorch_behind_the_runners_answers_alike(build: TinyBuild, session: Session, backbone: Backbone) -> None:
    manifest = session.manifest
    reference = Reference(build.bundle, manifest, backbone)
    graphs = manifest.target().graphs
    runners: Any = {name: TorchRunner(name, graphs[name], reference) for name in ("encoder", "prefill", "decode")}
    with session_over(build.bundle, runners) as eager:
        assert tokens_of(eager, requests()) == tokens_of(session, requests())


def sent_prompts(build: TinyBuild, backbone: Backbone, tokens: list[int]) -> np.ndarray:
    """What a client that has the LoPA adapter computes for an instruction."""
    module = load_adapter(build.adapters["taste"]).module()
    assert isinstance(module, LoPA)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        weights = module.prepare(module.weights(), backbone.model, ids, torch.ones_like(ids))
    return weights["prompts"][0].numpy()


def test_prompts_that_the_client_computed(build: TinyBuild, session: Session, backbone: Backbone) -> None:
    tokens = session.codec.encode(TEXTS[1], "plain")
    sent = sent_prompts(build, backbone, tokens)
    made, own, other, lacking = (
        Request("taste", tokens=tuple(tokens), soft_prompts=prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        for prompts in (None, sent, -sent, np.zeros_like(sent))
    )
    wanted = tokens_of(session, [made])[0]
    assert tokens_of(session, [own])[0] == wanted
    # side by side with the encoder's, with a longer row, and with a row of another method
    long = Request("style", TEXTS[1] + TEXTS[1], max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert [row for row in tokens_of(session, [made, long, own, other]) if row == wanted] == [wanted] * 2
    assert tokens_of(session, [other])[0] != wanted != tokens_of(session, [lacking])[0]


@pytest.mark.parametrize(
    "sent",
    ["abc", [[1.0, 2.0], [3.0]], object(), [[10**400] * 32] * 6, np.ones((6, 32), complex)],
    ids=["text", "ragged", "object", "too large", "complex"],
)
def test_prompts_that_are_no_numbers_leave_the_others_alone(session: Session, sent: Any) -> None:
    good, bad = (Request("taste", tokens=(5, 9), max_new_tokens=2, soft_prompts=prompts) for prompts in (None, sent))
    answers = list(session.generate([good, bad, good], raised="never"))
    assert [len(answer.tokens) for answer in answers] == [2, 0, 2]
    assert "soft_prompts is" in str(answers[1].error) and "expected an array of numbers" in str(answers[1].error)


def test_a_client_without_torch_computes_them_as_the_docs_say(build: TinyBuild, session: Session) -> None:
    (recipe,) = re.findall(r"```python\n(.*?)```", METHODS_PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    ids = session.codec.encode(TEXTS[1], "plain")
    names: dict[str, Any] = {"ids": ids, "Request": Request}
    exec(recipe.replace('"bundle/', f'"{build.bundle}/').replace("NAME", "taste"), names)
    sent, made = names["request"], Request("taste", tokens=tuple(ids))
    assert sent.soft_prompts.shape == (6, 32)
    assert tokens_of(session, [sent]) == tokens_of(session, [made])


def test_the_encoder_does_not_run_where_it_is_not_needed(
    build: TinyBuild, session: Session, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = session.codec.encode(TEXTS[0], "plain")
    sent = sent_prompts(build, backbone, tokens)
    taste = Request("taste", tokens=tuple(tokens), soft_prompts=sent, max_new_tokens=2)
    rows = [taste, Request("movies", TEXTS[1], max_new_tokens=2)]
    wanted = tokens_of(session, rows)
    counted: list[int] = []
    honest = session.stepper.runners["encoder"].infer
    monkeypatch.setattr(
        session.stepper.runners["encoder"],
        "infer",
        lambda feeds: counted.append(len(feeds["input_ids"])) or honest(feeds),
    )
    assert tokens_of(session, rows) == wanted and counted == []
    tokens_of(session, [*rows, Request("taste", TEXTS[2], max_new_tokens=2)])
    assert counted == [1], "the encoder reads only the rows that nobody sent prompts for"


OWN = "makes its own prompts; send none (only LoPA's may be computed by the client)"
SHAPE = "expected [6, 32]"


@pytest.mark.parametrize(
    ("tenant", "prompts", "text"),
    [
        ("movies", np.zeros((4, 32)), f"request 1: tenant movies was trained with IAPT, which {OWN}"),
        ("mood", np.zeros((4, 32)), f"request 1: tenant mood was trained with LAMP, which {OWN}"),
        ("taste", np.zeros((4, 32)), f"request 1: the sent prompts have shape [4, 32], {SHAPE}"),
        ("taste", np.zeros((1, 6, 32)), f"request 1: the sent prompts have shape [1, 6, 32], {SHAPE}"),
        (
            "taste",
            np.full((6, 32), np.nan),
            "request 1: the sent prompts hold NaN or infinity, or numbers too large for fp32",
        ),
    ],
)
def test_bad_sent_prompts(session: Session, tenant: str, prompts: np.ndarray, text: str) -> None:
    with pytest.raises(IaptError) as caught:
        tokens_of(session, [Request("movies", "yes"), Request(tenant, "yes", soft_prompts=prompts)])
    assert str(caught.value) == text


def failed_stages(bundle: Path, *flags: str) -> set[str]:
    """What a sabotaged bundle, whose hashes are all right, fails in."""
    rehash(bundle)
    outcome = validate(bundle, *flags)
    assert outcome.code == 3, outcome.err
    assert "differs from PyTorch in" in outcome.err
    targets = json.loads(outcome.out)["targets"]
    return {check["stage"] for target in targets for check in target["checks"] if not check["passed"]}


def swap_weights(bundle: Path) -> None:
    """Two tenants of one method get each other's shipped weights, under their own cards."""
    files = [bundle / f"tenants/{name}.safetensors" for name in ("topics", "mood")]
    cards = [safe_open(path, "numpy").metadata() for path in files]
    for path, card, other in zip(files, cards, [load_file(path) for path in reversed(files)], strict=True):
        save_file(other, path, card)


def swap_files(bundle: Path) -> None:
    """Two tenants of one method get each other's files."""
    first, second = (bundle / f"tenants/{name}.safetensors" for name in ("topics", "mood"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def edit_tenant(bundle: Path, name: str, **fields: Any) -> None:
    tenants = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["tenants"]
    change_manifest(bundle, tenants=[t | fields if t["name"] == name else t for t in tenants])


SABOTAGES = {
    "weights swapped": swap_weights,
    "a row of no method": lambda b: edit_tenant(b, "topics", method=None),
    "a method's rows are nobody's": lambda b: between(b, "prefill.onnx", "prefix_tuning.tenant_index", "Min", -1),
    "a method takes all rows": lambda b: between(b, "prefill.onnx", "lopa.tenant_index", "Max", 0),
    "encoder reads padding": lambda b: between(b, "encoder.onnx", "attention_mask", "Max", 1),
}


@pytest.mark.parametrize("sabotage", default_for("weights swapped".__eq__, SABOTAGES))
def test_sabotage_is_found(bundle: Path, sabotage: str) -> None:
    SABOTAGES[sabotage](bundle)
    # rows that need the encoder are read together, so padding takes two of one tenant, which a quick run has not
    failed = failed_stages(bundle, *(() if sabotage == "encoder reads padding" else ("--quick",)))
    wanted = {"greedy tokens"} if sabotage == "encoder reads padding" else {"prefill logits", "greedy tokens"}
    assert wanted <= failed
    assert "generator" not in failed


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (swap_files, "name is 'mood', and 'topics' in the manifest"),
        (lambda b: edit_tenant(b, "mood", path="tenants/topics.safetensors"), "name is 'topics', and 'mood' in the"),
        (lambda b: edit_tenant(b, "style", method="iapt"), "form and config are not those of method iapt"),
    ],
)
def test_a_file_that_is_another_tenants_is_refused(bundle: Path, change: Callable[[Path], None], text: str) -> None:
    change(bundle)
    rehash(bundle)
    outcome = validate(bundle)
    assert outcome.code == 1
    assert text in outcome.err


def test_a_tenant_without_a_file(bundle: Path) -> None:
    edit_tenant(bundle, "style", path=None, trained="tenants/style.safetensors")
    with pytest.raises(BundleError) as caught, Session.open(bundle):
        pass
    assert str(caught.value) == "tenant style is of method prefix_tuning but names no weights file"


def test_no_runner_for_the_generators_is_needed_to_answer(build: TinyBuild, session: Session) -> None:
    runners = open_runners(build.bundle, session.target)
    del runners["generator"], runners["serve"]
    with session_over(build.bundle, runners) as other:
        assert tokens_of(other, requests()) == tokens_of(session, requests())
