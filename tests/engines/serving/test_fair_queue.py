"""Whose request gets a free row: shares, weights, limits, priorities, and a flood that shuts nobody out."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from engines.serving.account import Share
from engines.serving.entry import Entry
from engines.serving.generation import Generation
from engines.serving.inbox import Inbox, Turn
from engines.serving.request import Ended, Request
from engines.serving.scheduler import Scheduler
from engines.serving.session import Session
from engines.serving.tenants import Tenant
from iapt_export.contract.errors import IaptError, QueueFullError
from tests.bundles import TinyBuild
from tests.engines.serving.test_scheduler import Counter as Steps

NOBODY = Tenant("nobody", None, -1, 0, "plain", "IAPT")


def entry(tenant: str, tokens: int = 4, **fields: Any) -> Entry:
    request = Request(tenant, tokens=(2,), max_new_tokens=tokens, ignore_eos=True, **fields)
    whose = dataclasses.replace(NOBODY, name=tenant)
    return Entry(request, 0, whose, [2], None, frozenset({1}), np.random.default_rng(0))


def scheduler(rows: int = 3, **shares: Share) -> Scheduler:
    steps = Steps()
    steps.max_rows = rows
    return Scheduler(steps, shares={name.replace("others", "*"): share for name, share in shares.items()})  # type: ignore[arg-type]


def served(made: Scheduler, steps: int) -> Counter[str]:
    """Tokens of each tenant in so many steps."""
    found: Counter[str] = Counter()
    for _ in range(steps):
        found.update(entry.tenant.name for entry, _ in made.step())
    return found


def test_a_flood_of_one_tenant_holds_up_nobody() -> None:
    made = scheduler(rows=8)
    for _ in range(160):
        made.add(entry("alpha", 100))
    served(made, 20)
    late = entry("beta", 5)
    made.add(late)
    since_a_free_row = None
    for _ in range(200):
        free = any(isinstance(item, Ended) or item.finish_reason for _, item in made.step())  # type: ignore[union-attr]
        if since_a_free_row is not None:
            since_a_free_row += 1
        elif free:
            since_a_free_row = 0
        if late.tokens:
            break
    assert late.tokens and since_a_free_row is not None and since_a_free_row <= 2


def test_two_that_always_want_more_get_the_same() -> None:
    made = scheduler()
    for _ in range(100):
        made.add(entry("alpha", 4))
        made.add(entry("beta", 12))
    served(made, 200)
    alpha, beta = (made.waiting.accounts[name] for name in ("alpha", "beta"))
    assert alpha.generated_tokens + alpha.prompt_tokens == pytest.approx(alpha.served)
    assert alpha.served == pytest.approx(beta.served, rel=0.05)


def test_a_weight_of_two_gets_twice_as_much() -> None:
    made = scheduler(alpha=Share(weight=2))
    for _ in range(200):
        made.add(entry("alpha"))
        made.add(entry("beta"))
    found = served(made, 200)
    assert found["alpha"] / found["beta"] == pytest.approx(2, rel=0.1)


def test_who_was_away_saved_nothing_up() -> None:
    made = scheduler(rows=1)
    for _ in range(50):
        made.add(entry("alpha"))
    served(made, 100)
    for _ in range(50):
        made.add(entry("beta"))
    found = served(made, 80)
    assert found["alpha"] == pytest.approx(found["beta"], abs=8)


def test_rows_of_a_tenant_are_limited() -> None:
    made = scheduler(others=Share(max_rows=1))
    for _ in range(4):
        made.add(entry("alpha"))
    list(made.step())
    assert len(made.running) == 1
    made.add(entry("beta"))
    list(made.step())
    assert {row.tenant.name for row in made.running} == {"alpha", "beta"}


def test_a_smaller_priority_goes_first_among_a_tenants_requests() -> None:
    made = scheduler(rows=1)
    for priority in (2, 0, 1, -5, 0):
        made.add(entry("alpha", 1, priority=priority))
    order = [entry.request.priority for _ in range(5) for entry, _ in made.step()]
    assert order == [-5, 0, 0, 1, 2]


def test_a_priority_takes_no_row_from_other_tenants() -> None:
    made = scheduler(rows=1)
    for tenant, priority in (("beta", 0), ("beta", 0), *[("alpha", -(10**9))] * 4):
        made.add(entry(tenant, 1, priority=priority))
    order = [entry.tenant.name for _ in range(6) for entry, _ in made.step()]
    assert order == ["beta", "alpha", "beta", "alpha", "alpha", "alpha"]


def test_what_is_late_ends_with_what_it_has() -> None:
    made = scheduler(rows=1)
    running, waiting = entry("alpha", 50, deadline_s=1e-6), entry("alpha", 50, deadline_s=1e-6)
    running.deadline = float("inf")
    made.add(running)
    list(made.step())
    made.add(waiting)
    assert next((who is waiting, item) for who, item in made.step()) == (True, Ended("deadline"))
    running.deadline = 0.0
    assert [item for _, item in made.step()] == [Ended("deadline")] and not made.has_work


def test_a_full_queue_takes_a_tenant_of_which_none_waits(tiny_build: TinyBuild) -> None:
    with Session.open(tiny_build.bundle, verify=False, max_waiting=2) as session:
        session.set_share("beta", Share(max_waiting=1))
        long = {"tokens": (3,), "max_new_tokens": 150, "ignore_eos": True}
        flood = [session.submit(Request("alpha", **long)) for _ in range(session.stepper.max_rows + 2)]
        while session.state().running < session.stepper.max_rows:  # those that found a free row have not read it yet
            time.sleep(0.01)
        with pytest.raises(QueueFullError) as caught:
            session.submit(Request("alpha", **long), timeout=0)
        assert caught.value.code == "queue_full"
        beta = session.submit(Request("beta", tokens=(3,), max_new_tokens=1), timeout=0)
        with pytest.raises(QueueFullError):
            session.submit(Request("beta", **long), timeout=0)
        state = session.state()
        assert state.status == "serving" and state.running == state.max_rows and state.waiting == 3
        assert state.tenants["beta"].waiting == 1 and 0 < state.cache_use < 1
        assert len(beta.result().tokens) == 1
        for generation in flood:
            generation.cancel()
        assert all(generation.result().finish_reason in ("cancelled", "length") for generation in flood)


def test_nobody_overtakes_in_line_while_rows_become_free() -> None:
    """The session's thread frees them while the line is looked at, without the lock."""

    class Freeing(Scheduler):
        asked = 0

        @property
        def free_rows(self) -> int:
            self.asked += 1
            return self.asked - 1

    inbox = Inbox(threading.Condition(), None, Freeing(Steps()), max_waiting=1)  # type: ignore[arg-type]
    line = [Turn(one, Generation(one, lambda: None), lambda: None) for one in (entry("a"), entry("a"), entry("a"))]
    inbox.line.extend(line)
    with inbox.lock:
        inbox.let_in()
        assert [turn.has_entered for turn in line] == [True, False, False]
        inbox.let_in()
        assert [turn.has_entered for turn in line] == [True, True, False]


def test_a_call_that_free_rows_can_take_is_never_refused(tiny_build: TinyBuild) -> None:
    """As `Door.submit` sends it, one after the other and none waiting; it was chance while only the queue counted."""
    with Session.open(tiny_build.bundle, verify=False, max_waiting=1) as session:
        rows = session.stepper.max_rows
        for _ in range(20):
            made = [session.submit(Request("alpha", tokens=(3,), max_new_tokens=1), timeout=0) for _ in range(rows + 1)]
            assert all(len(generation.result().tokens) == 1 for generation in made)
            while session.state().running:
                time.sleep(0.001)


@pytest.mark.parametrize("fields", [{"weight": 0.0}, {"weight": float("nan")}, {"max_rows": 0}, {"max_waiting": 0}])
def test_shares_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(IaptError, match="is out of range") as caught:
        Share(**fields)
    assert caught.value.field in fields
