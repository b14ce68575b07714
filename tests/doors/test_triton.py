"""The real tritonserver serves what ``iapt-export triton`` writes, to tritonclient and over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines.serving.session import Request, Session
from tests.bundles import PROMPTS, TENANTS, TinyBuild, run
from tests.doors.environments import TRITON

pytestmark = pytest.mark.door

STUB = "triton_python_backend_stub"
CLIENT = Path(__file__).with_name("triton_client.py")
SLOW = """
import time
from pathlib import Path

from engines.serving.in_place_stepper import InPlaceStepper

STEP = InPlaceStepper.step


def slow_step(self, tokens):
    Path(__file__).with_name("rows.txt").write_text(str(len(tokens)))
    time.sleep(0.02)
    return STEP(self, tokens)


InPlaceStepper.step = slow_step
"""
"""Behind ``model.py``: steps take as long as a real model's, and say how many rows there are."""
LONG = {"tenant": "alpha", "input_ids": [5], "max_tokens": 100, "ignore_eos": True, "stream": True}
SHORT = {"tenant": "beta", "text_input": PROMPTS[0], "max_tokens": 6}


@dataclass
class Triton:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    repository: Path

    def client(self, scenario: str, **fields: Any) -> Any:
        """What a client gets, see `triton_client`."""
        words = [TRITON.bin / "python", CLIENT, scenario, json.dumps({"ports": self.ports, **fields})]
        found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 0, found.stderr[-3000:]
        return json.loads(found.stdout)

    @property
    def stubs(self) -> list[int]:
        """Processes of the model."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                head, _, fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")
                if int(fields.split()[1]) == self.process.pid and STUB.startswith(head.partition("(")[2]):
                    found.append(int(path.parent.name))
        return found


def command(folder: Path, ports: dict[str, int]) -> tuple[list[str | Path], dict[str, str]]:
    """The words and variables that start the server of `TRITON` on the model repository ``folder/models``."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(TRITON.folder)}))
    triton = packages / "pytriton" / "tritonserver"
    backends = folder / "backends"
    (backends / "python").mkdir(parents=True)
    for path in (
        *(triton / "backends" / "python").iterdir(),
        triton / "python_backend_stubs" / sysconfig.get_python_version() / STUB,
    ):
        (backends / "python" / path.name).symlink_to(path)
    flags = [f"--{name}-port={port}" for name, port in ports.items()]
    flags += [f"--{name}-address=127.0.0.1" for name in ports]
    flags += [f"--model-repository={folder / 'models'}", f"--backend-directory={backends}"]
    libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["LD_LIBRARY_PATH"] = libraries
    return [triton / "bin" / "tritonserver", "--model-control-mode=explicit", "--load-model=iapt", *flags], environment


def free_ports(*names: str) -> dict[str, int]:
    made = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = {name: each.getsockname()[1] for name, each in zip(names, made, strict=True)}
    for each in made:
        each.close()
    return ports


@pytest.fixture(scope="module")
def server(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    TRITON.need()
    folder = tmp_path_factory.mktemp("triton")
    words = ("--environment", TRITON.folder, "--threads=1", "--max-waiting=8")
    made = run("triton", tiny_build.bundle, "--output", folder / "models", *words)
    assert made.code == 0, made.err
    with (folder / "models" / "iapt" / "1" / "model.py").open("a", encoding="utf-8") as file:
        file.write(SLOW)
    ports = free_ports("http", "grpc", "metrics")
    started, environment = command(folder, ports)
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(started, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        found = Triton(process, ports, folder / "models")
        wait_until_ready(found, folder / "log.txt")
        yield found
    finally:
        process.kill()
        process.wait()


def wait_until_ready(server: Triton, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", server.ports["http"]), 1):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"tritonserver did not start:\n{log.read_text(errors='replace')[-4000:]}")


def expected(bundle: Path, asked: list[dict[str, Any]]) -> list[Any]:
    """What a session answers."""
    requests = [Request(each["tenant"], each["text_input"], max_new_tokens=each["max_tokens"]) for each in asked]
    with Session.open(bundle, threads=1) as session:
        return [(answer.tokens, answer.text, answer.finish_reason) for answer in session.generate(requests)]


def test_streams_over_grpc_are_the_sessions_tokens(server: Triton, tiny_build: TinyBuild) -> None:
    asked = [
        {"tenant": TENANTS[n % 3], "text_input": prompt, "max_tokens": 12, "stream": True}
        for n, prompt in enumerate(PROMPTS)
    ]
    answers, errors = server.client("stream", requests=asked)
    assert errors == []
    wanted = expected(tiny_build.bundle, asked)
    assert [(each["tokens"], each["text"], each["reason"]) for each in answers] == wanted
    assert all(each["responses"] > len(each["tokens"]) / 2 for each in answers), "tokens came as they were made"


def test_generate_over_http_gives_one_answer_or_events(server: Triton, tiny_build: TinyBuild) -> None:
    [(status, content)] = server.client("generate", requests=[SHORT])
    [(tokens, text, reason)] = expected(tiny_build.bundle, [SHORT])
    whole = json.loads(content)
    assert status == 200 and (whole["token"], whole["text_output"], whole["finish_reason"]) == (tokens, text, reason)
    [(status, content)] = server.client("generate", requests=[{**SHORT, "stream": True}], path="generate_stream")
    events = [json.loads(line.removeprefix("data: ")) for line in content.splitlines() if line]
    assert status == 200 and len(events) > 2
    assert "".join(each["text_output"] for each in events) == text and events[-1]["finish_reason"] == reason


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"tenant": "nobody"}, "tenant 'nobody' is not in this bundle"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"max_tokens": 5000}, "needs 50"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"text_input": ""}, "prompt"),
        ({"input_ids": [99999]}, "99999"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_requests_are_refused_in_words(server: Triton, wrong: dict[str, Any], text: str) -> None:
    fields = {**SHORT, **wrong}
    if "input_ids" in wrong:
        del fields["text_input"]
    [(status, content)] = server.client("generate", requests=[fields])
    assert status == 400 and text in content


def test_a_client_that_leaves_frees_its_rows(server: Triton) -> None:
    rows = server.repository / "iapt" / "1" / "rows.txt"
    before, after, tokens = server.client("cancel", long=LONG, rows=str(rows))
    assert (before, after, len(tokens)) == (8, 1, 100)


def test_a_full_queue_refuses_one_tenant_and_takes_another(server: Triton) -> None:
    errors, over_http, other = server.client("full", long=LONG, short=SHORT)
    assert len(errors) == 1 and "requests are waiting already" in errors[0]
    assert over_http[0][0] != 200 and "requests are waiting already" in over_http[0][1]
    assert other[0][0] == 200 and len(json.loads(other[0][1])["token"]) == 6


def test_unloading_finishes_what_is_under_way(server: Triton) -> None:
    found = server.client("reload", long=LONG, short=SHORT, kill=[])
    assert len(found["tokens"]) == 100
    assert found["unloaded"][0][0] != 200
    assert found["loaded"] and found["again"][0][0] == 200


def test_a_killed_stub_comes_back_by_unloading_and_loading(server: Triton) -> None:
    found = server.client("reload", long=LONG, short=SHORT, kill=server.stubs)
    # what docs/serving.md warns of: Triton says ready while every request fails, and ends no stream
    assert found["ready"] and found["answers"][0][0] != 200 and found["ended"] == []
    assert found["loaded"] and found["again"][0][0] == 200
