"""The client that most people have, openai's; LangChain's and LiteLLM's are in ``tests/doors/test_clients.py``."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from engines.serving.session import Request, Session
from tests.bundles import TinyBuild

pytest.importorskip("fastapi", reason="needs the extra serve")

from tests.engines.http.served import Served, in_thread

SAID: Any = [{"role": "user", "content": "the film is a quiet joy"}]
SETTINGS: Any = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(tiny_build: TinyBuild) -> Iterator[Served]:
    with in_thread(tiny_build.bundle) as served:
        yield served


@pytest.fixture(scope="module")
def wanted(server: Served) -> str:
    assert server.session is not None
    session: Session = server.session
    return next(iter(session.generate([Request("beta", SAID[0]["content"], max_new_tokens=8)]))).text


def library(name: str) -> Any:
    pytest.importorskip(name, reason=f"needs {name}, which is no dependency; docs/serving.md names the version")
    return importlib.import_module(name)


def test_openai(server: Served, wanted: str) -> None:
    openai = library("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["alpha", "beta", "gamma", "model"]
    made = client.chat.completions.create(model="beta", messages=SAID, logprobs=True, top_logprobs=2, **SETTINGS)
    assert made.choices[0].message.content == wanted and made.usage.completion_tokens <= 8
    assert len(made.choices[0].logprobs.content[0].top_logprobs) == 2
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="beta", messages=SAID, stream=True, stream_options=options, **SETTINGS)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert chunks[-1].usage == made.usage and chunks[-2].choices[0].finish_reason == made.choices[0].finish_reason
    completed = client.completions.create(model="alpha", prompt=["yes", "no"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in completed.choices] == [0, 1, 2, 3]
    with pytest.raises(openai.NotFoundError, match="there is no model 'delta'") as missing:
        client.chat.completions.create(model="delta", messages=SAID)
    assert missing.value.code == "model_not_found"
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="beta", messages=SAID, tools=[tool])
    assert refused.value.param == "tools"


def test_openai_with_many_tasks(server: Served, wanted: str) -> None:
    openai = library("openai")

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one() -> str:
                stream = await client.chat.completions.create(model="beta", messages=SAID, stream=True, **SETTINGS)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(30)))

    assert asyncio.run(everyone()) == [wanted] * 30
