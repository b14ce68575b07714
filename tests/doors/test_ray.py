"""Replicas of Ray Serve on loopback: the same tokens from each, whoever is killed, stopped, added or replaced."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engines.serving.session import Request, Session
from tests.bundles import TENANTS, TinyBuild
from tests.doors.environments import RAY
from tests.doors.test_triton import free_ports

pytestmark = pytest.mark.door

SERVER = Path(__file__).with_name("ray_server.py")
MARK = "IAPT_TEST_RUN"
SECONDS = 120


@dataclass
class Cluster:
    """Ray with its replicas."""

    process: subprocess.Popen[str]
    port: int
    mark: str
    tenants: Path
    wanted: dict[str, str]

    def order(self, **fields: Any) -> None:
        """Have replicas added, removed or replaced; returns when that is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()
        self.wait_for_ready()

    def wait_for_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "ready":
                return
        log = (self.tenants.parent / "log.txt").read_text(encoding="utf-8")
        pytest.fail(f"Ray Serve did not do as it was told:\n{log[-3000:]}")

    def ask(self, tenant: str) -> tuple[int, str]:
        """Status and text of an answer; 0 where the connection was cut."""
        body = {"model": tenant, "prompt": [5, 6, 7], "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        try:
            with urllib.request.urlopen(url, json.dumps(body).encode(), SECONDS) as response:
                return response.status, json.load(response)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, ValueError) as error:
            return 0, repr(error)

    def generated(self) -> int:
        """Tokens that the replica which answers has generated."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/state", timeout=SECONDS) as response:
            return sum(tenant["generated_tokens"] for tenant in json.load(response)["tenants"].values())

    def replicas(self) -> list[int]:
        """Processes of the replicas of this run. What one of them forks looks like it until it runs its own program."""
        parents: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes()
                if b"ServeReplica:iapt" in title and self.mark.encode() in (folder / "environ").read_bytes():
                    fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                    parents[int(folder.name)] = int(fields[1])
        return [process for process, parent in parents.items() if parent not in parents]

    def wait_for_replicas(self, number: int, without: int = 0) -> None:
        deadline = time.monotonic() + SECONDS
        while len(found := self.replicas()) != number or without in found:
            assert time.monotonic() < deadline, f"{found} instead of {number} replicas"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    RAY.need()
    folder, mark = Path(tempfile.mkdtemp(prefix="ray")), uuid.uuid4().hex  # Ray's sockets want a short path
    tenants = folder / "tenants"
    tenants.mkdir()
    with Session.open(tiny_build.bundle, threads=1) as session:
        asked = [Request(name, tokens=(5, 6, 7), max_new_tokens=100, ignore_eos=True) for name in TENANTS]
        wanted = dict(zip(TENANTS, (answer.text for answer in session.generate(asked)), strict=True))
    ports = free_ports("http", "METRICS", "STATS")
    port = ports["http"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_TMPDIR": str(folder), "HOME": str(folder), MARK: mark}
    environment |= {f"RAY_SERVE_HAPROXY_{name}_PORT": str(ports[name]) for name in ("METRICS", "STATS")}
    environment["PATH"] = f"{RAY.bin}:{environment['PATH']}"
    settings = {"bundle": str(tiny_build.bundle), "tenants": str(tenants), "threads": 1}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [RAY.bin / "python", SERVER, str(port), json.dumps(settings)],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    made = Cluster(process, port, mark, tenants, wanted)
    try:
        made.wait_for_ready()
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid in _of_run(mark):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _of_run(mark: str) -> Iterator[int]:
    """What a run left behind."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                yield int(path.parent.name)


@dataclass
class Load:
    """Clients that ask without end, and try again where they are cut off or refused for the moment."""

    cluster: Cluster
    retry: bool
    answers: list[tuple[str, int, str]] = field(default_factory=list)
    cut: int = 0

    def __enter__(self) -> Load:
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(12)
        for number in range(12):
            self._pool.submit(self._client, TENANTS[number % 3])
        time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()

    def _client(self, tenant: str) -> None:
        while not self._over.is_set():
            status, text = self.cluster.ask(tenant)
            if self.retry and status in (0, 429, 500, 502, 503, 504):
                self.cut += 1
                time.sleep(0.2)
            else:
                self.answers.append((tenant, status, text))

    def check(self) -> None:
        """All were answered, and rightly."""
        assert len(self.answers) >= 12
        wrong = [each for each in self.answers if (each[1], each[2]) != (200, self.cluster.wanted[each[0]])]
        assert not wrong, wrong[:3]


def test_both_replicas_give_the_sessions_tokens(cluster: Cluster) -> None:
    assert len(cluster.replicas()) == 2
    with Load(cluster, retry=False) as load:
        time.sleep(2)
    load.check()
    totals = {cluster.generated() for _ in range(40)}
    assert len(totals) == 2 and min(totals) > 0, "both replicas answered"


def test_a_tenant_that_is_added_once_is_in_every_replica(cluster: Cluster, tiny_build: TinyBuild) -> None:
    assert cluster.ask("delta")[0] == 404
    shutil.copy(tiny_build.bundle / "tenants" / "beta.safetensors", cluster.tenants / "delta.safetensors")
    found = [cluster.ask("delta") for _ in range(12)]
    assert found == [(200, cluster.wanted["beta"])] * 12


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_replica_that_is_gone_costs_retries_and_no_answer(cluster: Cluster, ended_by: signal.Signals) -> None:
    with Load(cluster, retry=True) as load:
        victim = cluster.replicas()[0]
        os.kill(victim, ended_by)
        cluster.wait_for_replicas(2, without=victim)
        time.sleep(1)
    load.check()
    assert cluster.ask("delta")[0] == 200, "the new one finds what was added while it was not there"


def test_scaling_loses_no_request(cluster: Cluster) -> None:
    with Load(cluster, retry=False) as load:
        for replicas in (1, 3, 1):
            cluster.order(replicas=replicas)
            cluster.wait_for_replicas(replicas)
    load.check()


def test_a_rolling_update_loses_no_request(cluster: Cluster) -> None:
    cluster.order(replicas=2)
    before = cluster.replicas()
    with Load(cluster, retry=False) as load:
        cluster.order(replicas=2, max_waiting=100)
        cluster.wait_for_replicas(2)
        time.sleep(1)
    load.check()
    assert not set(before) & set(cluster.replicas())
