"""Servers of the tests: a process of its own as users start it, or a thread where a test reaches inside."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from engines.http.access import Access
from engines.http.app import STUCK_AFTER_S, Door, make_app
from engines.http.server import KEEP_ALIVE_SECONDS
from engines.http.telemetry import Telemetry
from engines.http.tenant_folder import TenantFolder
from engines.serving.session import Session

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ADMIN = {"Authorization": "Bearer let me in"}


@dataclass
class Served:
    """A server that listens."""

    port: int
    process: subprocess.Popen[str] | None = None
    session: Session | None = None
    log: list[str] = field(default_factory=list)
    """What the process has said so far."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers; ``body`` is sent as JSON, or as it is if it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, sent, headers)
            response = connection.getresponse()
            raw = response.read()
            content = json.loads(raw) if "json" in response.headers["content-type"] else raw.decode()
            return response.status, content, {name.lower(): value for name, value in response.getheaders()}

    def open(self, path: str, body: Any, made: socket.socket | None = None) -> socket.socket:
        """A connection that has sent a request and read nothing; over ``made`` if it is given."""
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent)}\r\n\r\n"
        made = made or socket.socket()
        made.settimeout(SECONDS)
        made.connect(("127.0.0.1", self.port))
        made.sendall(head.encode() + sent)
        return made

    def state(self) -> Any:
        return self.ask("/state")[1]

    def wait_until_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while (state := self.state())["running"] or state["waiting"]:
            assert time.monotonic() < deadline, f"rows stay occupied: {state}"
            time.sleep(0.02)


@contextlib.contextmanager
def in_process(bundle: Path, *flags: str, before: str = "") -> Iterator[Served]:
    """``iapt-export serve`` on a free port; its process runs ``before`` first, which may break something."""
    start = ["-c", f"{before}\nfrom iapt_export.cli import main; main()"] if before else ["-m", "iapt_export"]
    command = [sys.executable, *start, "serve", str(bundle), "--port", "0", "--threads", "1", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"running on http://[\d.]+:(\d+)", line):
            break
    else:
        raise AssertionError("the server did not start: " + "".join(lines))
    threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()
    try:
        yield Served(int(found[1]), process, log=lines)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def in_thread(
    bundle: Path,
    *,
    access: Access | None = None,
    folder: Path | None = None,
    max_waiting: int = 256,
    stuck_after_s: float = STUCK_AFTER_S,
) -> Iterator[Served]:
    """The same endpoints over a session that the test holds."""
    with Session.open(bundle, verify=False, max_waiting=max_waiting, threads=1) as session:
        told = (TenantFolder(session, folder), Telemetry(session, "vllm:"))
        door = Door(session, access or Access(), *told, 1 << 20, stuck_after_s=stuck_after_s)
        config = uvicorn.Config(
            make_app(door), port=0, log_level="critical", access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Served(server.servers[0].sockets[0].getsockname()[1], session=session)
        server.should_exit = True
        thread.join(SECONDS)


def events(text: str) -> list[Any]:
    """The content of server-sent events, ``[DONE]`` as text."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def long(model: str = "alpha", tokens: int = 150, **fields: Any) -> dict[str, Any]:
    """A request for an answer that does not end by itself."""
    return {"model": model, "prompt": [5], "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}


def tokens_of_clients_that_leave(server: Served, number: int) -> int:
    """What so many clients, two of three of which stream, still cost after they asked and hung up."""
    sockets = [server.open(TEXT, long(stream=n % 3 > 0)) for n in range(number)]
    sockets[1].recv(100)
    for each in sockets:
        each.close()
    server.wait_until_idle(5)
    return int(server.state()["tenants"]["alpha"]["generated_tokens"])
