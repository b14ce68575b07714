"""``iapt-export serve`` in replicas of Ray Serve: each is ingress and session in one, over one bundle.

    serve run engines.http.ray_app:application bundle=/bundle tenants=/tenants

Tenants come on demand from a folder that all replicas share, so one that is added there is in each of them, also in
those that start later. Loading over HTTP is off: it would reach the one replica that the request comes to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

from engines.http.access import Access
from engines.http.app import STUCK_AFTER_S, Door, make_app
from engines.http.telemetry import Telemetry
from engines.http.tenant_folder import TenantFolder
from engines.serving.session import Session
from iapt_export.contract.errors import IaptError

MAX_BODY_BYTES = 4 << 20
MAX_ONGOING = 24
"""Requests that a replica is given at once; the others wait where Ray can still choose another replica for them."""
_apps: list[FastAPI] = []
"""The replica's own; Ray asks for it when the replica has been made."""


class SessionReplica:
    """A session, and OpenAI's protocol over it."""

    def __init__(
        self,
        bundle: str,
        tenants: str | None = None,
        keys: str | None = None,
        target: str | None = None,
        threads: int | None = None,
        max_waiting: int = 256,
        trust: str | None = None,
    ) -> None:
        """Open the session.

        Args:
            bundle: its folder, the same on all machines.
            tenants: folder of tenants' files, shared by all machines.
            keys: file of API keys, see `engines.http.access.Access.read`.
            target: which of the bundle's targets runs.
            threads: of ONNX Runtime on the CPU.
            max_waiting: requests that may wait for a row.
            trust: public key that must have signed the bundle.

        Raises:
            IaptError: the bundle cannot be run here, or a folder or file is missing.
        """
        folder = None if tenants is None else Path(tenants)
        if folder is not None and not folder.is_dir():
            raise IaptError(f"{folder} is no folder; expected one with tenants' files")
        access = Access.read(None if keys is None else Path(keys), None)
        self._session = Session.open(
            bundle, target, threads=threads, max_waiting=max_waiting, trust=None if trust is None else Path(trust)
        )
        self._session.activate()
        telemetry = Telemetry(self._session, "vllm:")
        door = Door(self._session, access, TenantFolder(self._session, folder), telemetry, MAX_BODY_BYTES)
        _apps[:] = [make_app(door)]

    def check_health(self) -> None:
        """Ray asks this all the time, and replaces a replica that raises."""
        if problem := self._session.state().problem(STUCK_AFTER_S):
            raise RuntimeError(problem)


def replica_app() -> FastAPI:
    """The app of the replica that runs in this process."""
    return _apps[0]


# the class stays importable as it is: Ray would send a decorated one by value, with a list of its own
Replica = serve.deployment(max_ongoing_requests=MAX_ONGOING)(serve.ingress(replica_app)(SessionReplica))


def application(args: dict[str, Any]) -> serve.Application:
    """What ``serve run`` and a config file take; ``args`` are those of `SessionReplica`, numbers also as text.

    Raises:
        IaptError: ``bundle`` is missing, or an argument is unknown.
    """
    known = ("bundle", "tenants", "keys", "target", "threads", "max_waiting", "trust")
    unknown = sorted(args.keys() - set(known))
    if unknown or "bundle" not in args:
        problem = f"unknown argument {', '.join(unknown)}" if unknown else "bundle is missing"
        raise IaptError(f"{problem}; the arguments are bundle=DIR and {', '.join(known[1:])}")
    numbers: dict[str, Any] = {name: int(args[name]) for name in ("threads", "max_waiting") if name in args}
    return Replica.bind(**(args | numbers))
