"""What the readers of one request get: one after another, several at once, threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.serving.entry import Entry
from engines.serving.generation import Generation, in_order_of_arrival
from engines.serving.request import Answer, Item, Request, Token
from engines.serving.session import Session
from engines.serving.tenants import Tenant
from iapt_export.contract.errors import IaptError
from tests.bundles import TinyBuild

NOBODY = Tenant("nobody", None, -1, 4, "plain", "IAPT")
LONG = 100
SECONDS = 20
"""After which a reader that should have ended is taken to hang."""


def generation(number: int = 0) -> Generation:
    entry = Entry(Request("nobody", "yes"), number, NOBODY, [2], None, frozenset({1}), np.random.default_rng(0))
    return Generation(entry, lambda: None)


def tokens(count: int) -> list[Item]:
    return [Token(0, step, 5 + step, "x", "length" if step == count - 1 else None) for step in range(count)]


@pytest.fixture
def session(tiny_build: TinyBuild) -> Iterator[Session]:
    with Session.open(tiny_build.bundle, verify=False) as session:
        yield session


def within(seconds: float, work: object) -> object:
    """What a call returns, or a failure if it hangs."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)  # type: ignore[operator]
    thread.start()
    thread.join(seconds)
    assert found, "the reader hangs, or failed"
    return found[0]


def test_a_result_after_an_iteration_that_was_broken_off() -> None:
    made = generation()
    for item in tokens(5):
        made.give(item)
    assert [token.token for token in itertools.islice(made, 2)] == [5, 6]
    answer = within(SECONDS, made.result)
    assert answer.tokens == [5, 6, 7, 8, 9] and answer.finish_reason == "length"  # type: ignore[attr-defined]
    assert list(made) == [] and within(SECONDS, made.result) == answer


def test_leaving_an_iteration_ends_a_running_request(session: Session) -> None:
    made = session.submit(Request("alpha", tokens=(5,), max_new_tokens=LONG, ignore_eos=True))
    next(iter(made))
    answer = within(SECONDS, made.result)
    assert answer.finish_reason == "cancelled" and 0 < len(answer.tokens) < LONG  # type: ignore[attr-defined]


def test_an_event_loop_gives_up_and_a_thread_reads_on() -> None:
    made = generation()
    made.give(tokens(3)[0])

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(made.wait(), 0.05)

    asyncio.run(give_up())
    for item in tokens(3)[1:]:
        made.give(item)
    assert within(SECONDS, made.result).tokens == [5, 6, 7]  # type: ignore[attr-defined]


def test_readers_side_by_side_share_the_tokens_and_both_end() -> None:
    made = generation()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(lambda: [token.token for token in made]) for _ in range(2)]
        for item in tokens(40):
            made.give(item)
        first, second = (each.result(SECONDS) for each in both)
    assert sorted(first + second) == [5 + step for step in range(40)]


def test_every_reader_is_told_of_a_failure() -> None:
    made = generation()
    made.give(IaptError("the device is gone"))
    for _ in range(2):
        with pytest.raises(IaptError, match="the device is gone"):
            made.result()
    with pytest.raises(IaptError, match="the device is gone"):
        asyncio.run(made.wait())


def test_a_loop_that_closes_meanwhile_troubles_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generation()

    async def read() -> None:
        loop = asyncio.get_running_loop()
        reading = asyncio.create_task(made.wait())
        await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", closed)
            made.give(tokens(2)[0])
        made.give(tokens(2)[1])
        assert (await reading).tokens == [5, 6]

    def closed(*_: object) -> None:
        raise RuntimeError("Event loop is closed")

    asyncio.run(read())


def test_a_window_takes_requests_as_others_finish() -> None:
    taken: list[int] = []

    def source() -> Iterator[Generation]:
        for number in range(5):
            taken.append(number)
            made = generation(number)
            for item in tokens(2):
                made.give(item)
            yield made

    stream = in_order_of_arrival(source(), 2)
    next(stream)
    assert taken == [0, 1]
    assert len(list(stream)) == 9 and taken == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_an_endless_source_is_answered(tiny_build: TinyBuild, call: str) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Request]:
        for number in itertools.count():
            taken.append(number)
            yield Request("alpha", tokens=(5 + number % 7,), max_new_tokens=2, ignore_eos=True)

    with Session.open(tiny_build.bundle, verify=False, max_waiting=2) as session:
        answers = getattr(session, call)(endless())
        rows = {each.index for each in itertools.islice(answers, 40)}
        answers.close()
    assert len(rows) >= 20 and len(taken) <= max(rows) + 1 + session.stepper.max_rows + 2


def test_a_listener_may_forget_itself(session: Session) -> None:
    """It is called while tokens are given out, by the thread that serves everybody."""
    made = session.submit(Request("alpha", tokens=(5,), max_new_tokens=6, ignore_eos=True))
    heard: list[int] = []

    def once() -> None:
        heard.append(1)
        made.forget(once)

    made.listen(once)
    assert len(made.result().tokens) == 6 and len(heard) == 1
    late = session.submit(Request("alpha", tokens=(5,), max_new_tokens=3, ignore_eos=True))
    while late._items.qsize() < 3:
        pass
    heard.clear()
    made = late
    made.listen(once)
    assert len(heard) == 1 and len(late.result().tokens) == 3, "three waited, and it forgot itself at the first"
    assert len(session.submit(Request("beta", tokens=(5,), max_new_tokens=2)).result().tokens) <= 2


def test_a_listener_that_fails_ends_its_request_alone(session: Session) -> None:
    """In the session's own thread, which goes on for all others."""
    other = session.submit(Request("beta", tokens=(6,), max_new_tokens=20, ignore_eos=True))
    made = session.submit(Request("alpha", tokens=(5,), max_new_tokens=LONG, ignore_eos=True), 7)

    def fail() -> None:
        raise ZeroDivisionError("mine")

    with contextlib.suppress(ZeroDivisionError):  # where a token waits already, the caller hears of it
        made.listen(fail)
    made._listeners.append(fail)
    told = within(SECONDS, lambda: _raised(made))
    assert str(told) == "request 7: what listens to it failed: ZeroDivisionError('mine')"
    assert len(other.result().tokens) == 20
    assert len(session.submit(Request("alpha", tokens=(5,), max_new_tokens=3, ignore_eos=True)).result().tokens) == 3


def _raised(made: Generation) -> object:
    try:
        return made.result()
    except IaptError as error:
        return error


MIXED = (
    Request("alpha", tokens=(5, 6), max_new_tokens=6, ignore_eos=True),
    Request("nobody", tokens=(5, 6)),
    Request("beta", tokens=(7,), max_new_tokens=6, ignore_eos=True),
    Request("beta", tokens=(7,), max_new_tokens=0),
    Request("gamma", tokens=(8, 9), max_new_tokens=6, ignore_eos=True),
)


def test_a_bad_request_does_not_cancel_the_others_and_is_raised_behind_them(session: Session) -> None:
    alone = [session.submit(MIXED[place]).result().tokens for place in (0, 2, 4)]
    answers: list[Answer] = []
    with pytest.raises(IaptError, match="tenant 'nobody' is not in this bundle"):
        answers.extend(session.generate(MIXED))  # keeps those that came before the error
    assert [answer.index for answer in answers] == [0, 1, 2, 3, 4]
    assert [answers[place].tokens for place in (0, 2, 4)] == alone and all(map(len, alone))
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length", "error", "length"]
    assert "max_new_tokens is 0" in str(answers[3].error) and answers[4].error is None


def test_errors_are_raised_when_the_caller_says(session: Session) -> None:
    assert [answer.error is None for answer in session.generate(MIXED, raised="never")] == [1, 0, 1, 0, 1]
    for wrong in ("Last", True, None):
        with pytest.raises(IaptError, match="is not one of last, first, never"):
            session.generate(MIXED, raised=wrong)  # type: ignore[arg-type]
    first: list[Answer] = []
    with pytest.raises(IaptError, match="tenant 'nobody' is not in this bundle"):
        first.extend(session.generate(MIXED, raised="first"))
    assert first == []
    assert session.submit(MIXED[0]).result().tokens  # and the session goes on


def test_a_request_that_fails_in_the_middle_keeps_what_it_said(session: Session) -> None:
    seen = []

    def fail_at_third(generated: object, logits: np.ndarray) -> np.ndarray:
        seen.append(generated)
        if len(seen) == 3:
            raise ValueError("no more")
        return logits

    bad = Request("beta", tokens=(7,), max_new_tokens=6, ignore_eos=True, logits_hook=fail_at_third)
    good, failed, after = session.generate([MIXED[0], bad, MIXED[4]], raised="never")
    assert failed.finish_reason == "error" and len(failed.tokens) == 2 and "no more" in repr(failed.error)
    assert good.error is None and len(after.tokens) == 6


def test_a_closed_session_answers_none(tiny_build: TinyBuild) -> None:
    session = Session.open(tiny_build.bundle, verify=False)
    with pytest.raises(IaptError, match="the session is not open"):
        next(iter(session.generate(MIXED)))


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        (MIXED[0], 'expected a list of requests, such as [Request(tenant="NAME", prompt="TEXT")], found Request'),
        ("a text", "expected a list of requests, such as [Request(tenant="),
        ({"tenant": "alpha"}, "expected a list of requests, such as [Request(tenant="),
        (["a text"], 'request 0 is str, expected Request(tenant="NAME", prompt="TEXT")'),
        ([("alpha", "a text")], "request 0 is tuple, expected Request(tenant="),
        ([Request("what is it?")], "request 0: tenant is 'what is it?' and prompt ''; expected Request(tenant="),
        (
            [Request("what is it?", "alpha")],
            'prompt \'alpha\'; expected Request(tenant="NAME", prompt="TEXT"), and the te',
        ),
        ([Request("alpha", ["a", "b"])], "request 0: prompt is list, expected text; it is one instruction: [Request("),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_call_is_answered_with_the_right_one(session: Session, requests: object, text: str) -> None:
    for call in (session.generate, session.stream):
        with pytest.raises(IaptError) as caught:
            list(call(requests))  # type: ignore[arg-type]
        assert text in str(caught.value)
