"""The endpoints: OpenAI's, vLLM's for adapters, and those of whoever watches the server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from engines.http.access import ALL, Access
from engines.http.protocol import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, read_body
from engines.http.refusals import RefusalError, refusal_of
from engines.http.replies import Form, Reply
from engines.http.telemetry import Telemetry
from engines.http.tenant_folder import TenantFolder
from engines.http.writing import ChatForm, CompletionForm
from engines.serving.request import Request as Asked
from engines.serving.session import Generation, Session
from iapt_export.contract.errors import IaptError
from iapt_export.contract.prompt_format import HOW

PAGE = Path(__file__).with_name("page.html")
PAGE_MAY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
VERSION = version_of("iapt-export")
STUCK_AFTER_S = 600.0
"""A step that takes longer hangs: reading the longest instructions in the largest batch may take minutes on a CPU."""

_log = logging.getLogger(__name__)


@dataclass
class Door:
    """What the endpoints share."""

    session: Session
    access: Access
    folder: TenantFolder
    telemetry: Telemetry
    max_body_bytes: int
    is_draining: bool = False
    stuck_after_s: float = STUCK_AFTER_S
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    told: set[str] = dataclasses.field(default_factory=set)
    """Tenants of which `tell_form` has spoken."""

    @property
    def models(self) -> list[str]:
        """The tenants, and the backbone where it can be asked."""
        base = self.session.base
        return [*self.session.tenants, *([] if base is None or base in self.session.tenants else [base])]

    def card(self, name: str) -> dict[str, Any]:
        """A model as clients list it."""
        base = self.session.base
        parent = base if name != base or name in self.session.tenants else None
        return {"id": name, "object": "model", "created": self.started, "owned_by": "iapt-export", "parent": parent}

    async def body(self, request: Request) -> dict[str, Any]:
        """A request's JSON.

        Raises:
            RefusalError: it is too large, or no JSON object.
        """
        pieces, size = [], 0
        async for piece in request.stream():
            size += len(piece)
            if size > self.max_body_bytes:
                raise RefusalError(413, f"the body has more than {self.max_body_bytes} bytes", code="body_too_large")
            pieces.append(piece)
        return read_body(b"".join(pieces))

    @contextlib.asynccontextmanager
    async def admitted(self, request: Request, model: str) -> AsyncIterator[None]:
        """Refuse who may not ask, and an unknown model that the folder does not have either; keep the others within.

        Raises:
            RefusalError: with the reason.
        """
        self.access.check(request.headers.get("authorization"), model)
        with self.folder.holding(model):
            if not await self.folder.find(model) and model not in self.models:
                raise RefusalError(404, f"there is no model {model!r}", param="model", code="model_not_found")
            yield

    def tell_form(self, model: str) -> None:
        """Say once for a tenant that its training had something around what is sent as it is."""
        bank = self.session.stepper.bank
        tenant = bank.get(model)
        if tenant is bank.base or tenant.prompt_format == "plain" or model in self.told:
            return
        self.told.add(model)
        _log.warning(
            "tenant %s was trained with %s; /v1/completions sends text as it is; its answers may be worse than those "
            "of /v1/chat/completions",
            model,
            HOW[tenant.prompt_format],
        )

    async def submit(self, asked: Sequence[Asked]) -> list[Generation]:
        """Let all enter the queue, or none.

        Raises:
            IaptError: one cannot be answered, or the queue is full.
        """
        made: list[Generation] = []
        try:
            for number, each in enumerate(asked):
                made.append(await self.session.submit_async(each, number, timeout=0))
        except BaseException:
            for generation in made:
                generation.cancel()
            raise
        return made

    async def reply(self, asked: Sequence[Asked], form: Form, sent: ChatRequest | CompletionRequest) -> Reply:
        """Submit requests and answer with what comes of them."""
        made = await self.submit(asked)
        return Reply(made, form, self.telemetry, sent.model, stream=sent.stream, usage=sent.wants_usage, n=sent.n)


def make_app(door: Door) -> FastAPI:
    """The application over an open session, which it drains at the end."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(lambda: door.session.codec)  # or the first request would wait for it
        yield
        await asyncio.to_thread(door.session.close, drain=True, timeout=5)

    app = FastAPI(title="iapt-export", version=VERSION, lifespan=life, redoc_url=None)
    for kind in (RefusalError, IaptError, ValueError, Exception):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    _add_openai(app, door)
    _add_adapters(app, door)
    _add_watching(app, door)
    return app


def _refuse(_: Request, error: Exception) -> Response:
    return refusal_of(error).response()


def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return RefusalError(error.status_code, text, code=code).response()


def _takes(model: Any) -> dict[str, Any]:
    """What the description of the interface says of a body that the endpoint reads by itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_openai(app: FastAPI, door: Door) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        allowed = door.access.tenants_of(request.headers.get("authorization"))
        names = [name for name in door.models if ALL in allowed or name in allowed]
        return JSONResponse({"object": "list", "data": [door.card(name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        async with door.admitted(request, name):
            return JSONResponse(door.card(name))

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest))
    async def chat(request: Request) -> Response:
        sent = ChatRequest.model_validate(await door.body(request))
        async with door.admitted(request, sent.model):
            form = ChatForm(door.session.codec, sent.model, "chatcmpl", logprobs=sent.logprobs)
            return await door.reply(sent.requests(), form, sent)

    @app.post("/v1/completions", openapi_extra=_takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        sent = CompletionRequest.model_validate(await door.body(request))
        codec = door.session.codec

        def encoded() -> list[list[int]]:
            return [codec.encode(each, "plain") if isinstance(each, str) else each for each in sent.prompts()]

        async with door.admitted(request, sent.model):
            if any(isinstance(each, str) for each in sent.prompts()):
                door.tell_form(sent.model)
            prompts = await asyncio.to_thread(encoded)
            if not all(prompts):
                raise RefusalError(400, "a prompt is empty; expected at least one token", param="prompt")
            form = CompletionForm(codec, sent.model, "cmpl", logprobs=sent.logprobs is not None)
            return await door.reply(sent.requests(prompts), form, sent)


def _add_adapters(app: FastAPI, door: Door) -> None:
    @app.post("/v1/load_lora_adapter", openapi_extra=_takes(LoadRequest))
    async def load(request: Request) -> Response:
        door.access.check_admin(request.headers.get("authorization"))
        sent = LoadRequest.model_validate(await door.body(request))
        await door.folder.load(sent.lora_name, sent.lora_path, replace=sent.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{sent.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", openapi_extra=_takes(UnloadRequest))
    async def unload(request: Request) -> Response:
        door.access.check_admin(request.headers.get("authorization"))
        sent = UnloadRequest.model_validate(await door.body(request))
        await asyncio.to_thread(door.session.remove_tenant, sent.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{sent.lora_name}' removed successfully.")


def _add_watching(app: FastAPI, door: Door) -> None:
    @app.get("/health")
    async def health() -> Response:
        state = door.session.state()
        problem = state.problem(door.stuck_after_s)
        found = {"status": state.status, "failure": state.failure or problem}
        return JSONResponse(found, status_code=503 if problem else 200)

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = door.session.state().status == "serving" and not door.is_draining
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(door.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": VERSION})

    @app.get("/state")
    async def state(request: Request) -> Response:
        allowed = door.access.tenants_of(request.headers.get("authorization"))
        found = dataclasses.asdict(door.session.state())
        found["tenants"] = {
            name: tenant for name, tenant in found["tenants"].items() if ALL in allowed or name in allowed
        }
        return JSONResponse(found)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_MAY})
