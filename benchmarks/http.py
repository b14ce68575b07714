"""What HTTP costs over a session: processor time of a token, and throughput, as ratios within one run.

    python -m benchmarks.http BUNDLE

Each round measures, one after another and on the same bundle: a session iterated in an event loop, and a server of
this project in a process of its own that streams to as many clients. Processor time is that of the process that holds
the session; the clients of the server are in another one. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engines.serving.session import Request, Session

PROMPT = tuple(range(20, 36))
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"


def processor_seconds(process: int | None = None) -> float:
    """User and system time of this process, or of another."""
    if process is None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def over_session(bundle: Path, streams: int, tokens: int, threads: int | None) -> dict[str, float]:
    """Iterate so many requests at once in an event loop."""

    async def one(session: Session, number: int) -> int:
        names = session.tenants
        request = Request(names[number % len(names)], tokens=PROMPT, max_new_tokens=tokens, ignore_eos=True)
        return len([token async for token in await session.submit_async(request)])

    async def everyone(session: Session) -> int:
        return sum(await asyncio.gather(*(one(session, number) for number in range(streams))))

    with Session.open(bundle, verify=False, threads=threads) as session:
        _ = session.codec
        asyncio.run(everyone(session))  # the first round allocates
        start, used = time.perf_counter(), processor_seconds()
        made = asyncio.run(everyone(session))
        return {"tokens_per_s": made / (time.perf_counter() - start), "us": 1e6 * (processor_seconds() - used) / made}


def over_http(bundle: Path, streams: int, tokens: int, threads: int | None) -> dict[str, float]:
    """Stream the same requests from a server."""
    command = [sys.executable, "-m", "iapt_export", "serve", str(bundle), "--port", "0", "--no-verify"]
    command += ["--threads", str(threads)] if threads else []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        port = next(int(found[1]) for line in server.stderr if (found := re.search(r"running on \S+:(\d+)", line)))
        asyncio.run(_clients(port, streams, tokens))
        start, used = time.perf_counter(), processor_seconds(server.pid)
        made = asyncio.run(_clients(port, streams, tokens))
        passed, used = time.perf_counter() - start, processor_seconds(server.pid) - used
        return {"tokens_per_s": made / passed, "us": 1e6 * used / made}
    finally:
        server.terminate()
        server.wait()


async def _clients(port: int, streams: int, tokens: int) -> int:
    """Tokens of as many streams; reading costs a client little, so that the cores stay with the server."""
    names = await _get(port, "/v1/models")
    tenants = [each["id"] for each in names["data"] if each["parent"]] or [names["data"][0]["id"]]

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
        found = re.search(rb'"completion_tokens": (\d+)', end)
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
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; as many as there are cores unless given")
    asked = parser.parse_args()
    rounds = []
    for number in range(asked.rounds):
        session = over_session(asked.bundle, asked.streams, asked.tokens, asked.threads)
        served = over_http(asked.bundle, asked.streams, asked.tokens, asked.threads)
        rounds.append((session, served))
        print(number, json.dumps({"session": session, "http": served}), file=sys.stderr, flush=True)

    def median(which: int, name: str) -> float:
        return statistics.median(each[which][name] for each in rounds)

    ratios = {name: [served[name] / session[name] for session, served in rounds] for name in ("us", "tokens_per_s")}
    print(f"{asked.streams} streams of {asked.tokens} tokens, {asked.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"processor time of a token: session {median(0, 'us'):.0f} us, HTTP {median(1, 'us'):.0f} us")
    for name, values in ratios.items():
        print(f"{name}, HTTP over session: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
