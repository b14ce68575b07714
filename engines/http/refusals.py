"""Errors as OpenAI's clients expect them: a status, and a body that says what is wrong, where, and in a word."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from iapt_export.contract.errors import IaptError, NotRunnableError

STATUS = {
    "tenant_not_found": 404,
    "queue_full": 429,
    "tenants_full": 503,
    "session_failed": 503,
    "session_closed": 503,
    "closed": 503,
    "generation_failed": 500,
}
"""An `IaptError`'s code to the status of the answer; 400 for all others."""
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
PARAMS = {
    "tenant": "model",
    "tokens": "prompt",
    "soft_prompts": "prompt",
    "max_new_tokens": "max_tokens",
    "grammar": "response_format",
}
"""A field of a session's request to that of the protocol, where they differ."""
RETRY_SECONDS = 1
"""What ``Retry-After`` says where the queue is full."""


class RefusalError(Exception):
    """A request that is not answered."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: bool = False
    ) -> None:
        """Say what is wrong.

        Args:
            status: of HTTP.
            message: for people.
            param: the field at fault.
            code: for programs.
            retry: whether the same request may be answered later.
        """
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = {"Retry-After": str(RETRY_SECONDS)} if retry else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def refusal_of(error: Exception) -> RefusalError:
    """What a client is told of an error; of a defect of ours only that there is one."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, ValidationError):
        return _wrong_fields(error)
    if not isinstance(error, IaptError):
        return RefusalError(500, "the server has a defect; its log says more", code="internal_error")
    status = STATUS.get(error.code, 400)
    code = {"tenant_not_found": "model_not_found"}.get(error.code, error.code)
    if error.code == "queue_full":
        return RefusalError(429, "too many requests are waiting; try again later", code=code, retry=True)
    text = str(error) if isinstance(error, NotRunnableError) else error.what
    text = re.sub(r"^request \d+ of ", "the request of ", text.replace("max_new_tokens", PARAMS["max_new_tokens"]))
    text = re.sub(r"^request \d+:? ", "", text)
    return RefusalError(status, text, param=PARAMS.get(error.field or "", error.field), code=code, retry=status == 503)


def _wrong_fields(error: ValidationError) -> RefusalError:
    """The first field that is wrong names ``param``; the message tells all of them."""
    found = []
    for problem in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
        unknown = problem["type"] == "extra_forbidden"
        found.append((name, "is not supported" if unknown else problem["msg"].removeprefix("Value error, ")))
    text = "; ".join(f"{name}: {problem}" if name else problem for name, problem in dict(found).items())
    first = found[0][0].split(".")[0]
    param, what = max((each for each in found if each[0].split(".")[0] == first), key=lambda each: len(each[0]))
    code = "unsupported_parameter" if what == "is not supported" else "invalid_value"
    return RefusalError(400, text[:2000], param=param or None, code=code)


def _is_branch(part: Any) -> bool:
    """Whether a part of a place names an alternative of a type, such as ``list[int]``, and no field."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
