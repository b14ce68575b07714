"""The benchmark over HTTP counts what a server answers, and says what it said where it does not start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import over_http
from tests.bundles import TinyBuild


@pytest.mark.slow
def test_session_and_server_answer_the_same_number_of_tokens(
    tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["http", str(tiny_build.bundle), "--streams", "3", "--tokens", "5", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", words)
    counts = []
    clients = over_http._clients

    async def counted(*arguments: object) -> int:
        counts.append(await clients(*arguments))  # type: ignore[arg-type]
        return counts[-1]

    monkeypatch.setattr(over_http, "_clients", counted)
    over_http.main()
    told = capsys.readouterr()
    assert counts == [15, 15], "a round to warm up, and one that counts"
    found = json.loads(told.err.strip().splitlines()[-1].partition(" ")[2])
    assert set(found) == {"session", "http"} and all(each["us"] > 0 for each in found.values())
    assert "us, http over session: " in told.out and told.out.startswith("3 streams of 5 tokens, 1 rounds")


def test_a_server_that_ends_leaves_its_words(tmp_path: Path) -> None:
    server = over_http.Server([sys.executable, "-c", "print('no model here'); raise SystemExit(3)"], 1, folder=tmp_path)
    with pytest.raises(SystemExit, match="the server did not start; the end of what it said:\nno model here"):
        over_http.over_http(server, streams=1, tokens=1)


def test_peers_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["http", "bundle", "--vllm", "python"])
    with pytest.raises(SystemExit) as ended:
        over_http.main()
    assert ended.value.code == 2 and "--vllm needs --model" in capsys.readouterr().err
