"""Generation over a bundle: rows keep to themselves, text streams whole, and every bad request is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.loading import load_tenants
from engines.runner import Arrays
from engines.sampling import Sampling
from engines.session import Request, Session, Token, past_from_present
from iapt_export.errors import BundleError, IaptError
from iapt_export.manifest import BundleManifest
from tests.bundles import TENANTS, TinyBuild

TEXTS = ("the film is a quiet joy", "a dull and noisy story that nobody will remember", "yes", "grain oil trade money")
LENGTH = 10


@pytest.fixture(scope="module")
def session(tiny_build: TinyBuild) -> Iterator[Session]:
    with Session.open(tiny_build.bundle) as session:
        yield session


def with_eos(session: Session, *tokens: int) -> Session:
    """The same session, with other end tokens."""
    backbone = dataclasses.replace(session.manifest.backbone, eos_token_ids=list(tokens))
    manifest = dataclasses.replace(session.manifest, backbone=backbone)
    other = Session(session._bundle, manifest, session.target, session.runners)
    other.weights = session.weights
    return other


def mixed(**fields: Any) -> list[Request]:
    """Every text for every tenant in turn, eight rows of four lengths."""
    return [
        Request(TENANTS[row % 3], TEXTS[row % 4], max_new_tokens=LENGTH, ignore_eos=True, **fields) for row in range(8)
    ]


def test_a_row_answers_in_a_mixed_batch_what_it_answers_alone(session: Session) -> None:
    together = session.generate(mixed())
    assert together == [session.generate([request])[0] for request in mixed()]
    assert {len(row) for row in together} == {LENGTH}
    assert len({tuple(row) for row in together}) == 8, "tenants and texts must tell, or mixing them shows nothing"


def test_the_order_of_rows_does_not_matter(session: Session) -> None:
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    answers = session.generate(mixed())
    assert session.generate([mixed()[row] for row in order]) == [answers[row] for row in order]


def test_tokens_serve_as_well_as_text(session: Session) -> None:
    ids = tuple(session.codec.encode(TEXTS[0], "plain"))
    (tenant,) = [t.name for t in session.manifest.tenants if t.prompt_format == "plain"][:1]
    by_text = session.generate([Request(tenant, TEXTS[0], max_new_tokens=4)])
    assert session.generate([Request(tenant, tokens=ids, max_new_tokens=4)]) == by_text


def test_each_row_ends_at_its_own_end_token(session: Session) -> None:
    free = session.generate(mixed())
    eos = free[0][3]
    stopping = with_eos(session, eos)
    requests = [dataclasses.replace(request, ignore_eos=False) for request in mixed()]
    tokens = list(stopping.stream(requests))
    for row, wanted in enumerate(free):
        mine = [token for token in tokens if token.row == row]
        end = wanted.index(eos) + 1 if eos in wanted else LENGTH
        assert [token.token for token in mine] == wanted[:end]
        assert [token.step for token in mine] == list(range(end))
        reasons = [token.finish_reason for token in mine]
        assert reasons == [None] * (end - 1) + ["eos" if eos in wanted else "length"]
    assert len([t for t in tokens if t.row == 0]) <= 4
    assert any(len([t for t in tokens if t.row == row]) == LENGTH for row in range(8)), "not all rows end early"


def test_any_of_several_end_tokens_ends_a_row(session: Session) -> None:
    free = session.generate(mixed()[:1])[0]
    later = next(token for token in free if token != free[0])
    assert with_eos(session, later, free[0]).generate([dataclasses.replace(mixed()[0], ignore_eos=False)]) == [free[:1]]


def test_rows_end_at_their_own_length(session: Session) -> None:
    lengths = [1, 4, 2, 7]
    requests = [dataclasses.replace(mixed()[row], max_new_tokens=length) for row, length in enumerate(lengths)]
    answers = session.generate(requests)
    free = session.generate(mixed())
    assert answers == [free[row][:length] for row, length in enumerate(lengths)]


def test_streamed_text_is_the_answers_text(session: Session) -> None:
    texts = [""] * 8
    tokens: list[list[int]] = [[] for _ in range(8)]
    for token in session.stream(mixed(sampling=Sampling(temperature=3.0))):
        texts[token.row] += token.text
        tokens[token.row].append(token.token)
    assert texts == [session.codec.decode(row) for row in tokens]


def test_sampling_is_reproducible_and_independent_of_neighbours(session: Session) -> None:
    hot = Sampling(temperature=2.0, top_p=0.9, seed=5)
    requests = mixed(sampling=hot)
    together = session.generate(requests)
    assert session.generate(requests) == together
    assert [session.generate([request])[0] for request in requests[:3]] == together[:3]
    other = [dataclasses.replace(requests[0], sampling=dataclasses.replace(hot, seed=6)), *requests[1:]]
    changed = session.generate(other)
    assert changed[0] != together[0] and changed[1:] == together[1:]


def test_greedy_and_sampled_rows_share_a_batch(session: Session) -> None:
    requests = mixed()
    requests[1] = dataclasses.replace(requests[1], sampling=Sampling(temperature=2.0, seed=1))
    greedy, both = session.generate(mixed()), session.generate(requests)
    assert both[0] == greedy[0] and both[2:] == greedy[2:]


def test_prefill_and_decode_agree_with_one_longer_prefill_of_no_tenant(session: Session) -> None:
    """The cache that prefill writes is the one that decode goes on with: mask and positions line up."""
    prompts = [session.codec.encode(text, "plain") for text in TEXTS]
    logits, batch = session.prefill(prompts, ["alpha"] * 4)
    longest = max(map(len, prompts))
    assert logits.shape == (4, 320) and batch.mask.shape == (4, 4 + longest)
    assert batch.cache["past_key_values.1.value"].shape == (4, 2, 4 + longest, 8)
    assert batch.mask.sum(axis=1).tolist() == [4 + len(prompt) for prompt in prompts]
    assert (batch.mask[:, :4] == 1).all() and (batch.mask[:, -1] == 1).all()
    assert session.decode(np.array([2, 3, 4, 5]), batch).shape == (4, 320)
    assert batch.mask.shape == (4, 5 + longest) and batch.cache["past_key_values.0.key"].shape[2] == 5 + longest
    assert batch.tenants == ["alpha"] * 4


class Scripted:
    """A runner whose best token at each step is the next of a script, one script a row."""

    def __init__(self, scripts: list[list[int]], layers: int = 2) -> None:
        self.scripts = scripts
        self.layers = layers
        self.step = 0

    def activate(self) -> None:
        self.step = 0

    def deactivate(self) -> None:
        pass

    def infer(self, feeds: Arrays) -> Arrays:
        logits = np.zeros((len(self.scripts), 1, 320), np.float32)
        for row, script in enumerate(self.scripts):
            logits[row, 0, script[min(self.step, len(script) - 1)]] = 1.0
        self.step += 1
        length = feeds["attention_mask"].shape[1]
        empty = np.zeros((len(self.scripts), 2, length, 8), np.float32)
        return {"logits": logits} | {f"present.{i}.{part}": empty for i in range(2) for part in ("key", "value")}


def stream(bundle: Path, *texts: str, cut: int = 0) -> tuple[list[Token], Session]:
    """What a session streams when the model answers with these texts, byte by byte in the tiny vocabulary."""
    manifest = BundleManifest.load(bundle)
    session = Session(bundle, manifest, manifest.target(), {})
    scripts = [session.codec.encode(text, "plain") for text in texts]
    scripts = [script[: len(script) - cut] for script in scripts]
    runner = Scripted(scripts)
    session.runners = {"prefill": runner, "decode": runner}  # type: ignore[dict-item]
    requests = [Request("alpha", "yes", max_new_tokens=len(script), ignore_eos=True) for script in scripts]
    with session:
        return list(session.stream(requests)), session


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🙂👩‍👩‍👧 ok", "a🙂", "é", "mixed ü 字 🎉 end"])
def test_characters_of_several_bytes_stream_whole(tiny_build: TinyBuild, text: str) -> None:
    tokens, session = stream(tiny_build.bundle, text, "plain words only")
    mine = [token for token in tokens if token.row == 0]
    assert "".join(token.text for token in mine) == text == session.codec.decode([token.token for token in mine])
    assert all("\N{REPLACEMENT CHARACTER}" not in token.text for token in mine)
    assert any(token.text == "" for token in mine), "the tiny vocabulary splits these characters into bytes"
    assert "".join(token.text for token in tokens if token.row == 1) == "plain words only"


def test_an_answer_that_ends_within_a_character_shows_that(tiny_build: TinyBuild) -> None:
    tokens, session = stream(tiny_build.bundle, "joy 字", cut=1)
    text = "".join(token.text for token in tokens)
    assert text == session.codec.decode([token.token for token in tokens])
    assert text.startswith("joy ") and text.endswith("\N{REPLACEMENT CHARACTER}")


def test_only_the_cache_is_handed_on() -> None:
    outputs = {"logits": np.zeros(1), "present.0.key": np.ones(1), "present.11.value": np.ones(2)}
    assert list(past_from_present(outputs)) == ["past_key_values.0.key", "past_key_values.11.value"]


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        ([Request("delta", "yes")], "tenant 'delta' is not in this bundle; its tenants are alpha, beta, gamma"),
        ([Request("alpha", "")], "the prompt is empty; expected an instruction of at least one word"),
        ([Request("alpha", "  \n")], "the prompt is empty"),
        (
            [Request("alpha", tokens=(2,) * 97)],
            "a prompt has 97 tokens; this bundle takes at most 96 (shorten it, or bui",
        ),
        ([Request("alpha", "yes")] * 9, "9 requests in one batch; this bundle takes 1 to 8 (send fewer at a time, or"),
        ([], "0 requests in one batch; this bundle takes 1 to 8"),
        (
            [Request("alpha", tokens=(2, 320))],
            "request 0: token id 320 is out of range; the vocabulary has 320 entries",
        ),
        ([Request("alpha", "yes"), Request("beta", tokens=(-1,))], "request 1: token id -1 is out of range"),
        ([Request("alpha", "yes", max_new_tokens=0)], "request 0: max_new_tokens is 0, expected at least 1"),
        (
            [Request("alpha", tokens=(2,) * 96, max_new_tokens=1), Request("beta", tokens=(2,), max_new_tokens=62)],
            "the batch needs 161 cache entries (4 prompt, 96 instruction, the rest new tokens); this bundle has 160",
        ),
    ],
)
def test_bad_requests(session: Session, requests: list[Request], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        session.generate(requests)
    assert text in str(caught.value)


def test_the_largest_request_that_fits(session: Session) -> None:
    request = Request("alpha", tokens=(2,) * 96, max_new_tokens=61, ignore_eos=True)
    assert len(session.generate([request])[0]) == 61


def test_a_session_is_opened_before_it_answers(tiny_build: TinyBuild) -> None:
    session = Session.open(tiny_build.bundle)
    with pytest.raises(IaptError, match=r"prefill\.onnx: the runner is not active; use it in a with block"):
        session.generate(mixed())
    with session:
        first = session.generate(mixed())
    with pytest.raises(IaptError, match="not active"):
        session.generate(mixed())
    with session:
        assert session.generate(mixed()) == first


def test_another_target(tiny_build: TinyBuild) -> None:
    with pytest.raises(
        BundleError, match="target 'tensorrt' is not in this bundle, which has onnxruntime; build again"
    ):
        Session.open(tiny_build.bundle, "tensorrt")


def test_a_damaged_bundle_is_not_opened(tiny_bundle: Path) -> None:
    with (tiny_bundle / "weights.data").open("r+b") as stream:
        stream.write(b"\x01")
    with pytest.raises(BundleError, match=r"is damaged: weights\.data was altered"):
        Session.open(tiny_bundle)
    Session.open(tiny_bundle, verify=False)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.unlink(), "tenant beta: tenants/beta.safetensors is not a whole safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is not a whole safetensors file"),
        (lambda path: change(path, "query", None), "tenant beta: query has nothing, the bundle expects [2, 8, 4]"),
        (lambda path: change(path, "query", np.zeros((2, 8, 5), np.float32)), "query has shape [2, 8, 5], the bundle"),
        (
            lambda path: change(path, "up_bias", np.full((1, 32), np.nan, np.float32)),
            "up_bias holds NaN or infinity; tra",
        ),
    ],
)
def test_a_damaged_tenant(tiny_bundle: Path, damage: Any, text: str) -> None:
    damage(tiny_bundle / "tenants/beta.safetensors")
    with pytest.raises(BundleError) as caught, Session.open(tiny_bundle, verify=False):
        pass
    assert text in str(caught.value)


def test_a_weight_that_the_targets_type_cannot_hold(tiny_bundle: Path) -> None:
    change(tiny_bundle / "tenants/beta.safetensors", "up_bias", np.full((1, 32), 1e6, np.float32))
    manifest = BundleManifest.load(tiny_bundle)
    target = manifest.target()
    prefill = target.graphs["prefill"]
    halves = [dataclasses.replace(t, dtype="fp16") if t.dtype == "fp32" else t for t in prefill.inputs]
    graphs = {"prefill": dataclasses.replace(prefill, inputs=halves)}
    with pytest.raises(BundleError, match="method iapt: a tenant's up_bias has numbers too large for fp16; build for"):
        load_tenants(tiny_bundle, manifest, dataclasses.replace(target, graphs=graphs))


def change(path: Path, name: str, array: np.ndarray | None) -> None:
    tensors = {key: value for key, value in load_file(path).items() if key != name}
    save_file(tensors if array is None else {**tensors, name: array}, path)
