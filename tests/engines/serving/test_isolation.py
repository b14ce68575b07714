"""What goes wrong with one request is told to its client, and the others' answers are what they would have been."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import engines.serving.admission
import engines.serving.scheduler
from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.sampling import Sampling, choose
from engines.serving.session import Answer, Grammar, Request, Session
from engines.serving.tenants import read_tenant_file
from engines.serving.text import TextCodec
from iapt_export.contract.errors import IaptError, QueueFullError
from tests.bundles import TinyBuild

LONG = 100


@pytest.fixture
def session(tiny_build: TinyBuild) -> Iterator[Session]:
    with Session.open(tiny_build.bundle, verify=False) as session:
        yield session


def request(tenant: str = "alpha", length: int = 12, **fields: Any) -> Request:
    return Request(tenant, tokens=(5, 6, 7), max_new_tokens=length, ignore_eos=True, **fields)


def until(what: Any) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 0.9)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_choose_no_token(dtype: type, sampling: Sampling, bad: float) -> None:
    logits = np.array([1.0, 2.0, bad, 0.0], dtype)
    with pytest.raises(IaptError, match="its logits hold NaN or infinity"):
        choose(logits, sampling, np.random.default_rng(0))
    ruled_out = np.array([1.0, 2.0, -np.inf, 0.0], dtype)
    assert choose(ruled_out, sampling, np.random.default_rng(0)) != 2


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_smallest_temperatures_take_the_likeliest(top_p: float) -> None:
    logits = np.array([1.0, 3.0, 2.0, -50.0], np.float32)
    for temperature in (5e-324, 1e-310, 1e-200, 1e-9):
        assert choose(logits, Sampling(temperature, top_p), np.random.default_rng(1)) == 1


def test_a_tenant_that_computes_nan_fails_alone(session: Session, tiny_build: TinyBuild, tmp_path: Path) -> None:
    """Finite weights that overflow within the graph: only running it shows that."""
    source = tiny_build.bundle / "tenants/alpha.safetensors"
    card, _ = read_tenant_file(source)
    tensors = load_file(source)
    tensors["up_weight"] = np.full_like(tensors["up_weight"], 3e38)
    save_file(tensors, tmp_path / "wild.safetensors", dataclasses.replace(card, name="wild").to_metadata())
    session.add_tenant(tmp_path / "wild.safetensors")
    wanted = [session.submit(request(name, LONG)).result().tokens for name in ("beta", "gamma")]
    running = [session.submit(request(name, LONG)) for name in ("beta", "gamma")]
    with pytest.raises(IaptError, match="request 0 of tenant wild failed: its logits hold NaN or infinity"):
        session.submit(request("wild")).result()
    assert [generation.result().tokens for generation in running] == wanted
    assert session.submit(request("alpha")).result().finish_reason == "length"
    assert session.stepper.bank.get("wild").users == 0


def test_a_defect_in_one_answer_ends_that_answer_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = session.submit(request("beta", LONG)).result().tokens
    honest = engines.serving.scheduler.Entry.take

    def take(self: engines.serving.scheduler.Entry, logits: np.ndarray) -> Any:
        if self.number == 7 and len(self.tokens) == 3:
            raise ZeroDivisionError("division by zero")
        return honest(self, logits)

    monkeypatch.setattr(engines.serving.scheduler.Entry, "take", take)
    running = session.submit(request("beta", LONG))
    with pytest.raises(IaptError, match="request 7 of tenant alpha failed: division by zero"):
        session.submit(request(length=LONG), 7).result()
    assert running.result().tokens == wanted


def test_nothing_of_a_failed_row_stays_in_the_cache(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that weigh masked entries with 0 would carry its NaN into the answers of the next in its place."""
    stepper = session.stepper
    assert isinstance(stepper, InPlaceStepper)
    honest = stepper.read

    def read(rows: Any) -> np.ndarray:
        logits = honest(rows).copy()
        for buffer in stepper.buffers.values():
            buffer[: len(rows)] = np.nan
        logits[:] = np.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(stepper, "read", read)
        with pytest.raises(IaptError, match="NaN"):
            session.submit(request()).result()
    assert all(np.isfinite(buffer).all() for buffer in stepper.buffers.values())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"stop": "END"}, "stop is 'END', expected texts in a tuple, such as \\('END',\\)"),
        ({"stop": (5,)}, "stop is \\(5,\\), expected texts in a tuple"),
        ({"stop": ("END", "")}, "a stop text is empty; leave it out"),
        ({"max_new_tokens": 10.5}, "max_new_tokens is 10.5, expected at least 1, a whole number"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected at least 1, a whole number"),
        ({"tokens": (5, 1.5)}, "1.5 is no token id; expected whole numbers"),
        ({"tokens": ("yes",)}, "'yes' is no token id"),
        ({"tokens": np.array([[5, 6]])}, r"array\(\[5, 6\]\) is no token id"),
        ({"tokens": (10**5000,)}, "token id int that cannot be shown is out of range"),
        ({"tokens": [0.5] * 10**6}, "the prompt has 1000000 tokens; this bundle takes at most 96"),
        ({"max_new_tokens": np.array([2, 3])}, r"max_new_tokens is array\(\[2, 3\]\), expected at least 1"),
        (
            {"grammar": Grammar(choice=["a"]), "min_tokens": 2, "ignore_eos": False},
            "ends where the grammar ends; leave out min_tokens",
        ),
    ],
)
def test_fields_that_no_session_can_serve(session: Session, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(IaptError, match=text):
        session.submit(dataclasses.replace(request(), **fields))
    assert session.submit(dataclasses.replace(request(), tokens=tuple(np.arange(5, 8)))).result().tokens


def test_the_queue_moves_on_as_rows_take_from_it(tiny_build: TinyBuild) -> None:
    """A client that waits for the queue comes in when it has room, not when somebody's answer is finished."""
    with Session.open(tiny_build.bundle, verify=False, max_waiting=1) as session:
        hold(session)
        until(lambda: session.stepper.num_rows == session.stepper.max_rows)


def test_a_deadline_counts_in_line_as_well(tiny_build: TinyBuild) -> None:
    async def asked(session: Session) -> Answer:
        return await (await session.submit_async(dataclasses.replace(request(), deadline_s=0.2))).wait()

    with Session.open(tiny_build.bundle, verify=False, max_waiting=1) as session:
        hold(session)
        start = time.monotonic()
        answers = [session.submit(dataclasses.replace(request(), deadline_s=0.2)).result(), asyncio.run(asked(session))]
        assert time.monotonic() - start < 10
        assert [(answer.finish_reason, answer.tokens) for answer in answers] == [("deadline", [])] * 2
        with pytest.raises(QueueFullError):
            session.submit(dataclasses.replace(request(), deadline_s=60), timeout=0.1)
        assert not session._inbox.line
    assert {tenant.users for tenant in session.stepper.bank.tenants.values()} == {0}


def test_a_queue_for_nobody_is_refused(tiny_build: TinyBuild) -> None:
    for size in (0, -1):
        with pytest.raises(IaptError, match=f"max_waiting is {size}, expected at least 1"):
            Session.open(tiny_build.bundle, verify=False, max_waiting=size)


def test_a_client_that_waits_for_the_queue_is_told_that_the_session_closed(tiny_build: TinyBuild) -> None:
    failures: list[Exception] = []

    def submit() -> None:
        try:
            session.submit(request())
        except IaptError as error:
            failures.append(error)

    session = Session.open(tiny_build.bundle, verify=False, max_waiting=1)
    with session:
        hold(session)
        thread = threading.Thread(target=submit)
        thread.start()
        with pytest.raises(QueueFullError):
            session.submit(request(), timeout=0.05)
    thread.join(20)
    assert [str(failure) for failure in failures] == [
        "the session is not open; use it in a with block, or call activate() first"
    ]
    for change in (lambda: session.add_tenant("x"), lambda: session.remove_tenant("alpha")):
        with pytest.raises(IaptError, match="the session is not open"):
            change()


def hold(session: Session) -> None:
    """Fill every row and the queue with requests that do not end while the test looks."""
    honest, step = threading.Event(), session.stepper.step

    def slowly(tokens: Any) -> np.ndarray:
        honest.wait(0.05)
        return step(tokens)

    session.stepper.step = slowly  # type: ignore[method-assign]
    for _ in range(session.stepper.max_rows + 1):
        session.submit(request(length=LONG))


def test_a_task_that_is_cancelled_in_the_queue_leaves_nothing_behind(tiny_build: TinyBuild) -> None:
    with Session.open(tiny_build.bundle, verify=False, max_waiting=1) as session:
        hold(session)
        before = len(session._generations)

        async def client() -> None:
            task = asyncio.create_task(session.submit_async(request()))
            await asyncio.sleep(0.1)
            assert not task.done(), "the queue is full"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(client())
        assert len(session._generations) <= before
        assert sum(tenant.users for tenant in session.stepper.bank.tenants.values()) == len(session._generations)


def test_an_event_loop_gets_its_turn_in_a_full_queue(tiny_build: TinyBuild) -> None:
    async def client(session: Session) -> list[int]:
        return (await (await session.submit_async(request())).wait()).tokens

    async def everyone(session: Session) -> list[list[int]]:
        return await asyncio.gather(*(client(session) for _ in range(24)))

    with Session.open(tiny_build.bundle, verify=False, max_waiting=1) as session:
        wanted = session.submit(request()).result().tokens
        assert asyncio.run(everyone(session)) == [wanted] * 24


def test_a_bundle_without_a_tokenizer_serves_token_ids(tiny_build: TinyBuild, tmp_path: Path) -> None:
    with Session.open(tiny_build.bundle, verify=False) as session:
        wanted = session.submit(request()).result().tokens
        session._admission._bundle, session._admission._codec = tmp_path, None
        session._admission._has_codec = False
        answer = session.submit(request()).result()
        assert (answer.tokens, answer.text) == (wanted, "")
        for bad in (Request("alpha", "yes"), request(stop=("END",))):
            with pytest.raises(IaptError, match=r"holds no tokenizer.json: .* so feed token ids"):
                session.submit(bad)


def test_clients_that_come_together_read_one_tokenizer(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    class Slow(TextCodec):
        def __init__(self, bundle: Path) -> None:
            read.append(bundle)
            time.sleep(0.1)
            super().__init__(bundle)

    monkeypatch.setattr(engines.serving.admission, "TextCodec", Slow)
    with Session.open(tiny_build.bundle, verify=False) as session, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(lambda: session.submit(request()).result().tokens) for _ in range(8)]
        assert len({tuple(answer.result()) for answer in answers}) == 1
    assert len(read) == 1


def test_loading_that_fails_half_way_gives_back_what_it_took(
    tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.open(tiny_build.bundle, verify=False)

    def fail(self: OnnxRuntimeRunner, dtype: str, shape: Any) -> None:
        raise IaptError("too little memory")

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeRunner, "zeros", fail)
        with pytest.raises(IaptError, match="too little memory"):
            session.activate()
    assert all(runner._session is None for runner in session.stepper.runners.values())  # type: ignore[attr-defined]
    with session:
        assert len(session.submit(request()).result().tokens) == 12


def test_a_session_opens_and_closes_from_many_threads(tiny_build: TinyBuild) -> None:
    session = Session.open(tiny_build.bundle, verify=False)

    def switch() -> None:
        for _ in range(10):
            session.activate()
            session.deactivate()

    threads = [threading.Thread(target=switch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert [thread for thread in threading.enumerate() if thread.name == "iapt-session"] == []
    with session:
        assert len(session.submit(request()).result().tokens) == 12
