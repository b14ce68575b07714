"""What HTTP costs over a session, and how peers' servers do: processor time of a token and throughput, as ratios.

    python -m benchmarks.http BUNDLE
    python -m benchmarks.http BUNDLE --gguf FILE --gguf-python PYTHON      # llama.cpp's server beside it
    python -m benchmarks.http BUNDLE --vllm PYTHON --model FOLDER          # vLLM's beside it

Each round measures, one after another: a session on the bundle, iterated in an event loop; a server of this project on
the same bundle, in a process of its own, that streams to as many clients; and the peers' servers, with the same number
of streams of one model. Streams of the bundle take turns with its tenants. Processor time is that of the process that
holds the session, or of a server's processes; the clients of a server are in another one. Figures are medians over
rounds. PYTHON is an interpreter that has the package ``xllamacpp``, or ``vllm`` for CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from benchmarks.pages import ROOT
from engines.serving.session import Request, Session

PEERS = ROOT / "benchmarks" / "http_peers.py"
PROMPT = tuple(range(20, 36))
START_S = 900
"""A server may compile before it listens."""
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"


def processor_seconds(session: int | None = None) -> float:
    """User and system time of this process, or of all processes that are now in a process session."""
    if session is None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))  # its children's that it has waited for, too
    return ticks / os.sysconf("SC_CLK_TCK")


def over_session(bundle: Path, streams: int, tokens: int, threads: int | None) -> dict[str, float]:
    """Iterate so many requests at once in an event loop."""

    async def one(session: Session, number: int) -> int:
        names = session.tenants
        request = Request(names[number % len(names)], tokens=PROMPT, max_new_tokens=tokens, ignore_eos=True)
        return len([token async for token in await session.submit_async(request)])

    async def everyone(session: Session) -> int:
        return sum(await asyncio.gather(*(one(session, number) for number in range(streams))))

    with Session.open(bundle, verify=False, allow_unproven=True, threads=threads, max_waiting=streams) as session:
        _ = session.codec
        asyncio.run(everyone(session))  # the first round allocates
        start, used = time.perf_counter(), processor_seconds()
        made = asyncio.run(everyone(session))
        return {"tokens_per_s": made / (time.perf_counter() - start), "us": 1e6 * (processor_seconds() - used) / made}


def over_http(command: list[str], port: int, streams: int, tokens: int) -> dict[str, float]:
    """Stream the same requests from a server, which the command starts on a port of this machine."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            _wait(server, port, log)
            asyncio.run(_clients(port, streams, tokens))
            start, used = time.perf_counter(), processor_seconds(server.pid)
            made = asyncio.run(_clients(port, streams, tokens))
            passed, used = time.perf_counter() - start, processor_seconds(server.pid) - used
            return {"tokens_per_s": made / passed, "us": 1e6 * used / made}
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, log: IO[str]) -> None:
    """Until the server lists its models."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            asyncio.run(_get(port, "/v1/models"))["data"]
        except (OSError, ValueError, KeyError):  # not listening, or still loading
            time.sleep(0.5)
        else:
            return
    log.seek(0)
    raise SystemExit(f"the server did not start; the end of what it said:\n{log.read()[-3000:]}")


def servers(asked: argparse.Namespace) -> dict[str, Callable[[int], list[str]]]:
    """Name and command, given a port, of every server that the arguments ask for."""
    threads = asked.threads or len(os.sched_getaffinity(0))

    def own(port: int) -> list[str]:
        command = [sys.executable, "-m", "iapt_export", "serve", str(asked.bundle), "--port", str(port)]
        command += ["--no-verify", "--allow-unproven", "--max-waiting", str(max(asked.streams, 64))]
        return [*command, "--threads", str(asked.threads)] if asked.threads else command

    def llama(port: int) -> list[str]:
        context = -(-(len(PROMPT) + asked.tokens + 1) // 256) * 256
        about = {"gguf": str(asked.gguf), "port": port, "streams": asked.streams, "context": context}
        return [asked.gguf_python, str(PEERS), json.dumps({**about, "threads": threads})]

    def vllm(port: int) -> list[str]:
        command = [asked.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", asked.model, "--port", str(port)]
        command += ["--host", "127.0.0.1", "--dtype", asked.vllm_dtype, "--max-num-seqs", str(asked.streams)]
        return [*command, "--max-model-len", "512"]

    found: dict[str, Callable[[int], list[str]]] = {"http": own}
    if asked.gguf:
        found["llama.cpp"] = llama
    if asked.vllm:
        found["vllm"] = vllm
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _clients(port: int, streams: int, tokens: int) -> int:
    """Tokens of as many streams; reading costs a client little, so that the cores stay with the server."""
    names = await _get(port, "/v1/models")
    tenants = [each["id"] for each in names["data"] if each.get("parent")] or [names["data"][0]["id"]]

    async def one(number: int) -> int:
        body = json.dumps(
            {
                "model": tenants[number % len(tenants)],
                "prompt": PROMPT,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        writer.write(HEAD.format(len(body)).encode() + body)
        end = b""
        while b"[DONE]" not in end:
            piece = await reader.read(1 << 16)
            if not piece:
                raise RuntimeError(f"the server closed the connection: {end[-500:]!r}")
            end = (end + piece)[-2000:]
        writer.close()
        found = re.search(rb'"completion_tokens": ?(\d+)', end)
        assert found
        return int(found[1])

    return sum(await asyncio.gather(*map(one, range(streams))))


async def _get(port: int, path: str) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    content = await reader.read()
    writer.close()
    return json.loads(content.partition(b"\r\n\r\n")[2])


def main() -> None:
    """Measure round after round, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="that compute; as many as there are cores unless given")
    parser.add_argument("--gguf", type=Path, help="model of llama.cpp's server")
    parser.add_argument("--gguf-python", default=sys.executable, metavar="PYTHON", help="where xllamacpp is installed")
    parser.add_argument("--vllm", metavar="PYTHON", help="where vllm is installed")
    parser.add_argument("--vllm-dtype", default="float32", help="of its computing (default: %(default)s)")
    parser.add_argument("--model", help="folder of vLLM's model")
    asked = parser.parse_args()
    if asked.vllm and not asked.model:
        parser.error("--vllm needs --model, the folder of the model that it serves")
    commands, rounds = servers(asked), []
    for number in range(asked.rounds):
        found = {"session": over_session(asked.bundle, asked.streams, asked.tokens, asked.threads)}
        for name, command in commands.items():
            port = _free_port()
            found[name] = over_http(command(port), port, asked.streams, asked.tokens)
        rounds.append(found)
        print(number, json.dumps(found), file=sys.stderr, flush=True)

    print(f"{asked.streams} streams of {asked.tokens} tokens, {asked.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for name in rounds[0]:
        middle = {key: statistics.median(found[name][key] for found in rounds) for key in ("tokens_per_s", "us")}
        print(f"{name}: {middle['tokens_per_s']:.0f} tokens/s, {middle['us']:.0f} us of processor time a token")
    for other in ("session", *[name for name in commands if name != "http"]):
        for key in ("us", "tokens_per_s"):
            values = [found["http"][key] / found[other][key] for found in rounds]
            print(f"{key}, http over {other}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
