"""What HTTP costs over a session, and how peers' servers do: processor time of a token and throughput, as ratios.

    python -m benchmarks.over_http BUNDLE
    python -m benchmarks.over_http BUNDLE --doors                               # behind Triton and Ray, too
    python -m benchmarks.over_http BUNDLE --gguf FILE --gguf-python PYTHON      # llama.cpp's server beside it
    python -m benchmarks.over_http BUNDLE --vllm PYTHON --model FOLDER          # vLLM's beside it
    python -m benchmarks.over_http BUNDLE --genai DIR --genai-python PYTHON     # genai's engine beside it

Each round measures, one after another, and every other round in reverse: a session on the bundle, iterated in an event
loop; a server of this project on the same bundle, in a process of its own, that streams to as many clients; and the
peers' servers, with the same number of streams of one model. Streams of the bundle take turns with its tenants.
Processor time is that of the process that holds the session, or of a server's processes; the clients of a server are in
another one. Streams have from half to one and a half times the tokens that are asked for: equal ones would end
together, so that how many happened to begin together decides how many read together all through a round. Figures are
medians over rounds.
PYTHON is an interpreter that has the package ``xllamacpp``, ``vllm`` for CPUs, or ``onnxruntime-genai``, whose builder
makes DIR (see `benchmarks.serving`); its engine runs in a process of its own that nobody asks over HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.pages import ROOT
from engines.serving.session import Request, Session
from iapt_export.contract.manifest import BundleManifest
from tests.doors.environments import RAY, TRITON
from tests.doors.test_triton import command as triton_command
from tests.doors.test_triton import free_ports

PEERS = ROOT / "benchmarks" / "http_peers.py"
PROMPT = tuple(range(20, 36))
MARK = "IAPT_BENCHMARK"
START_S = 900
"""A server may compile before it listens."""
LOOK_S = 0.02
"""Between two looks of the clients; half a dozen of them for a step of the demo's model."""
HEAD = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


def length(number: int, tokens: int) -> int:
    """Tokens of a stream, ``tokens`` in the mean of many."""
    return tokens // 2 + number * 37 % (tokens + 1)


def processor_seconds(mark: str | None = None) -> float:
    """User and system time of this process, or of all that now run with a mark among their variables."""
    if mark is None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    ticks = 0
    for process in marked(mark):
        with contextlib.suppress(OSError):  # it has ended
            text = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
            fields = text.rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # its children's that it has waited for, too
    return ticks / os.sysconf("SC_CLK_TCK")


def marked(mark: str) -> Iterator[int]:
    """Processes that were started with a mark, and those that these started."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)


def over_session(bundle: Path, streams: int, tokens: int, threads: int | None) -> dict[str, float]:
    """Iterate so many requests at once in an event loop."""

    async def one(session: Session, number: int) -> int:
        names = session.tenants
        wanted = length(number, tokens)
        request = Request(names[number % len(names)], tokens=PROMPT, max_new_tokens=wanted, ignore_eos=True)
        return len([token async for token in await session.submit_async(request)])

    async def everyone(session: Session) -> int:
        return sum(await asyncio.gather(*(one(session, number) for number in range(streams))))

    with Session.open(bundle, verify=False, allow_unproven=True, threads=threads, max_waiting=streams) as session:
        _ = session.codec
        asyncio.run(everyone(session))  # the first round allocates
        start, used = time.perf_counter(), processor_seconds()
        made = asyncio.run(everyone(session))
        return {"tokens_per_s": made / (time.perf_counter() - start), "us": 1e6 * (processor_seconds() - used) / made}


def over_genai(asked: argparse.Namespace) -> dict[str, float]:
    """The same requests to onnxruntime-genai's engine, all at once."""
    about = {"folder": str(asked.genai), "prompt": PROMPT, "threads": asked.threads or len(os.sched_getaffinity(0))}
    about["lengths"] = [length(number, asked.tokens) for number in range(asked.streams)]
    words = [asked.genai_python, "-P", PEERS, "genai", json.dumps(about)]
    found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"tokens_per_s": found["tokens"] / found["s"], "us": 1e6 * found["processor_s"] / found["tokens"]}


@dataclass(frozen=True)
class Server:
    """A server that a round starts, and how its clients ask."""

    command: Sequence[str | Path]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    path: str = "/v1/completions"
    tenants: tuple[str, ...] = ()
    """Of a server of Triton, which lists none."""
    folder: Path = ROOT


def over_http(server: Server, streams: int, tokens: int) -> dict[str, float]:
    """Stream the same requests from a server."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **server.environment, MARK: mark}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            server.command, stdout=log, stderr=log, stdin=subprocess.PIPE, env=environment, cwd=server.folder
        )
        try:
            tenants = _wait(process, server, log)
            _clients(server, tenants, streams, tokens)
            start, used = time.perf_counter(), processor_seconds(mark)
            made = _clients(server, tenants, streams, tokens)
            passed, used = time.perf_counter() - start, processor_seconds(mark) - used
            return {"tokens_per_s": made / passed, "us": 1e6 * used / made}
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for each in marked(mark):
                with contextlib.suppress(OSError):
                    os.kill(each, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], server: Server, log: IO[str]) -> list[str]:
    """Until the server lists its models; those that are tenants, or all where none says so."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if server.tenants:
                asyncio.run(_get(server.port, "/v2/models/iapt/config"))["name"]
                return list(server.tenants)
            found = asyncio.run(_get(server.port, "/v1/models"))["data"]
        except (OSError, ValueError, KeyError):  # not listening, or still loading
            time.sleep(0.5)
        else:
            return [each["id"] for each in found if each.get("parent")] or [found[0]["id"]]
    log.seek(0)
    raise SystemExit(f"the server did not start; the end of what it said:\n{log.read()[-3000:]}")


Start = Callable[[int], Server]
"""Given a port."""


def servers(asked: argparse.Namespace, scratch: Path) -> dict[str, Start]:
    """Every server that the arguments ask for."""
    threads = asked.threads or len(os.sched_getaffinity(0))
    here = {"PYTHONPATH": str(ROOT)}

    def own(port: int) -> Server:
        command = [sys.executable, "-m", "iapt_export", "serve", str(asked.bundle), "--port", str(port)]
        command += ["--no-verify", "--allow-unproven", "--max-waiting", str(max(asked.streams, 64))]
        return Server([*command, "--threads", str(threads)], port, here)

    def llama(port: int) -> Server:
        context = -(-(len(PROMPT) + 2 * asked.tokens + 1) // 256) * 256
        about = {"gguf": str(asked.gguf), "port": port, "streams": asked.streams, "context": context}
        return Server([asked.gguf_python, "-P", PEERS, "llama", json.dumps({**about, "threads": threads})], port)

    def vllm(port: int) -> Server:
        command = [asked.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", asked.model, "--port", str(port)]
        command += ["--host", "127.0.0.1", "--dtype", asked.vllm_dtype, "--max-num-seqs", str(asked.streams)]
        return Server([*command, "--max-model-len", "512"], port)

    def ray(port: int) -> Server:
        application = {"import_path": "engines.http.ray_app:application", "route_prefix": "/", "name": "iapt"}
        application["args"] = {"bundle": str(asked.bundle.resolve()), "threads": threads}  # type: ignore[assignment]
        config = scratch / "ray.yaml"
        config.write_text(
            json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]})
        )
        environment = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"RAY_TMPDIR": str(scratch), "PATH": f"{RAY.bin}:{os.environ['PATH']}"}
        return Server([RAY.bin / "serve", "run", str(config)], port, environment, folder=scratch)

    def triton(port: int) -> Server:
        folder = scratch / f"triton-{port}"
        words = ["triton", str(asked.bundle), "--output", str(folder / "models"), "--environment", str(TRITON.folder)]
        words += ["--threads", str(threads), "--max-waiting", str(max(asked.streams, 64))]
        subprocess.run([sys.executable, "-m", "iapt_export", *words], check=True, env={**os.environ, **here})
        ports = {**free_ports("grpc", "metrics"), "http": port}
        command, environment = triton_command(folder, ports)
        names = tuple(each.name for each in BundleManifest.load(asked.bundle).tenants)
        return Server(command, port, environment, "/v2/models/iapt/generate_stream", names, folder)

    found: dict[str, Start] = {"http": own}
    if asked.gguf:
        found["llama.cpp"] = llama
    if asked.vllm:
        found["vllm"] = vllm
    if asked.doors:
        found |= {"triton": triton, "ray": ray}
    return found


def _clients(server: Server, tenants: Sequence[str], streams: int, tokens: int) -> int:
    """Tokens of as many streams.

    What came is looked for fifty times a second, so that no send wakes a client: woken for each token, the clients took
    the server's cores, which those on other machines do not.
    """
    answers: dict[int, tuple[socket.socket, bytearray]] = {}
    arrived = select.poll()
    for number in range(streams):
        common = {"max_tokens": length(number, tokens), "temperature": 0, "ignore_eos": True, "stream": True}
        if server.tenants:
            fields: dict[str, Any] = {**common, "input_ids": PROMPT, "tenant": tenants[number % len(tenants)]}
        else:
            fields = {**common, "prompt": PROMPT, "model": tenants[number % len(tenants)]}
            fields["stream_options"] = {"include_usage": True}
        body = json.dumps(fields).encode()
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(HEAD.format(server.path, len(body)).encode() + body)
        answers[client.fileno()] = client, bytearray()
        arrived.register(client, select.POLLIN)
    made = 0
    while answers:
        time.sleep(LOOK_S)
        for place, _ in arrived.poll(0):
            client, content = answers[place]
            piece = client.recv(1 << 20)
            content += piece
            if content.endswith(b"\r\n0\r\n\r\n") or b"[DONE]" in content[-2000:]:
                arrived.unregister(client)
                client.close()
                del answers[place]
                made += _tokens_in(server, bytes(content))
            elif not piece:
                raise RuntimeError(f"the server closed the connection: {bytes(content[-500:])!r}")
    return made


def _tokens_in(server: Server, content: bytes) -> int:
    if server.tenants:
        return content.count(b"data:")  # a token each
    found = re.search(rb'"completion_tokens": ?(\d+)', content)
    if not found:
        raise RuntimeError(f"the server did not say how many tokens it wrote: {content[-500:]!r}")
    return int(found[1])


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
    parser.add_argument("--doors", action="store_true", help="measure also behind Triton and Ray: make test-serving")
    parser.add_argument("--gguf", type=Path, help="model of llama.cpp's server")
    parser.add_argument("--gguf-python", default=sys.executable, metavar="PYTHON", help="where xllamacpp is installed")
    parser.add_argument("--vllm", metavar="PYTHON", help="where vllm is installed")
    parser.add_argument("--vllm-dtype", default="float32", help="of its computing (default: %(default)s)")
    parser.add_argument("--model", help="folder of vLLM's model")
    parser.add_argument("--genai", type=Path, help="folder of onnxruntime-genai's model")
    parser.add_argument("--genai-python", default=sys.executable, metavar="PYTHON", help="where genai is installed")
    asked = parser.parse_args()
    if asked.vllm and not asked.model:
        parser.error("--vllm needs --model, the folder of the model that it serves")
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="iapt") as scratch:
        starts = servers(asked, Path(scratch))
        names = ["session", *starts, *(["genai"] if asked.genai else [])]
        for number in range(asked.rounds):
            found = {}
            # every other round the other way round: what goes on beside this on a machine changes meanwhile
            for name in names[:: 1 if number % 2 == 0 else -1]:
                if name == "session":
                    found[name] = over_session(asked.bundle, asked.streams, asked.tokens, asked.threads)
                elif name == "genai":
                    found[name] = over_genai(asked)
                else:
                    found[name] = over_http(starts[name](free_ports(name)[name]), asked.streams, asked.tokens)
                print(number, name, json.dumps(found[name]), file=sys.stderr, flush=True)
            rounds.append(found)

    print(f"{asked.streams} streams of {asked.tokens} tokens, {asked.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for name in names:
        middle = {key: statistics.median(found[name][key] for found in rounds) for key in ("tokens_per_s", "us")}
        print(f"{name}: {middle['tokens_per_s']:.0f} tokens/s, {middle['us']:.0f} us of processor time a token")
    for other in (name for name in names if name != "http"):
        for key in ("us", "tokens_per_s"):
            values = [found["http"][key] / found[other][key] for found in rounds]
            print(f"{key}, http over {other}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
