"""Long instructions are read while rows decode: nobody waits, and nobody's tokens change."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.serving.beside import NICENESS
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.scheduler import BESIDE_TOKENS
from engines.serving.session import Generation, Request, Session
from engines.serving.stepper import Instruction
from iapt_export.contract.errors import IaptError
from tests.bundles import TinyBuild

TALK = tuple(range(5, 85))
"""A long instruction."""
assert len(TALK) > BESIDE_TOKENS


@pytest.fixture
def session(tiny_build: TinyBuild) -> Iterator[Session]:
    with Session.open(tiny_build.bundle, threads=1) as opened:
        assert opened.stepper.reads_beside
        yield opened


class Gate:
    """Holds the thread that reads an instruction beside the rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.go = threading.Event(), threading.Event()
        honest = OnnxRuntimeRunner._run_bound

        def held(runner: OnnxRuntimeRunner, *arrays: Any) -> Any:
            if threading.current_thread().name == "iapt-reading":
                self.reading.set()
                assert self.go.wait(60)
            return honest(runner, *arrays)

        monkeypatch.setattr(OnnxRuntimeRunner, "_run_bound", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.go.set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_the_steps_come_first_where_cores_are_few(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, seen = OnnxRuntimeRunner._run_bound, {}

    def noted(runner: OnnxRuntimeRunner, *arrays: Any) -> Any:
        thread = threading.current_thread()
        seen[thread.name] = os.getpriority(os.PRIO_PROCESS, thread.native_id or 0)
        return honest(runner, *arrays)

    monkeypatch.setattr(OnnxRuntimeRunner, "_run_bound", noted)
    hook = lambda answer, logits: time.sleep(0.005) or logits  # noqa: E731 (decodes while the other is read)
    talker = begun(session, dataclasses.replace(short("alpha", 100), logits_hook=hook))
    session.submit(long()).result()
    talker.result()
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert seen == {"iapt-session": usual, "iapt-reading": min(usual + NICENESS, 19)}


def short(tenant: str, tokens: int) -> Request:
    return Request(tenant, tokens=(5, 6, 7), max_new_tokens=tokens, ignore_eos=True)


def long(tenant: str = "beta", **fields: Any) -> Request:
    return Request(tenant, tokens=TALK, max_new_tokens=12, ignore_eos=True, **fields)


def begun(session: Session, request: Request) -> Generation:
    """A request of which the first token has come."""
    made, arrived = session.submit(request), threading.Event()
    made.listen(arrived.set)
    assert arrived.wait(60)
    made.forget(arrived.set)
    return made


def test_rows_go_on_while_an_instruction_is_read_and_all_tokens_are_the_same(session: Session, gate: Gate) -> None:
    gate.go.set()
    wanted = [next(session.generate([each])).tokens for each in (short("alpha", 100), short("gamma", 30), long())]
    gate.go.clear()
    gate.reading.clear()
    talker = begun(session, short("alpha", 100))
    leaver = begun(session, short("gamma", 30))
    reader = session.submit(long())
    assert gate.reading.wait(60)
    assert len(leaver.result().tokens) == 30, "it ended, and left its place, while the instruction was being read"
    assert session.state().running == 2 and not reader.times.first_token
    gate.go.set()
    assert [talker.result().tokens, leaver.result().tokens, reader.result().tokens] == wanted


def test_what_is_cancelled_while_it_is_read_ends(session: Session, gate: Gate) -> None:
    talker = begun(session, short("alpha", 100))
    reader = session.submit(long())
    assert gate.reading.wait(60)
    reader.cancel()
    late = session.submit(long("gamma"))
    assert session.state().waiting == 1
    gate.go.set()
    assert reader.result().finish_reason == "cancelled"
    assert len(late.result().tokens) == 12 and len(talker.result().tokens) == 100


def test_a_close_waits_for_the_reading_and_ends_everything(session: Session, gate: Gate) -> None:
    talker, reader = begun(session, short("alpha", 100)), session.submit(long())
    assert gate.reading.wait(60)
    threading.Timer(0.2, gate.go.set).start()
    session.deactivate()
    assert gate.go.is_set()
    for each in (talker, reader):
        with pytest.raises(IaptError, match="closed before the answer was finished"):
            each.result()
    assert not [thread for thread in threading.enumerate() if thread.name == "iapt-reading"]


def test_a_reading_that_fails_is_seen(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OnnxRuntimeRunner._run_bound

    def broken(runner: OnnxRuntimeRunner, *arrays: Any) -> Any:
        if threading.current_thread().name == "iapt-reading":
            raise IaptError("the device is gone")
        return honest(runner, *arrays)

    monkeypatch.setattr(OnnxRuntimeRunner, "_run_bound", broken)
    talker, reader = begun(session, short("alpha", 150)), session.submit(long())
    for each in (talker, reader):
        with pytest.raises(IaptError, match="the device is gone"):
            each.result()
    deadline = time.monotonic() + 5
    while session.state().is_healthy:
        assert time.monotonic() < deadline


def test_rows_that_left_make_a_reading_move_up(session: Session) -> None:
    stepper = session.stepper
    session.deactivate()
    assert isinstance(stepper, InPlaceStepper)
    with stepper:
        new = Instruction(stepper.bank.get("beta"), TALK)
        wanted = stepper.read([new]).copy()
        cache = stepper.row_cache(0)
        stepper.leave(0)
        stepper.read([Instruction(stepper.bank.get("alpha"), (5, 6, n)) for n in range(3)])
        reading = stepper.begin([new, new])
        stepper.leave(1)
        logits = reading.run()
        stepper.step([9, 9])
        stepper.join(reading)
        assert (stepper.num_rows, reading.place) == (4, 3)
        assert np.allclose(logits, np.repeat(wanted, 2, axis=0), atol=2e-5)
        for row in (2, 3):
            for made, own in zip(stepper.row_cache(row), cache, strict=True):
                assert np.allclose(made[0], own[0], atol=2e-5) and np.allclose(made[1], own[1], atol=2e-5)
        assert stepper.step([9] * 4).shape[0] == 4
    assert not stepper.reads_beside
