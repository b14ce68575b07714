"""A request's text as the tenant's training had it: the system prompt it was trained with, and earlier turns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from engines.serving.request import Request
from engines.serving.tenants import Tenant
from engines.serving.text import TextCodec
from iapt_export.contract.errors import IaptError, shown

ROLES = ("system", "user", "assistant")
"""Who may speak: those that training data may name."""

_log = logging.getLogger(__name__)


def encode_request(where: str, request: Request, tenant: Tenant, codec: TextCodec) -> list[int]:
    """Token ids of a request's text; a form that is not training's is said once for each tenant, as a log warning.

    Raises:
        IaptError: the request is empty, is no conversation, or has one for a tenant that reads text without a template.
    """
    messages = conversation(where, request, tenant.system_prompt)
    if tenant.prompt_format != "chat":
        if len(messages) > 1:
            raise IaptError(
                f"{where}: tenant {tenant.name} was trained on plain text, without system prompt or earlier turns; "
                "give it one prompt",
                field="messages" if request.messages else "system",
            )
        return codec.encode(messages[0]["content"], tenant.prompt_format)
    given = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tenant.system_prompt is not None and given != tenant.system_prompt and not tenant.told:
        tenant.told = True
        _log.warning(
            "tenant %s was trained with %s, %s has %s; its answers may be worse",
            tenant.name,
            _named(tenant.system_prompt),
            where,
            _named(given),
        )
    return codec.encode(messages, "chat")


def conversation(where: str, request: Request, trained_system: str | None) -> list[dict[str, str]]:
    """The messages that the chat template gets.

    Args:
        where: names the request in errors.
        request: its ``prompt`` or ``messages``; its ``system`` prompt comes first, or the trained one where it is None.
        trained_system: the tenant's; None where its training had none for all examples, or did not say.

    Raises:
        IaptError: what comes is no conversation that ends with the user's words.
    """
    if not request.messages:
        messages = [{"role": "user", "content": request.prompt}]
    else:
        problems = [problem for index, message in enumerate(request.messages) for problem in _problems(index, message)]
        if problems:
            raise IaptError(f"{where}: " + "; ".join(problems), field="messages")
        messages = [{"role": message["role"], "content": message["content"]} for message in request.messages]
        for message in messages:
            _check_characters(where, "messages", message["content"])
        if messages[-1]["role"] != "user":
            text = f"{where}: the last message is the {messages[-1]['role']}'s; expected the user's"
            raise IaptError(text, field="messages")
    if messages[0]["role"] == "system":
        if request.system is not None:
            text = f"{where}: a system prompt is given twice, as system and as first message; give one"
            raise IaptError(text, field="system")
        return messages
    system = trained_system if request.system is None else request.system
    return [{"role": "system", "content": system}, *messages] if system else messages


def _problems(index: int, message: Any) -> list[str]:
    """What keeps a message from being read; fields that would be dropped are refused."""
    if not isinstance(message, Mapping):
        return [f"message {index} is {type(message).__name__}, expected an object with role and content"]
    problems = []
    if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
        problems.append(f"message {index} has role {shown(message.get('role'))}, expected {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        problems.append(f"message {index} has content {shown(content)}, expected text")
    strange = sorted(str(key) for key in message if key not in ("role", "content"))
    if strange:
        problems.append(f"message {index} has {', '.join(strange)}, expected role and content alone")
    return problems


def _named(system: str) -> str:
    return f"the system prompt {system!r}" if system else "no system prompt"


def check_text_fields(where: str, request: Request) -> None:
    """Refuse a request that says what to read twice, or in a form that is none.

    Raises:
        IaptError: what was expected, and what came.
    """
    if isinstance(request.tokens, str | bytes | Mapping) or not hasattr(request.tokens, "__len__"):
        text = f"{where}: tokens is {type(request.tokens).__name__}, expected a list of token ids"
        raise IaptError(text, field="tokens")
    if isinstance(request.messages, str | Mapping) or not isinstance(request.messages, Sequence):
        text = f"{where}: messages is {type(request.messages).__name__}, expected a list of messages"
        raise IaptError(text, field="messages")
    given = [name for name in ("prompt", "messages", "tokens") if len(getattr(request, name))]
    if len(given) > 1:
        raise IaptError(f"{where}: {' and '.join(given)} are given; expected one of them", field=given[1])
    if request.system is not None and (given == ["tokens"] or not isinstance(request.system, str)):
        text = f"{where}: system is {shown(request.system)}, expected text, beside a prompt or messages"
        raise IaptError(text, field="system")
    _check_characters(where, "prompt", request.prompt)
    _check_characters(where, "system", request.system or "")


def _check_characters(where: str, field: str, text: str) -> None:
    """Refuse halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"{where}: the text has a broken character at place {error.start}; expected Unicode"
        raise IaptError(what, field=field) from None
