"""A session under many clients: threads, event loops, back-pressure, tenants that come and go, failure."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.serving.session import Request, Session
from engines.serving.tenants import read_tenant_file
from iapt_export.contract.errors import BundleError, IaptError, QueueFullError
from iapt_export.contract.tenant_card import TenantCard
from tests.bundles import TENANTS, TinyBuild

LONG = 100
"""New tokens of a request that lasts while a test does something else."""


@pytest.fixture
def session(tiny_build: TinyBuild) -> Iterator[Session]:
    with Session.open(tiny_build.bundle, verify=False) as session:
        yield session


def request(number: int, length: int = 12, **fields: Any) -> Request:
    """Instructions of different lengths for tenants in turn."""
    tokens = tuple(3 + (number * 7 + place) % 200 for place in range(1 + number % 9))
    return Request(TENANTS[number % 3], tokens=tokens, max_new_tokens=length, ignore_eos=True, **fields)


def wait_until_idle(session: Session) -> None:
    deadline = time.monotonic() + 20
    while session.stepper.num_rows or session._generations:
        assert time.monotonic() < deadline, "rows stay occupied"
        time.sleep(0.01)


def test_any_mix_gives_what_each_request_gives_alone(session: Session) -> None:
    requests = [request(number, length=3 + number % 11) for number in range(30)]
    alone = [next(iter(session.generate([one]))).tokens for one in requests]
    together = list(session.generate(requests))
    assert [answer.tokens for answer in together] == alone
    assert [answer.index for answer in together] == list(range(30))
    assert {answer.finish_reason for answer in together} == {"length"}


def test_threads_share_a_session(session: Session) -> None:
    requests = [request(number) for number in range(24)]
    wanted = [answer.tokens for answer in session.generate(requests)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda one: session.submit(one).result().tokens, requests))
    assert made == wanted


def test_an_event_loop_awaits_many_requests(session: Session) -> None:
    requests = [request(number) for number in range(24)]
    wanted = [answer.tokens for answer in session.generate(requests)]

    async def one(which: Request) -> list[int]:
        generation = await session.submit_async(which)
        return [token.token async for token in generation]

    async def everyone() -> list[list[int]]:
        return await asyncio.gather(*map(one, requests))

    assert asyncio.run(everyone()) == wanted
    answer = asyncio.run(session.submit(requests[0]).wait())
    assert answer.tokens == wanted[0]


def test_a_client_that_leaves_frees_its_row(session: Session) -> None:
    wanted = next(iter(session.generate([request(1)]))).tokens
    for _ in session.stream([request(0, LONG)]):
        break
    stream = session.stream([request(0, LONG), request(1, LONG)])
    next(stream)
    stream.close()
    with session.submit(request(2, LONG)):
        pass
    cancelled = session.submit(request(3, LONG))
    cancelled.cancel()
    answer = cancelled.result()
    assert answer.finish_reason == "cancelled" and len(answer.tokens) < LONG
    wait_until_idle(session)
    assert next(iter(session.generate([request(1)]))).tokens == wanted


def test_a_cancelled_task_frees_its_row(session: Session) -> None:
    async def leave() -> None:
        task = asyncio.create_task(session.submit(request(0, LONG)).wait())
        await asyncio.sleep(0)  # lets the task begin to wait; any longer, and a busy machine lets it finish
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    wait_until_idle(session)


def test_a_full_queue_refuses_or_waits(tiny_build: TinyBuild) -> None:
    with Session.open(tiny_build.bundle, verify=False, max_waiting=1) as session:
        running = [session.submit(request(number, LONG)) for number in range(1 + session.stepper.max_rows)]
        with pytest.raises(
            QueueFullError, match="1 requests are waiting already; try again later, or open the session with"
        ):
            session.submit(request(11), timeout=0)
        late = session.submit(request(11))
        assert len(late.result().tokens) == 12
        assert all(len(generation.result().tokens) == LONG for generation in running)


def test_a_bad_request_leaves_the_others_alone(session: Session) -> None:
    wanted = next(iter(session.generate([request(0, LONG)]))).tokens
    running = session.submit(request(0, LONG))
    for bad, text in [
        (Request("delta", "yes"), "tenant 'delta' is not in this bundle"),
        (request(1, 1000), "cache entries"),
        (Request("alpha", tokens=(2**40,)), "is out of range"),
        (Request("alpha", tokens=(3,), stop=("",)), "a stop text is empty"),
        (Request("alpha", tokens=(3,), soft_prompts=np.zeros((4, 32))), "which makes its own prompts; send none"),
    ]:
        with pytest.raises(IaptError, match=text):
            session.submit(bad)
    assert running.result().tokens == wanted
    assert {tenant.users for tenant in session.stepper.bank.tenants.values()} == {0}


def test_closing_ends_what_runs(tiny_build: TinyBuild) -> None:
    session = Session.open(tiny_build.bundle, verify=False)
    with session:
        running = [session.submit(request(number, LONG)) for number in range(10)]
        next(iter(running[0]))
    for generation in running[1:]:
        with pytest.raises(IaptError, match="the session was closed before the answer was finished"):
            generation.result()
    with pytest.raises(IaptError, match="the session is not open"):
        session.submit(request(0))
    with session:
        assert len(session.submit(request(0)).result().tokens) == 12


def test_a_failing_step_is_told_to_everyone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    running = session.submit(request(0, LONG))
    next(iter(session.submit(request(1))))

    def fail(tokens: Any) -> None:
        raise IaptError("the device is gone")

    monkeypatch.setattr(session.stepper, "step", fail)
    with pytest.raises(IaptError, match="the session has failed: the device is gone") as caught:
        running.result()
    assert caught.value.code == "session_failed", "the request was right, and another session may answer it"
    with pytest.raises(IaptError, match="the session has failed and serves no more: the device is gone"):
        session.submit(request(0))


def test_two_sessions_on_one_bundle(tiny_build: TinyBuild, session: Session) -> None:
    with Session.open(tiny_build.bundle, verify=False) as other:
        running = [one.submit(request(4)) for one in (session, other)]
        first, second = (generation.result().tokens for generation in running)
    assert first == second


# tenants that come and go


def tenant_file(build: TinyBuild, path: Path, name: str, change: float = 0.0, **fields: Any) -> Path:
    """The file of the bundle's tenant alpha, changed."""
    source = build.bundle / "tenants/alpha.safetensors"
    card, _ = read_tenant_file(source)
    tensors = load_file(source)
    tensors["up_weight"] = tensors["up_weight"] + np.float32(change)
    save_file(tensors, path, dataclasses.replace(card, name=name, **fields).to_metadata())
    return path


def ask(session: Session, tenant: str, length: int = 12) -> list[int]:
    (answer,) = session.generate([Request(tenant, tokens=(5, 6, 7), max_new_tokens=length, ignore_eos=True)])
    return answer.tokens


def test_a_tenant_joins_while_requests_run(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    alpha, beta = ask(session, "alpha"), ask(session, "beta", LONG)
    same = tenant_file(tiny_build, tmp_path / "same.safetensors", "same")
    running = session.submit(Request("beta", tokens=(5, 6, 7), max_new_tokens=LONG, ignore_eos=True))
    assert session.add_tenant(same) == "same"
    assert session.tenants == ["alpha", "beta", "gamma", "same"]
    assert ask(session, "same") == alpha
    assert running.result().tokens == beta
    assert ask(session, "alpha") == alpha and ask(session, "beta", LONG) == beta


def test_a_slow_disk_holds_up_nobody(
    session: Session, tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's file is read while steps go on: others are answered before it is there."""
    path = tenant_file(tiny_build, tmp_path / "slow.safetensors", "slow")
    asked, arrived = threading.Event(), threading.Event()

    def slowly(path: Path) -> Any:
        asked.set()
        assert arrived.wait(60)
        return read_tenant_file(path)

    monkeypatch.setattr("engines.serving.tenants.read_tenant_file", slowly)
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(session.add_tenant, path)
        try:
            assert asked.wait(60)
            assert len(ask(session, "alpha")) == 12 and "slow" not in session.tenants
        finally:
            arrived.set()
        assert adding.result() == "slow" and "slow" in session.tenants


def test_a_long_step_holds_up_no_tenant(
    session: Session, tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant is added, for which the stacks grow, and one is removed, while the graph runs over the old stacks."""
    alpha, beta = ask(session, "alpha"), ask(session, "beta")
    path = tenant_file(tiny_build, tmp_path / "same.safetensors", "same")
    honest, inside, go = OnnxRuntimeRunner._run_bound, threading.Event(), threading.Event()

    def held(self: OnnxRuntimeRunner, *arrays: Any) -> Any:
        inside.set()
        assert go.wait(60)
        return honest(self, *arrays)

    monkeypatch.setattr(OnnxRuntimeRunner, "_run_bound", held)
    running = session.submit(Request("beta", tokens=(5, 6, 7), max_new_tokens=12, ignore_eos=True))
    assert inside.wait(60)
    before = session.stepper.bank.stacks
    assert session.add_tenant(path) == "same"
    session.remove_tenant("gamma")
    after = session.stepper.bank.stacks
    assert {len(stack) for stack in before.values()} == {3} and {len(stack) for stack in after.values()} == {4}
    go.set()
    assert running.result().tokens == beta and ask(session, "same") == alpha


def test_a_bundles_tenant_serves_in_another_bundle(session: Session, tiny_build: TinyBuild) -> None:
    session.add_tenant(tiny_build.bundle / "tenants/gamma.safetensors", "guest")
    assert ask(session, "guest") == ask(session, "gamma")


def test_a_removed_tenant_finishes_what_runs(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    wanted = ask(session, "beta", LONG)
    other = tenant_file(tiny_build, tmp_path / "other.safetensors", "other", change=0.5)
    running = session.submit(Request("beta", tokens=(5, 6, 7), max_new_tokens=LONG, ignore_eos=True))
    session.remove_tenant("beta")
    session.add_tenant(other)
    with pytest.raises(BundleError, match="tenant 'beta' is not in this bundle; its tenants are alpha, gamma, other"):
        session.submit(Request("beta", tokens=(5,)))
    assert running.result().tokens == wanted, "its entry must not be given away while it runs"
    wait_until_idle(session)
    session.add_tenant(tenant_file(tiny_build, tmp_path / "third.safetensors", "third"))
    assert session.stepper.bank.get("third").index == 1, "the free entry is used again"


def test_a_replaced_tenant_changes_for_new_requests_only(
    session: Session, tiny_build: TinyBuild, tmp_path: Path
) -> None:
    old = ask(session, "alpha", LONG)
    path = tenant_file(tiny_build, tmp_path / "new.safetensors", "alpha", change=0.5)
    running = session.submit(Request("alpha", tokens=(5, 6, 7), max_new_tokens=LONG, ignore_eos=True))
    with pytest.raises(IaptError, match="tenant 'alpha' is installed already; remove it first, or replace it"):
        session.add_tenant(path)
    session.add_tenant(path, replace=True)
    new = ask(session, "alpha", LONG)
    assert running.result().tokens == old and new != old


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"fingerprint": "other", "backbone": "big-model"}, "was made for another backbone (big-model); this bundle's"),
        ({"config": {"bottleneck": 3}}, 'this bundle has no method IAPT with {"bottleneck": 3}, so its graphs cannot'),
        ({"form": "LAMP"}, "this bundle has no method LAMP with"),
        ({"schema_version": 9}, "the tenant card's schema_version is 9, this version of iapt-export reads 1 and 2"),
        ({"labels": "yes"}, "has no valid tenant card: tenant card.labels is 'yes', expected list"),
    ],
)
def test_a_tenant_that_does_not_fit(
    session: Session, tiny_build: TinyBuild, tmp_path: Path, fields: dict[str, Any], text: str
) -> None:
    path = tenant_file(tiny_build, tmp_path / "bad.safetensors", "bad", **fields)
    wanted = ask(session, "beta", LONG)
    running = session.submit(Request("beta", tokens=(5, 6, 7), max_new_tokens=LONG, ignore_eos=True))
    with pytest.raises(IaptError) as caught:
        session.add_tenant(path)
    assert text in str(caught.value)
    assert session.tenants == list(TENANTS)
    assert running.result().tokens == wanted


def test_damaged_tenant_files(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    path = tenant_file(tiny_build, tmp_path / "bad.safetensors", "bad", change=float("nan"))
    with pytest.raises(BundleError, match="tenant bad: up_weight holds NaN or infinity"):
        session.add_tenant(path)
    card, tensors = read_tenant_file(tiny_build.bundle / "tenants/alpha.safetensors")
    del tensors["query"]
    save_file(tensors, path, card.to_metadata())
    with pytest.raises(BundleError, match=r"tenant guest: query has nothing, the bundle expects \[2, 8, 4\]"):
        session.add_tenant(path, "guest")
    save_file(tensors, path)
    with pytest.raises(IaptError, match="carries no tenant card; expected a file written by 'iapt-export tenant'"):
        session.add_tenant(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(IaptError, match="is not a whole safetensors file"):
        session.add_tenant(path)
    with pytest.raises(BundleError, match="tenant 'bad' is not in this bundle"):
        session.remove_tenant("bad")
    assert session.tenants == list(TENANTS)


def test_a_full_bank(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    path = tenant_file(tiny_build, tmp_path / "more.safetensors", "more")
    session.add_tenant(path)
    with pytest.raises(IaptError, match=r"method iapt is full: this bundle takes 4 tenants of it \(remove one, or"):
        session.add_tenant(path, "fifth")
    session.remove_tenant("more")
    session.add_tenant(path, "fifth")
    assert ask(session, "fifth") == ask(session, "alpha")


def test_a_full_bank_replaces_who_is_idle(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    session.add_tenant(tenant_file(tiny_build, tmp_path / "more.safetensors", "more"))
    old = ask(session, "alpha", LONG)
    new = tenant_file(tiny_build, tmp_path / "new.safetensors", "alpha", change=0.5)
    running = session.submit(Request("alpha", tokens=(5, 6, 7), max_new_tokens=LONG, ignore_eos=True))
    with pytest.raises(IaptError, match=r"takes 4 tenants of it \(remove one, or build"):
        session.add_tenant(new, replace=True)
    assert running.result().tokens == old == ask(session, "alpha", LONG)
    wait_until_idle(session)
    session.add_tenant(new, replace=True)
    assert ask(session, "alpha", LONG) != old and session.tenants == ["beta", "gamma", "more", "alpha"]


def test_a_full_bank_says_whom_it_waits_for(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    path = tenant_file(tiny_build, tmp_path / "more.safetensors", "more")
    session.add_tenant(path)
    running = session.submit(Request("beta", tokens=(5, 6, 7), max_new_tokens=LONG, ignore_eos=True))
    session.remove_tenant("beta")
    with pytest.raises(IaptError, match=r"takes 4 tenants of it \(wait for the requests of 1 removed ones, or build"):
        session.add_tenant(path, "fifth")
    running.result()
    wait_until_idle(session)
    assert session.add_tenant(path, "fifth") == "fifth"


def test_tenants_come_and_go_under_load(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    """A short soak: no request is lost and every answer is right while another thread changes tenants."""
    path = tenant_file(tiny_build, tmp_path / "guest.safetensors", "guest", change=0.5)
    requests = [request(number, length=4 + number % 7) for number in range(60)]
    wanted = [answer.tokens for answer in session.generate(requests)]
    session.add_tenant(path)
    as_guest = ask(session, "guest")
    session.remove_tenant("guest")
    stop = threading.Event()

    def change() -> list[list[int]]:
        """Each guest is asked, replaced while its request runs, and leaves before that is finished."""
        answers = []
        while not stop.is_set():
            session.add_tenant(path)
            running = session.submit(Request("guest", tokens=(5, 6, 7), max_new_tokens=12, ignore_eos=True))
            with contextlib.suppress(IaptError):  # full: the last guest's request is under way
                session.add_tenant(path, replace=True)
            session.remove_tenant("guest")
            answers.append(running.result().tokens)
        return answers

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        try:
            made = [answer.tokens for _ in range(3) for answer in session.generate(requests)]
        finally:
            stop.set()
        guests = changing.result()
    assert made == wanted * 3
    assert guests and all(answer == as_guest for answer in guests)
    assert session.tenants == list(TENANTS)


def test_a_card_survives_its_file() -> None:
    card = TenantCard(
        name="a", form="IAPT", config={"x": 1}, backbone="b", fingerprint="f", trained_form="IAPT", prompt_format="chat"
    )
    assert TenantCard.from_metadata(card.to_metadata(), "here") == card
