"""More tenants in the folder than a bundle has places: who was not asked for longest makes room, and loses nothing."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import TENANTS, TinyBuild

pytest.importorskip("fastapi", reason="needs the extra serve")

from engines.http.access import Access
from tests.engines.http.served import ADMIN, TEXT, Served, in_thread

NAMES = [f"new{number}" for number in range(6)]


@pytest.fixture
def server(tiny_build: TinyBuild, tmp_path: Path) -> Iterator[Served]:
    """Four places, of which the bundle's own tenants take three; `NAMES` in the folder are as good as them in turn."""
    for number, name in enumerate(NAMES):
        source = tiny_build.bundle / "tenants" / f"{TENANTS[number % 3]}.safetensors"
        shutil.copy(source, tmp_path / f"{name}.safetensors")
    with in_thread(tiny_build.bundle, access=Access(None, "let me in"), folder=tmp_path) as served:
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


def test_a_file_that_is_replaced_is_read_again(
    server: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else replicas that start later would answer otherwise under the same name."""
    wanted = [asked(server, name)[1]["choices"][0]["text"] for name in TENANTS]

    def answer() -> str:
        return str(asked(server, "new0")[1]["choices"][0]["text"])

    assert answer() == wanted[0]
    os.replace(tmp_path / "new1.safetensors", tmp_path / "new0.safetensors")
    assert [answer(), answer()] == [wanted[1]] * 2
    whole = (tmp_path / "new2.safetensors").read_bytes()
    (tmp_path / "new0.safetensors").write_bytes(whole[:1000])
    with caplog.at_level("WARNING"):
        assert [answer(), answer()] == [wanted[1]] * 2, "a half copied file takes nobody's place"
    (told,) = (line for line in caplog.messages if "goes on with the file of before" in line)
    assert "new0" in told
    (tmp_path / "new0.safetensors").write_bytes(whole)
    assert answer() == wanted[2]
    (tmp_path / "new0.safetensors").unlink()
    assert answer() == wanted[2]


def test_a_busy_tenant_is_renewed_in_an_idle_ones_place(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else idle replicas answer with the new file, and busy ones with the old for as long as they are."""
    assert server.session is not None
    wanted = [asked(server, name)[1]["choices"][0]["text"] for name in TENANTS]
    server.session.remove_tenant("gamma")
    assert [asked(server, name)[0] for name in ("new0", "new3")] == [200, 200]  # four places, all taken
    step, go = server.session.stepper.step, threading.Event()
    monkeypatch.setattr(server.session.stepper, "step", lambda tokens: (go.wait(20), step(tokens))[1])
    with ThreadPoolExecutor(3) as pool:
        busy = pool.submit(asked, server, "new0")
        while not server.state()["running"]:
            pass
        os.replace(tmp_path / "new1.safetensors", tmp_path / "new0.safetensors")
        renewed = pool.submit(asked, server, "new0")
        while "new3" in models(server):
            assert not renewed.done()
        go.set()
        assert [each.result()[1]["choices"][0]["text"] for each in (busy, renewed)] == wanted[:2]
    server.wait_until_idle()
    assert models(server) == ["alpha", "beta", "new0", "model"]


def test_loading_by_name_makes_room_too(server: Served) -> None:
    assert server.session is not None
    assert asked(server, "new0")[0] == 200
    body = {"lora_name": "mine", "lora_path": "new1.safetensors"}
    assert server.ask("/v1/load_lora_adapter", body, **ADMIN)[0] == 200
    assert models(server) == [*TENANTS, "mine", "model"]
    status, found, _ = server.ask("/v1/load_lora_adapter", body | {"lora_name": "more"}, **ADMIN)
    assert (status, found["error"]["code"]) == (503, "tenants_full")


def test_a_folder_that_is_gone_is_not_a_missing_tenant(server: Served, tmp_path: Path) -> None:
    folder = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-gone"))
    status, found, headers = asked(server, "new0")
    assert (status, found["error"]["code"], headers["retry-after"]) == (503, "tenants_unreadable", "1")
    assert asked(server, "alpha")[0] == 200
    folder.rename(tmp_path)
    assert asked(server, "new0")[0] == 200 and asked(server, "none")[0] == 404


def test_a_file_of_the_backbones_name_takes_nothing_from_it(server: Served, tmp_path: Path) -> None:
    wanted = asked(server, "model")
    shutil.copy(tmp_path / "new1.safetensors", tmp_path / "model.safetensors")
    status, found, _ = asked(server, "model")
    assert status == 200 and found["choices"] == wanted[1]["choices"]


def test_clients_are_not_told_where_the_folder_is(server: Served, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    status, found, _ = asked(server, "bad")
    assert status == 400 and found["error"]["message"].startswith("bad.safetensors is not a whole safetensors file")
    assert str(tmp_path) not in found["error"]["message"]


def test_one_that_was_loaded_by_name_is_not_taken_out_again(server: Served) -> None:
    """Else the next request for it would be answered by the file of its name, which may be an older version."""
    assert server.session is not None
    wanted = [asked(server, name)[1]["choices"][0]["text"] for name in TENANTS]
    server.session.remove_tenant("gamma")
    assert [asked(server, name)[1]["choices"][0]["text"] for name in ("new0", "new1")] == wanted[:2]
    newer = {"lora_name": "new0", "lora_path": "new2.safetensors", "load_inplace": True}
    assert server.ask("/v1/load_lora_adapter", newer, **ADMIN)[0] == 200
    for name, answer in (("new1", wanted[1]), ("new0", wanted[2]), ("new4", wanted[1]), ("new0", wanted[2])):
        assert asked(server, name)[1]["choices"][0]["text"] == answer
    assert models(server) == ["alpha", "beta", "new0", "new4", "model"]


def test_room_is_made_among_tenants_of_the_method_that_is_full(
    server: Served, tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This bundle has one method; the tenant on demand is told to be of another one, whose places are no help."""
    assert server.session is not None
    assert asked(server, "new0")[0] == 200
    monkeypatch.setattr(server.session.stepper.bank.tenants["new0"], "method", "other")
    status, found, headers = asked(server, "new1")
    assert (status, found["error"]["code"]) == (503, "tenants_full") and "retry-after" not in headers
    monkeypatch.undo()
    assert "new0" in models(server)


def test_no_tenant_takes_the_backbones_name(server: Served) -> None:
    wanted = asked(server, "model")[1]["choices"][0]["text"]
    status, found, _ = server.ask(
        "/v1/load_lora_adapter", {"lora_name": "model", "lora_path": "new0.safetensors"}, **ADMIN
    )
    assert status == 400 and "'model' is the name under which the backbone answers" in found["error"]["message"]
    assert asked(server, "model")[1]["choices"][0]["text"] == wanted


def test_what_is_full_is_said_without_flags(server: Served, tiny_build: TinyBuild) -> None:
    assert server.session is not None
    server.session.add_tenant(tiny_build.bundle / "tenants" / "beta.safetensors", "fourth")
    status, found, headers = asked(server, "new0")
    assert status == 503 and "retry-after" not in headers, "who was loaded otherwise is not taken out"
    assert found["error"]["message"] == "all places for tenants are taken"
