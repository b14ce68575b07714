"""Faults of a server in a process of its own, whose steps take as long as a small model's: clients that leave or never
read, tenants that come and go, attacks on paths, and last a session that dies.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.bundles import TENANTS, TinyBuild

pytest.importorskip("fastapi", reason="needs the extra serve")

from tests.engines.http.served import ADMIN, TEXT, Served, events, in_process, long, tokens_of_clients_that_leave

BEFORE = """
import os, socket, time
import engines.http.replies
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from engines.serving.in_place_stepper import InPlaceStepper
step = InPlaceStepper.step
def slow(self, tokens):
    if os.path.exists({gone!r}):
        raise RuntimeError("the device is gone")
    time.sleep(0.02)
    return step(self, tokens)
InPlaceStepper.step = slow
engines.http.replies.STALLED_SECONDS = 0.5
made = AutoHTTPProtocol.connection_made
def with_small_buffer(self, transport):  # or the system holds megabytes for a reader that never reads
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made(self, transport)
AutoHTTPProtocol.connection_made = with_small_buffer
"""


@pytest.fixture(scope="module")
def folder(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tenants: ``delta``, as good as beta, and what is none."""
    made = tmp_path_factory.mktemp("served") / "tenants"
    (made / "sub").mkdir(parents=True)
    shutil.copy(tiny_build.bundle / "tenants" / "beta.safetensors", made / "delta.safetensors")
    (made.parent / "secret.safetensors").write_bytes(b"x")
    (made / "link.safetensors").symlink_to(made.parent / "secret.safetensors")
    (made / "foreign.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (made / "text.txt").write_text("x", encoding="utf-8")
    with (made / "huge.safetensors").open("wb") as huge:
        huge.truncate((1 << 30) + 1)  # takes no room on the disk
    os.mkfifo(made / "pipe.safetensors")
    return made


@pytest.fixture(scope="module")
def server(tiny_build: TinyBuild, folder: Path) -> Iterator[Served]:
    flags = ["--tenants", str(folder), "--admin-token", "let me in", "--max-waiting", "200", "--no-verify"]
    with in_process(tiny_build.bundle, *flags, before=BEFORE.format(gone=str(folder.parent / "gone"))) as served:
        yield served


def test_150_clients_that_leave_free_their_rows_at_once(server: Served) -> None:
    made = tokens_of_clients_that_leave(server, 150)
    assert 0 < made < 0.05 * 150 * 150, made
    assert server.state()["cache_use"] == 0
    assert 'vllm:request_success_total{finished_reason="abort",model_name="alpha"}' in server.ask("/metrics")[1]


def test_readers_that_never_read_hold_up_nobody_and_are_left(server: Served) -> None:
    sockets = []
    for _ in range(4):
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sockets.append(server.open(TEXT, long(stream=True, logprobs=20, n=2), each))
    deadline = time.monotonic() + 20
    status, found, _ = server.ask(TEXT, long("beta", 5))
    assert status == 200 and found["usage"]["completion_tokens"] == 5
    server.wait_until_idle()
    while sum("took nothing for" in line for line in server.log) < 4:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)
    assert not any("Traceback" in line for line in server.log)
    for each in sockets:
        each.close()


def test_tenants_change_500_times_under_streams(server: Served) -> None:
    wanted = server.ask(TEXT, long("beta", 60))[1]["choices"][0]["text"]

    def change(count: int) -> None:
        for _ in range(count):
            body = {"lora_name": "new", "lora_path": "delta.safetensors"}
            assert server.ask("/v1/load_lora_adapter", body, **ADMIN)[0] == 200
            assert server.ask("/v1/unload_lora_adapter", {"lora_name": "new"}, **ADMIN)[0] == 200

    with ThreadPoolExecutor(9) as pool:
        changes = pool.submit(change, 250)
        answers = []
        while not changes.done():
            answers += list(pool.map(lambda _: server.ask(TEXT, long("beta", 60, stream=True)), range(8)))
        changes.result()
    assert len(answers) >= 8
    for _, text, _ in answers:
        found = events(text)
        assert found.pop() == "[DONE]"
        assert "".join(event["choices"][0]["text"] for event in found) == wanted


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../secret.safetensors", 403),
        ("/etc/passwd", 403),
        ("link.safetensors", 403),
        ("sub/../../secret.safetensors", 403),
        ("/dev/zero", 403),
        ("pipe.safetensors", 400),
        ("huge.safetensors", 400),
        ("sub", 400),
        ("nothing.safetensors", 404),
        ("a\0b", 404),
        ("x" * 1000, 404),
        ("text.txt", 400),
        ("foreign.safetensors", 400),
    ],
)
def test_attacks_on_the_path_of_a_tenant(server: Served, path: str, status: int) -> None:
    found = server.ask("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path}, **ADMIN)
    assert found[0] == status and found[1]["error"]["message"]
    models = [model["id"] for model in server.ask("/v1/models")[1]["data"]]
    assert models == [*TENANTS, "model"], "nothing was installed"


@pytest.mark.parametrize(("name", "status"), [("pipe", 404), ("link", 403), ("huge", 400), ("foreign", 400)])
def test_files_that_are_none_are_no_models(server: Served, name: str, status: int) -> None:
    assert server.ask(TEXT, long(name, 1))[0] == status


def test_a_dead_session_is_seen_within_a_second(server: Served, folder: Path) -> None:
    """The last test of this process."""
    streaming = server.open(TEXT, long(stream=True))
    streaming.recv(50)
    (folder.parent / "gone").touch()
    status, found, _ = server.ask(TEXT, long())
    assert status == 503 and found["error"]["code"] == "session_failed", "the request was right"
    deadline = time.monotonic() + 1
    while server.ask("/health")[0] != 503:
        assert time.monotonic() < deadline
    assert "the device is gone" in server.ask("/health")[1]["failure"] and server.ask("/ready")[0] == 503
    status, found, headers = server.ask(TEXT, long())
    assert status == 503 and found["error"]["code"] == "session_failed" and headers["retry-after"]
    streaming.close()
