"""Generation over a bundle: rows keep to themselves, and every bad request is named."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engines.serving.loading import open_stepper
from engines.serving.sampling import Sampling
from engines.serving.session import Request, Session
from engines.serving.tenants import TenantBank
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import TENANTS, TinyBuild, tokens_of

TEXTS = ("the film is a quiet joy", "a dull and noisy story that nobody will remember", "yes", "grain oil trade money")
LENGTH = 10


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "concatenated"])
def session(tiny_build: TinyBuild, request: pytest.FixtureRequest) -> Iterator[Session]:
    with Session.open(tiny_build.bundle, in_place=request.param) as session:
        yield session


def with_eos(bundle: Path, *tokens: int) -> Session:
    """A session with other end tokens."""
    manifest = BundleManifest.load(bundle)
    backbone = dataclasses.replace(manifest.backbone, eos_token_ids=list(tokens))
    manifest = dataclasses.replace(manifest, backbone=backbone)
    return Session(bundle, manifest, manifest.target(), open_stepper(bundle, manifest, manifest.target()))


def mixed(**fields: Any) -> list[Request]:
    """Every text for every tenant in turn, eight rows of four lengths."""
    return [
        Request(TENANTS[row % 3], TEXTS[row % 4], max_new_tokens=LENGTH, ignore_eos=True, **fields) for row in range(8)
    ]


def test_a_row_answers_in_a_mixed_batch_what_it_answers_alone(session: Session) -> None:
    together = tokens_of(session, mixed())
    assert together == [tokens_of(session, [request])[0] for request in mixed()]
    assert {len(row) for row in together} == {LENGTH}
    assert len({tuple(row) for row in together}) == 8, "tenants and texts must tell, or mixing them shows nothing"


def test_the_order_of_rows_does_not_matter(session: Session) -> None:
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    answers = tokens_of(session, mixed())
    assert tokens_of(session, [mixed()[row] for row in order]) == [answers[row] for row in order]


def test_tokens_serve_as_well_as_text(session: Session) -> None:
    ids = tuple(session.codec.encode(TEXTS[0], "plain"))
    (tenant,) = [t.name for t in session.manifest.tenants if t.prompt_format == "plain"][:1]
    by_text = tokens_of(session, [Request(tenant, TEXTS[0], max_new_tokens=4)])
    assert tokens_of(session, [Request(tenant, tokens=ids, max_new_tokens=4)]) == by_text


def test_each_row_ends_at_its_own_end_token(session: Session) -> None:
    free = tokens_of(session, mixed())
    eos = free[0][3]
    requests = [dataclasses.replace(request, ignore_eos=False) for request in mixed()]
    with with_eos(session.bundle, eos) as stopping:
        tokens = list(stopping.stream(requests))
    for row, wanted in enumerate(free):
        mine = [token for token in tokens if token.index == row]
        end = wanted.index(eos) + 1 if eos in wanted else LENGTH
        assert [token.token for token in mine] == wanted[:end]
        assert [token.step for token in mine] == list(range(end))
        reasons = [token.finish_reason for token in mine]
        assert reasons == [None] * (end - 1) + ["eos" if eos in wanted else "length"]
    assert len([t for t in tokens if t.index == 0]) <= 4
    assert any(len([t for t in tokens if t.index == row]) == LENGTH for row in range(8)), "not all rows end early"


def test_any_of_several_end_tokens_ends_a_row(session: Session) -> None:
    free = tokens_of(session, mixed()[:1])[0]
    later = next(token for token in free if token != free[0])
    with with_eos(session.bundle, later, free[0]) as stopping:
        assert tokens_of(stopping, [dataclasses.replace(mixed()[0], ignore_eos=False)]) == [free[:1]]


def test_rows_end_at_their_own_length(session: Session) -> None:
    lengths = [1, 4, 2, 7]
    requests = [dataclasses.replace(mixed()[row], max_new_tokens=length) for row, length in enumerate(lengths)]
    answers = tokens_of(session, requests)
    free = tokens_of(session, mixed())
    assert answers == [free[row][:length] for row, length in enumerate(lengths)]


def test_streamed_text_is_the_answers_text(session: Session) -> None:
    texts = [""] * 8
    tokens: list[list[int]] = [[] for _ in range(8)]
    for token in session.stream(mixed(sampling=Sampling(temperature=3.0))):
        texts[token.index] += token.text
        tokens[token.index].append(token.token)
    assert texts == [session.codec.decode(row) for row in tokens]


def test_sampling_is_reproducible_and_independent_of_neighbours(session: Session) -> None:
    hot = Sampling(temperature=2.0, top_p=0.9, seed=5)
    requests = mixed(sampling=hot)
    together = tokens_of(session, requests)
    assert tokens_of(session, requests) == together
    assert [tokens_of(session, [request])[0] for request in requests[:3]] == together[:3]
    other = [dataclasses.replace(requests[0], sampling=dataclasses.replace(hot, seed=6)), *requests[1:]]
    changed = tokens_of(session, other)
    assert changed[0] != together[0] and changed[1:] == together[1:]


def test_greedy_and_sampled_rows_share_a_batch(session: Session) -> None:
    requests = mixed()
    requests[1] = dataclasses.replace(requests[1], sampling=Sampling(temperature=2.0, seed=1))
    greedy, both = tokens_of(session, mixed()), tokens_of(session, requests)
    assert both[0] == greedy[0] and both[2:] == greedy[2:]


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        ([Request("delta", "yes")], "tenant 'delta' is not in this bundle; its tenants are alpha, beta, gamma"),
        ([Request("alpha", "")], "the prompt is empty; expected an instruction of at least one word"),
        ([Request("alpha", "  \n")], "the prompt is empty"),
        (
            [Request("alpha", tokens=(2,) * 97)],
            "request 0: the prompt has 97 tokens; this bundle takes at most 96 (shorten it, or bui",
        ),
        (
            [Request("alpha", tokens=(2, 320))],
            "request 0: token id 320 is out of range; the vocabulary has 320 entries",
        ),
        ([Request("alpha", "yes"), Request("beta", tokens=(-1,))], "request 1: token id -1 is out of range"),
        ([Request("alpha", "yes", max_new_tokens=0)], "request 0: max_new_tokens is 0, expected at least 1"),
        (
            [Request("alpha", tokens=(2,), max_new_tokens=5), Request("beta", tokens=(2,) * 96, max_new_tokens=62)],
            "request 1 needs 161 cache entries (4 prompt, 96 instruction, the rest new tokens); this bundle has 160",
        ),
    ],
)
def test_bad_requests(session: Session, requests: list[Request], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        tokens_of(session, requests)
    assert text in str(caught.value)


def test_the_largest_request_that_fits(session: Session) -> None:
    request = Request("alpha", tokens=(2,) * 96, max_new_tokens=61, ignore_eos=True)
    assert len(tokens_of(session, [request])[0]) == 61


def test_a_session_is_opened_before_it_answers(tiny_build: TinyBuild) -> None:
    session = Session.open(tiny_build.bundle)
    with pytest.raises(IaptError, match="the session is not open; use it in a with block"):
        tokens_of(session, mixed())
    with session:
        first = tokens_of(session, mixed())
    with pytest.raises(IaptError, match="not open"):
        tokens_of(session, mixed())
    with session:
        assert tokens_of(session, mixed()) == first


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
        (lambda path: path.unlink(), "tenants/beta.safetensors cannot be read: No such file or directory"),
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
        TenantBank(tiny_bundle, manifest, dataclasses.replace(target, graphs=graphs))


def change(path: Path, name: str, array: np.ndarray | None) -> None:
    tensors = {key: value for key, value in load_file(path).items() if key != name}
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors if array is None else {**tensors, name: array}, path, metadata)


def test_a_forked_child_is_told_so_at_its_first_call(tiny_build: TinyBuild) -> None:
    """Rather than waiting for a thread that only its parent has."""
    with Session.open(tiny_build.bundle, verify=False) as session:
        under_way = session.submit(Request("alpha", tokens=(5,), max_new_tokens=30, ignore_eos=True))
        calls = [
            lambda: session.submit(Request("alpha", tokens=(5,))),
            lambda: session.check(Request("alpha", tokens=(5,)), "request"),
            lambda: session.tenants,
            lambda: session.remove_tenant("alpha"),
            lambda: session.add_tenant("none"),
            under_way.result,
        ]
        told = [_in_child(call) for call in calls]
        assert len(under_way.result().tokens) == 30, "the parent goes on"
    assert told == [f"the session was activated in process {os.getpid()}, and this is a forked child of it"] * len(
        calls
    )
    unused = Session.open(tiny_build.bundle, verify=False)
    assert _in_child(lambda: unused.tenants) == "", "a session that no process has activated may be taken along"


def _in_child(call: Callable[[], Any]) -> str:
    """How the refusal of a call begins in a forked child; empty where there is none."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            call()
            sender.send("")
        except IaptError as error:
            sender.send(str(error).split(" (")[0])
        finally:
            os._exit(0)
    assert receiver.poll(20), "the child waits"
    os.waitpid(child, 0)
    return str(receiver.recv())
