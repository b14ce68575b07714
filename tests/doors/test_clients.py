"""LangChain and LiteLLM, which come with a client of their own each, answer what the session answers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.serving.session import Request
from tests.bundles import TinyBuild
from tests.doors.environments import CLIENTS
from tests.engines.http.served import Served, in_thread

pytestmark = pytest.mark.door

SCRIPT = Path(__file__).with_name("chat_clients.py")
TEXT, TOKENS = "the film is a quiet joy", 8


@pytest.fixture(scope="module")
def server(tiny_build: TinyBuild) -> Iterator[Served]:
    CLIENTS.need()
    with in_thread(tiny_build.bundle) as served:
        yield served


def told_by(library: str, server: Served, folder: Path) -> Any:
    asked = {"url": f"{server.url}/v1", "model": "beta", "text": TEXT, "tokens": TOKENS}
    command = [CLIENTS.bin / "python", SCRIPT, library, json.dumps(asked)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("library", ["langchain", "litellm"])
def test_answers_are_those_of_the_session(server: Served, tmp_path: Path, library: str) -> None:
    assert server.session is not None
    (wanted,) = server.session.generate([Request("beta", TEXT, max_new_tokens=TOKENS)])
    told = told_by(library, server, tmp_path)
    assert (told["whole"], told["tokens"]) == (wanted.text, len(wanted.tokens))
    assert "".join(told["streamed"]) == wanted.text and len(told["streamed"]) > 2
    if library == "langchain":
        assert told["structured"]["a"] in ("x", "y")
        assert "Error code: 400" in told["refused"] and "tools: is not supported" in told["refused"]
    else:
        assert "NotFoundError" in told["refused"] and "there is no model 'nobody'" in told["refused"]
