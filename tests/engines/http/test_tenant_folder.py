"""More tenants in the folder than a bundle has places: who was not asked for longest makes room, and loses nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import TENANTS, TinyBuild

pytest.importorskip("fastapi", reason="needs the extra serve")

from tests.engines.http.served import TEXT, Served, in_thread

NAMES = [f"new{number}" for number in range(6)]


@pytest.fixture
def server(tiny_build: TinyBuild, tmp_path: Path) -> Iterator[Served]:
    """Four places, of which the bundle's own tenants take three; `NAMES` in the folder are as good as them in turn."""
    for number, name in enumerate(NAMES):
        source = tiny_build.bundle / "tenants" / f"{TENANTS[number % 3]}.safetensors"
        shutil.copy(source, tmp_path / f"{name}.safetensors")
    with in_thread(tiny_build.bundle, folder=tmp_path) as served:
        yield served


def asked(server: Served, model: str, tokens: int = 6) -> Any:
    body = {"model": model, "prompt": [5, 9], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return server.ask(TEXT, body)


def models(server: Served) -> list[str]:
    return [each["id"] for each in server.ask("/v1/models")[1]["data"]]


def test_the_one_not_asked_for_longest_makes_room(server: Served) -> None:
    assert server.session is not None
    wanted = [asked(server, name)[1]["choices"][0]["text"] for name in TENANTS]
    assert len(set(wanted)) == 3
    for number, name in enumerate([*NAMES, NAMES[0]]):
        status, found, _ = asked(server, name)
        assert status == 200 and found["choices"][0]["text"] == wanted[number % 3 if number < 6 else 0]
        assert models(server) == [*TENANTS, name, "model"], "the bundle's own tenants stay"
    server.session.remove_tenant("gamma")  # a place more
    for name in ("new1", "new0", "new2"):
        assert asked(server, name)[0] == 200
    assert models(server) == ["alpha", "beta", "new0", "new2", "model"]


def test_a_tenant_with_requests_is_not_taken_out(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.session is not None
    step, go = server.session.stepper.step, threading.Event()
    monkeypatch.setattr(server.session.stepper, "step", lambda tokens: (go.wait(20), step(tokens))[1])
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(asked, server, "new0")
        while not server.state()["running"]:
            pass
        status, found, headers = asked(server, "new1", 1)
        assert status == 503 and headers["retry-after"] == "1"
        assert found["error"]["code"] == "tenants_full" and found["error"]["param"] == "model"
        go.set()
        assert busy.result()[0] == 200
    server.wait_until_idle()
    assert asked(server, "new1")[0] == 200


def test_many_clients_of_more_tenants_than_places(server: Served) -> None:
    """Nobody is told that a tenant is missing which the folder has, whoever takes its place meanwhile."""
    wanted = [asked(server, name)[1]["choices"][0]["text"] for name in TENANTS]

    def until_answered(number: int) -> bool:
        while (found := asked(server, NAMES[number % 6]))[0] == 503:
            assert found[1]["error"]["code"] == "tenants_full"
        assert found[0] == 200, found
        return bool(found[1]["choices"][0]["text"] == wanted[number % 3])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(until_answered, range(60)))


def test_what_is_full_is_said_without_flags(server: Served, tiny_build: TinyBuild) -> None:
    assert server.session is not None
    server.session.add_tenant(tiny_build.bundle / "tenants" / "beta.safetensors", "fourth")
    status, found, headers = asked(server, "new0")
    assert status == 503 and "retry-after" not in headers, "who was loaded otherwise is not taken out"
    assert found["error"]["message"] == "all places for tenants are taken"
