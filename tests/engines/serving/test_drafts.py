"""Drafts by prompt lookup change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.serving.drafts import FIRST_RATE, LEAST_SAMPLES, LENGTHS, PATIENCE, Drafter, Drafting
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.session import Grammar, Request, Sampling, Session, Token
from iapt_export.building.layout import with_files
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.installed import installed_from_manifest
from tests.bundles import TENANTS, TinyBuild, run
from trainers.decoder.backbone import Backbone, load_backbone

DRAFTS = 3
Given = dict[int, list[Token]]


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Backbone:
    return load_backbone(str(tiny_build.model))


@pytest.fixture(scope="module")
def bundle(tiny_build: TinyBuild, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with the graph that ``build --drafts`` adds."""
    copy = Path(shutil.copytree(tiny_build.bundle, tmp_path_factory.mktemp("drafts") / "bundle"))
    manifest = BundleManifest.load(copy)
    methods, serving = installed_from_manifest(manifest, backbone.model), Serving(161, drafts=DRAFTS)
    (copy / "more").mkdir()
    specs = export_graphs(
        backbone.model, methods, copy / "more", dtype="fp32", opset=23, names=("verify",), serving=serving
    )
    target = manifest.target()
    graphs = {**target.graphs, "verify": dataclasses.replace(specs["verify"], path="more/verify.onnx")}
    targets = [dataclasses.replace(target, graphs=graphs)]
    with_files(dataclasses.replace(manifest, targets=targets), copy).save(copy)
    return copy


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take drafts wherever there are any, whatever a step costs here."""
    monkeypatch.setattr(Drafting, "pays", lambda _self, expected: sum(expected) > 0)


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle, threads=1) as session:
        yield session


def given(session: Session, requests: Sequence[Request]) -> Given:
    """Every token of every answer, with its text, its reason and its log-probabilities."""
    found: Given = {number: [] for number in range(len(requests))}
    for token in session.stream(requests):
        found[token.index].append(token)
    return found


def with_drafts(bundle: Path, requests: Sequence[Request]) -> tuple[Given, int, int]:
    with Session.open(bundle, drafts=DRAFTS, threads=1) as session:
        found = given(session, requests)
        state = session.state()
        return found, state.drafted_tokens, state.accepted_tokens


def instructions(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Every second repeats itself."""
    source = np.random.default_rng(seed)
    made = []
    for number in range(count):
        tokens = source.integers(2, 300, int(source.integers(3, 20))).tolist()
        made.append(tuple((tokens[:6] * 4)[: int(source.integers(8, 24))] if number % 2 else tokens))
    return made


def asked(number: int, tokens: tuple[int, ...]) -> Request:
    """Requests of all kinds, by turns."""
    sampling = [
        Sampling(),
        Sampling(temperature=0.7, top_p=0.9, seed=number),
        Sampling(temperature=1.0, top_k=5, seed=number),
        Sampling(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={7: 2.0}),
    ]
    fields: list[dict[str, Any]] = [
        {},
        {"logprobs": 3},
        {"stop": ("e",), "max_new_tokens": 40},
        {"max_new_tokens": 1 + number % 7},
        {"stop_token_ids": tuple(range(20, 60)), "min_tokens": 4},
        {"ignore_eos": True},
        {"logits_hook": lambda answer, logits: logits + np.float32(len(answer) % 3) * (np.arange(len(logits)) == 9)},
    ]
    tenant = [*TENANTS, ""][number % 4]
    settings = {"max_new_tokens": 30, "sampling": sampling[number % 3 if number % 5 else 3]}
    return Request(tenant, tokens=tokens, **{**settings, **fields[number % 7]})


@pytest.mark.usefixtures("always")
def test_answers_are_the_same_to_the_last_bit(bundle: Path, plain: Session) -> None:
    requests = [asked(number, tokens) for number, tokens in enumerate(instructions(48))]
    found, drafted, accepted = with_drafts(bundle, requests)
    wanted = given(plain, requests)
    assert found == wanted  # tokens, texts, reasons, log-probabilities; 48 requests come and go over eight rows
    assert {tokens[-1].finish_reason for tokens in wanted.values()} >= {"length", "stop"}
    assert drafted > accepted > 20
    assert plain.state().drafted_tokens == plain.state().accepted_tokens == 0


@pytest.mark.usefixtures("always")
def test_the_backbone_answers_as_in_transformers(bundle: Path, backbone: Backbone) -> None:
    for tokens in instructions(6, seed=1)[1::2]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            whole = backbone.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, use_cache=True
            )
        wanted = whole[0, len(tokens) :].tolist()
        found, _, accepted = with_drafts(bundle, [Request("", tokens=tokens, max_new_tokens=40)])
        assert [token.token for token in found[0]] == wanted and accepted > 0


@pytest.mark.usefixtures("always")
def test_rows_may_fill_their_cache(bundle: Path, plain: Session) -> None:
    capacity = plain.stepper.capacity
    requests = [
        Request("alpha", tokens=(5, 6, 7) * 4, max_new_tokens=None, ignore_eos=True),
        Request("", tokens=(9, 8) * 5, max_new_tokens=capacity - 10 + 1, ignore_eos=True),
    ]
    found, _, accepted = with_drafts(bundle, requests)
    assert found == given(plain, requests) and accepted > 20
    assert len(found[0]) == capacity - 4 - 12 + 1 and found[1][-1].finish_reason == "length"


@pytest.mark.usefixtures("always")
def test_the_end_token_ends_an_answer_within_a_draft(bundle: Path, plain: Session) -> None:
    end = plain.manifest.backbone.eos_token_ids[0]

    def ends(answer: Sequence[int], logits: np.ndarray) -> np.ndarray:
        logits[end] = 1e4 if len(answer) == last else -1e4
        return logits

    for last in range(8, 13):
        requests = [Request("alpha", tokens=(5, 6, 7) * 4, max_new_tokens=60, logits_hook=ends)]
        found, _, accepted = with_drafts(bundle, requests)
        assert found == given(plain, requests) and accepted > 0
        assert (len(found[0]), found[0][-1].token, found[0][-1].finish_reason) == (last + 1, end, "eos")


@pytest.mark.usefixtures("always")
def test_a_grammar_holds_in_every_place_of_a_draft(bundle: Path, plain: Session) -> None:
    pytest.importorskip("llguidance")
    grammar = Grammar(regex="(the film the film )+is a joy")
    requests = [Request("beta", "the film the film the film the film", max_new_tokens=80, grammar=grammar)] * 2
    found, _, accepted = with_drafts(bundle, requests)
    assert found == given(plain, requests) and accepted > 0


@pytest.mark.usefixtures("always")
def test_what_fails_within_a_draft_ends_one_request_alone(bundle: Path, plain: Session) -> None:
    def fails(answer: Sequence[int], logits: np.ndarray) -> np.ndarray:
        assert len(answer) < 9, "enough"
        return logits

    repeated = (5, 6, 7) * 4
    good = [Request(name, tokens=repeated, max_new_tokens=30, ignore_eos=True) for name in TENANTS]
    bad = dataclasses.replace(good[0], logits_hook=fails)
    wanted = given(plain, good)
    with Session.open(bundle, drafts=DRAFTS, threads=1) as session:
        answers = list(session.generate([good[0], bad, good[1], good[2]], raised="never"))
        state = session.state()
    assert [answer.tokens for answer in answers if answer.error is None] == [
        [token.token for token in tokens] for tokens in wanted.values()
    ]
    assert answers[1].finish_reason == "error" and "enough" in str(answers[1].error)
    assert answers[1].tokens == answers[0].tokens[:9] and state.accepted_tokens > 0 and state.running == 0


@pytest.mark.usefixtures("always")
def test_a_late_request_ends_and_the_others_go_on(bundle: Path, plain: Session) -> None:
    long = Request("alpha", tokens=(5, 6, 7) * 4, max_new_tokens=120, ignore_eos=True)
    wanted = [token.token for token in given(plain, [long])[0]]
    with Session.open(bundle, drafts=DRAFTS, threads=1) as session:
        late = session.submit(dataclasses.replace(long, deadline_s=0.02))
        other, gone = session.submit(long), session.submit(long)
        next(iter(gone))
        gone.cancel()
        assert other.result().tokens == wanted
        answers = [late.result(), gone.result()]
    for answer in answers:
        assert answer.tokens == wanted[: len(answer.tokens)]
        assert answer.finish_reason in ("deadline", "cancelled", "length")


def test_rows_for_which_the_last_bits_differ_take_no_drafts(
    bundle: Path, plain: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one row in 4 bits does, whose products have a kernel of their own."""
    monkeypatch.setattr(Drafting, "pays", lambda _self, expected: sum(expected) > 0)
    whole = InPlaceStepper._step_of_several

    def off(stepper: InPlaceStepper, ids: np.ndarray) -> np.ndarray:
        logits = whole(stepper, ids)
        return np.nextafter(logits, np.float32(np.inf)) * -1 if stepper.num_rows == 1 else logits

    monkeypatch.setattr(InPlaceStepper, "_step_of_several", off)
    requests = [Request("alpha", tokens=(5, 6, 7) * 4, max_new_tokens=40, ignore_eos=True)] * 2
    with caplog.at_level(logging.WARNING):
        found, drafted, _ = with_drafts(bundle, requests[:1])
    assert found == given(plain, requests[:1]) and 0 < drafted <= DRAFTS
    assert "1 rows of fp32 take no drafts" in caplog.text
    found, drafted, accepted = with_drafts(bundle, requests)
    assert found == given(plain, requests) and accepted > 2 * DRAFTS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"drafts": 4}, "this bundle was built for at most 3 (ask for 3, or build with --drafts 4)"),
        ({"drafts": 1, "in_place": False}, "over a cache that each step concatenates does not take"),
        ({"drafts": -1}, "drafts is -1, expected how many tokens"),
        ({"drafts": 1.5}, "drafts is 1.5, expected how many tokens"),
    ],
)
def test_drafts_that_a_bundle_cannot_verify_are_refused(bundle: Path, settings: Any, words: str) -> None:
    with pytest.raises(IaptError) as caught:
        Session.open(bundle, **settings)
    assert words in str(caught.value) and caught.value.field in ("drafts", None)


def test_a_bundle_without_the_graph_is_refused(tiny_build: TinyBuild) -> None:
    with pytest.raises(IaptError, match=r"has no graph for them .build for onnxruntime with --drafts 2"):
        Session.open(tiny_build.bundle, drafts=2)
    outcome = run("generate", tiny_build.bundle, "--tenant=alpha", "--prompt=dull", "--drafts=2")
    assert outcome.code == 1 and "build for onnxruntime with --drafts 2" in outcome.err


def test_generate_takes_drafts(bundle: Path) -> None:
    words = ("generate", bundle, "--tenant=alpha", "--prompt=the film the film the film", "--max-new-tokens=24")
    with_them, without = run(*words, "--drafts=3"), run(*words)
    assert with_them.code == 0 and with_them.out == without.out and with_them.out.strip()


def test_a_draft_is_what_followed_the_last_tokens_before() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7, 2, 3], 3)
    assert drafter.propose() == [4, 5, 6]  # two tokens are found where three are not
    assert drafter.add(4) == (2, True) and drafter.propose() == [5, 6, 7]
    assert drafter.add(9) == (3, False) and drafter.propose() == []
    assert drafter.add(1) is None
    assert [drafter.add(token) for token in (2, 3, 4)] == [None, (2, True), (3, True)]
    assert drafter.propose()[0] == 9, "the latest place counts"


def test_the_longer_match_counts() -> None:
    assert Drafter([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1).propose() == [4]


def test_what_repeats_itself_goes_on() -> None:
    assert Drafter([8, 1, 2, 1, 2, 1, 2], 5).propose() == [1, 2, 1, 2, 1]
    assert Drafter([4, 4, 4], 3).propose() == [4, 4, 4]
    assert Drafter([4, 4], 3).propose() == Drafter([4], 3).propose() == Drafter([], 3).propose() == []


def test_a_row_expects_what_its_record_says() -> None:
    drafter = Drafter([1, 2, 3, 4] * 3, 3)
    assert drafter.expected(9) == pytest.approx(FIRST_RATE + FIRST_RATE**2 + FIRST_RATE**3)
    assert drafter.expected(1) == pytest.approx(FIRST_RATE) and drafter.expected(0) == 0
    for token in (1, 2, 3, 4) * 4:
        drafter.add(token)
    assert drafter.rates[LENGTHS[0]] > 0.95 and drafter.expected(9) > 2.7
    before = drafter.rates[LENGTHS[0]]
    assert drafter.add(9) == (LENGTHS[0], False) and drafter.rates[LENGTHS[0]] < 0.81 * before


def times(drafting: Drafting, rows: int, single: float, several: float, count: int = LEAST_SAMPLES) -> None:
    for _ in range(count):
        drafting.took(rows, single, drafts=False)
        drafting.took(rows, several, drafts=True)


def test_drafts_are_taken_where_tokens_a_second_grow() -> None:
    drafting = Drafting()
    assert not drafting.pays([2.0]), "what a single step takes must be known"
    drafting.took(1, 1.0, drafts=False)
    assert drafting.pays([0.5]) and not drafting.pays([0.01]), "tried until its cost is known, but not for nothing"
    times(drafting, 1, 1.0, 1.5)
    assert drafting.pays([0.6]) and not drafting.pays([0.5])
    assert drafting.pays([9.0, 0.0]) is False, "two rows have times of their own"
    times(drafting, 2, 1.0, 2.5)
    assert drafting.pays([3.0, 1.0]) and not drafting.pays([2.0, 0.5])


def test_what_did_not_pay_is_timed_anew_after_a_while() -> None:
    drafting = Drafting()
    times(drafting, 1, 1.0, 9.0)
    tries = [drafting.pays([1.0]) for _ in range(PATIENCE + 1)]
    assert tries == [False] * PATIENCE + [True]


def test_new_rows_begin_with_what_others_saw() -> None:
    drafting = Drafting()
    for _ in range(200):
        drafting.learn((LENGTHS[0], True))
        drafting.learn(None)
    drafter = Drafter([1, 2, 3] * 3, 3)
    drafting.start(drafter)
    assert drafter.expected(9) > 2.9
    drafter.add(7)
    assert drafting.rates[LENGTHS[0]] > 0.99 > drafter.rates[LENGTHS[0]], "a row's record is its own"
