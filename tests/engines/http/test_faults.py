"""Clients and operators that misbehave: they leave, stall, flood, attack; sessions die; servers are told to end."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import TENANTS, TinyBuild, run

pytest.importorskip("fastapi", reason="needs the extra serve")

from engines.http.access import Access
from engines.http.server import ServerConfig
from engines.serving.session import Request, Session
from iapt_export.contract.errors import IaptError
from tests.engines.http.served import (
    ADMIN,
    SECONDS,
    TEXT,
    Served,
    events,
    in_process,
    in_thread,
    long,
    tokens_of_clients_that_leave,
)


@pytest.fixture
def folder(tiny_build: TinyBuild, tmp_path: Path) -> Path:
    """A folder of tenants: ``delta``, as good as beta."""
    made = tmp_path / "tenants"
    made.mkdir()
    shutil.copy(tiny_build.bundle / "tenants" / "beta.safetensors", made / "delta.safetensors")
    return made


@pytest.fixture
def server(tiny_build: TinyBuild, folder: Path) -> Iterator[Served]:
    with in_thread(tiny_build.bundle, access=Access(None, "let me in"), folder=folder, max_waiting=120) as served:
        yield served


def slowed(served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
    """Make steps take as long as a real model's."""
    assert served.session is not None
    step = served.session.stepper.step
    monkeypatch.setattr(served.session.stepper, "step", lambda tokens: (time.sleep(seconds), step(tokens))[1])


def test_a_step_that_hangs_is_no_health(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that does not come back: the thread lives, and nothing is answered."""
    go_on = threading.Event()
    with in_thread(tiny_build.bundle, stuck_after_s=0.2) as server, contextlib.closing(socket.socket()) as client:
        assert server.session is not None
        step = server.session.stepper.step
        monkeypatch.setattr(server.session.stepper, "step", lambda tokens: (go_on.wait(SECONDS), step(tokens))[1])
        assert server.ask("/health")[0] == 200
        server.open(TEXT, long(tokens=3), client)
        deadline = time.monotonic() + SECONDS
        while (found := server.ask("/health"))[0] == 200:
            assert time.monotonic() < deadline
        assert found[1]["status"] == "serving" and "mean that it hangs" in found[1]["failure"]
        assert server.state()["step_seconds"] > 0.2
        go_on.set()
        server.wait_until_idle()
        assert server.ask("/health")[:2] == (200, {"status": "serving", "failure": None})


def test_clients_that_leave_free_their_rows_at_once(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(server, monkeypatch)
    made = tokens_of_clients_that_leave(server, 60)
    assert 0 < made < 0.1 * 60 * 150, made
    assert server.session is not None
    deadline = time.monotonic() + 5
    while server.session._generations:  # one that is being read now neither runs nor waits
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {tenant.users for tenant in server.session.stepper.bank.tenants.values()} == {0}


def test_a_flood_gets_429_and_another_tenant_an_answer(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(server, monkeypatch)
    with ThreadPoolExecutor(40) as pool:
        # eight rows, and 120 places in the queue
        flood = [pool.submit(server.ask, TEXT, long(tokens=12, n=4)) for _ in range(40)]
        while server.state()["waiting"] < 100:
            time.sleep(0.005)
        start = server.state()["tenants"]["alpha"]["generated_tokens"]
        assert server.ask(TEXT, long("beta", 1))[0] == 200
        waited = (server.state()["tenants"]["alpha"]["generated_tokens"] - start) / 8
        found = [each.result() for each in flood]
    assert waited < 40, "beta waited for a row, and not for all of alpha's 480 answers"
    refused = [(content, headers) for status, content, headers in found if status == 429]
    assert refused and all(status in (200, 429) for status, _, _ in found)
    for content, headers in refused:
        assert content["error"]["code"] == "queue_full" and headers["retry-after"] == "1"


def test_what_fails_after_the_first_token_is_an_event(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.session is not None
    step, steps = server.session.stepper.step, iter(range(100))

    def fail_later(tokens: Any) -> Any:
        if next(steps) == 5:
            raise RuntimeError("the device is gone")
        time.sleep(0.02)
        return step(tokens)

    monkeypatch.setattr(server.session.stepper, "step", fail_later)
    status, text, _ = server.ask(TEXT, long(stream=True))
    found = events(text)
    assert status == 200 and "event: error" in text and found[-1]["error"]["code"] == "session_failed"
    assert "device" not in json.dumps(found[-1]), "what a defect says is for the log"


def test_a_tenant_of_the_folder_is_there_when_it_is_asked(server: Served, folder: Path) -> None:
    wanted = server.ask(TEXT, long("beta", 9))[1]["choices"][0]["text"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: server.ask(TEXT, long("delta", 9)), range(6)))
    assert {answer[1]["choices"][0]["text"] for answer in answers} == {wanted}
    (folder / "broken.safetensors").write_bytes(b"x" * 100)
    status, found, _ = server.ask(TEXT, long("broken"))
    assert status == 400 and "is not a whole safetensors file" in found["error"]["message"]


@pytest.mark.parametrize("name", ["../delta", "a/b", "", "-x", "a\nb", "x" * 200])
def test_names_that_are_none(server: Served, name: str) -> None:
    found = server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "delta.safetensors"}, **ADMIN)
    assert found[0] == 400 and found[1]["error"]["param"] == "lora_name"


def test_loading_needs_the_token(server: Served, tiny_build: TinyBuild) -> None:
    body = {"lora_name": "new", "lora_path": "delta.safetensors"}
    assert server.ask("/v1/load_lora_adapter", body)[0] == 401
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "beta"}, Authorization="Bearer no")[0] == 401
    with pytest.raises(IaptError, match="name the folder too"):
        ServerConfig(admin_token="x")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"drain_s": -1.0}, "drain is -1.0 seconds; expected 0 to 86400"),
        ({"drain_s": float("nan")}, "drain is nan seconds"),
        ({"stuck_after_s": -0.5}, "stuck_after is -0.5 seconds"),
        ({"ready_delay_s": float("inf")}, "ready_delay is inf seconds"),
        ({"metrics_prefix": "my app:"}, "no metric's name begins with 'my app:'; expected letters"),
        ({"metrics_prefix": "1"}, "no metric's name begins with '1'"),
    ],
)
def test_settings_that_are_none(fields: dict[str, Any], text: str) -> None:
    assert ServerConfig(metrics_prefix="").drain_s == 60
    with pytest.raises(IaptError) as caught:
        ServerConfig(**fields)
    assert text in str(caught.value)


def test_keys_let_in_to_their_tenants(tiny_build: TinyBuild) -> None:
    access = Access({"one": ["alpha"], "all": ["*"]})
    with in_thread(tiny_build.bundle, access=access) as server:

        def status(model: str, key: str | None) -> int:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return server.ask(TEXT, long(model, 1), **headers)[0]

        assert [status("alpha", key) for key in ("one", "all", "none", None, "")] == [200, 200, 401, 401, 401]
        assert [status(model, "one") for model in ("beta", "unknown", "model")] == [403, 403, 403]
        assert status("unknown", "all") == 404
        listed = server.ask("/v1/models", Authorization="Bearer one")[1]["data"]
        assert [model["id"] for model in listed] == ["alpha"]
        assert server.ask("/state")[0] == 401 and server.ask("/health")[0] == 200


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": "alpha"}', '{" ": ["a"]}', '{"key": [1]}'])
def test_files_of_keys_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(IaptError, match=r'expected \{"KEY": \["tenant"\]'):
        Access.read(path, None)


def test_sigterm_lets_streams_end(tiny_build: TinyBuild) -> None:
    with in_process(tiny_build.bundle, "--ready-delay", "1", "--no-verify") as server:
        assert server.process is not None
        sockets = [server.open(TEXT, long(TENANTS[n % 3], stream=True)) for n in range(40)]
        first = [each.recv(10) for each in sockets]
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 1
        while server.ask("/ready")[0] == 200:
            assert time.monotonic() < deadline
        answers = []
        for each, begun in zip(sockets, first, strict=True):
            pieces = [begun]
            while piece := each.recv(1 << 16):
                pieces.append(piece)
                if b"[DONE]" in b"".join(pieces[-2:]):
                    break
            answers.append(b"".join(pieces))
            each.close()
        assert all(answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer for answer in answers)
        assert server.process.wait(20) == 0


def test_what_the_drain_does_not_finish_ends_with_an_error(tiny_build: TinyBuild) -> None:
    """In OpenAI's shape, as an event where the stream had begun; uvicorn alone cuts the connection."""
    with in_process(tiny_build.bundle, "--drain", "0.1", "--no-verify") as server, ThreadPoolExecutor(5) as pool:
        assert server.process is not None
        asked = [pool.submit(server.ask, TEXT, long(n=50, stream=n % 2 == 0)) for n in range(5)]
        while server.state()["running"] < 8 or server.state()["tenants"]["alpha"]["generated_tokens"] < 50:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        ended = 0
        for status, content, headers in (each.result() for each in asked):
            if status == 503:
                assert content["error"]["code"] == "closed" and headers["retry-after"] == "1"
            elif isinstance(content, str) and not content.endswith("data: [DONE]\n\n"):
                assert status == 200 and events(content)[-1]["error"]["code"] == "closed"
            else:
                assert status == 200
                continue
            ended += 1
        assert ended > 0
        assert server.process.wait(20) == 0


@pytest.mark.parametrize(("flags", "rows"), [((), None), (("--max-rows-per-tenant=2",), 2)])
def test_rows_that_one_tenant_may_have(
    tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], rows: int | None
) -> None:
    limits = []

    def look(session: Session, _config: object) -> None:
        with session:
            for _ in range(6):
                session.submit(Request("alpha", tokens=(5,), max_new_tokens=60, ignore_eos=True))
            session.submit(Request("beta", tokens=(5,), max_new_tokens=1)).result()
            limits.append(session._scheduler.waiting.accounts["alpha"].share.max_rows)

    monkeypatch.setattr("engines.http.server.serve", look)
    assert run("serve", tiny_build.bundle, *flags).code == 0
    assert limits == [rows]
