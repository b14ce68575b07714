"""``iapt-export serve``: a session, the endpoints over it, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from engines.http.access import Access
from engines.http.app import STUCK_AFTER_S, Door, make_app
from engines.http.telemetry import Telemetry
from engines.http.tenant_folder import TenantFolder
from engines.serving.session import Session
from iapt_export.contract.errors import IaptError

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections; a server that closes first races with a client's next request."""

CUT_SECONDS = 5
"""How long clients may take to read that their answers were ended."""
MAX_PORT = 65535
MAX_SECONDS = 86400

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens, and whom it lets in."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    keys: Path | None = None
    """JSON: API key to names of tenants, ``*`` for all; None lets everybody in."""
    tenants: Path | None = None
    """Folder of tenant files that are installed when they are asked for."""
    admin_token: str | None = None
    """What ``/v1/load_lora_adapter`` asks for; None turns that off."""
    metrics_prefix: str = "vllm:"
    max_body_bytes: int = 4 << 20
    ready_delay_s: float = 0.0
    """How long ``/ready`` says no before the server stops listening, so that a balancer sees it."""
    drain_s: float = 60.0
    """How long streams under way may take at the end."""
    stuck_after_s: float = STUCK_AFTER_S
    """A step that takes longer hangs: ``/health`` says so, for whoever restarts the server."""
    log_level: str = "info"
    """Of uvicorn's own lines."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= MAX_PORT:
            raise IaptError(f"port {self.port} is no port; expected 1 to {MAX_PORT}, or 0 for a free one")
        seconds_of = {"ready_delay": self.ready_delay_s, "drain": self.drain_s, "stuck_after": self.stuck_after_s}
        for name, seconds in seconds_of.items():
            if not 0 <= seconds <= MAX_SECONDS:
                raise IaptError(f"{name} is {seconds} seconds; expected 0 to {MAX_SECONDS}")
        if not re.fullmatch("([a-zA-Z_:][a-zA-Z0-9_:]*)?", self.metrics_prefix):
            text = "expected letters, digits, _ and :, and no digit first"
            raise IaptError(f"no metric's name begins with {self.metrics_prefix!r}; {text}")
        if self.tenants is not None and not self.tenants.is_dir():
            raise IaptError(f"{self.tenants} is no folder; expected one with tenants' files")
        if self.admin_token is not None and (self.tenants is None or not self.admin_token):
            raise IaptError("an admin token is for loading tenants from a folder; name the folder too")


class Server(uvicorn.Server):
    """Uvicorn's, which says at the first signal that it is not ready, and ends when all answers are out."""

    def __init__(self, config: uvicorn.Config, door: Door, ready_delay_s: float, drain_s: float) -> None:
        super().__init__(config)
        self._door = door
        self._delay = ready_delay_s
        self._drain = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, the second hurries it; the exit code stays 0."""
        if self._door.is_draining:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._door.is_draining = True
        _log.info("no longer ready; answers under way are finished")
        asyncio.get_running_loop().call_later(self._delay, self._stop)

    def _stop(self) -> None:
        self.should_exit = True
        asyncio.get_running_loop().call_later(self._drain, self._end_answers)

    def _end_answers(self) -> None:
        """What is not answered in time ends with an error that says so; uvicorn would cut it without a word."""
        asyncio.get_running_loop().run_in_executor(None, self._door.session.close)


def check_place(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before the bundle is loaded.

    Raises:
        IaptError: the port is taken, or the host is none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as place:
            if os.name == "posix":
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            place.bind(address)
    except OSError as error:
        raise IaptError(
            f"nothing can listen on {host}:{port} ({error.strerror or error}); give --port another number, "
            "0 for a free one, or --host an address of this machine"
        ) from error


def serve(session: Session, config: ServerConfig) -> None:
    """Serve until a signal comes; opens the session, and closes it when all is answered.

    Raises:
        IaptError: the bundle cannot run here, the keys cannot be read or are for tenants that there are not, or nothing
            can listen there.
    """
    check_place(config.host, config.port)
    access = Access.read(config.keys, config.admin_token)
    telemetry = Telemetry(session, config.metrics_prefix)
    folder = TenantFolder(session, config.tenants)
    door = Door(session, access, folder, telemetry, config.max_body_bytes, stuck_after_s=config.stuck_after_s)
    if config.tenants is None:
        access.check_tenants(door.models)
    settings = uvicorn.Config(
        make_app(door),
        host=config.host,
        port=config.port,
        access_log=False,
        log_level=config.log_level,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(config.drain_s) + CUT_SECONDS,
        server_header=False,
        ws="none",
    )
    with session:
        Server(settings, door, config.ready_delay_s, config.drain_s).run()
