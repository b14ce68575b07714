"""A request is fed as its tenant was trained: system prompt, earlier turns, and what is refused or said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engines.serving.admission import check_is_request
from engines.serving.conversation import check_text_fields, encode_request
from engines.serving.request import Request
from engines.serving.tenants import Tenant
from engines.serving.text import TextCodec
from iapt_export.contract.errors import IaptError
from tests.tiny import tiny_tokenizer
from trainers.decoder.instruction import format_instruction

SYSTEM = {"role": "system", "content": "Answer in one word."}
TURNS = (
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "a dull story"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tenant(system_prompt: str | None = None, prompt_format: str = "chat") -> Tenant:
    return Tenant("t", None, -1, 4, prompt_format, "IAPT", system_prompt)


@pytest.mark.parametrize(
    ("request_", "trained", "fed"),
    [
        (Request("t", "the film"), SYSTEM["content"], [SYSTEM, TURNS[0]]),
        (Request("t", "the film"), None, [TURNS[0]]),
        (Request("t", "the film"), "", [TURNS[0]]),
        (Request("t", "the film", system=""), SYSTEM["content"], [TURNS[0]]),
        (Request("t", "the film", system=SYSTEM["content"]), "another", [SYSTEM, TURNS[0]]),
        (Request("t", messages=TURNS), SYSTEM["content"], [SYSTEM, *TURNS]),
        (Request("t", messages=TURNS, system=""), SYSTEM["content"], [*TURNS]),
        (Request("t", messages=[SYSTEM, *TURNS]), "another", [SYSTEM, *TURNS]),
        (Request("t", messages=[SYSTEM, *TURNS]), None, [SYSTEM, *TURNS]),
    ],
)
def test_a_chat_tenant_reads_what_transformers_renders(
    folder: Path, request_: Request, trained: str | None, fed: list[dict[str, str]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = encode_request("request 0", request_, tenant(trained), TextCodec(folder))
    assert ids == tokenizer.apply_chat_template(fed, add_generation_prompt=True, return_dict=False)
    assert ids == format_instruction(tokenizer, fed, "chat")


def test_another_form_than_trainings_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    codec, one, unknown = TextCodec(folder), tenant("Be kind."), tenant(None)
    with caplog.at_level(logging.WARNING):
        encode_request("request 0", Request("t", "yes"), one, codec)
        encode_request("request 1", Request("t", "yes", system="Be rude."), unknown, codec)
        assert not caplog.messages
        for number in (2, 3):
            encode_request(f"request {number}", Request("t", "yes", system="Be rude."), one, codec)
    assert caplog.messages == [
        "tenant t was trained with the system prompt 'Be kind.', request 2 has the system prompt 'Be rude.'; its "
        "answers may be worse"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        encode_request("request 4", Request("t", messages=[SYSTEM, *TURNS]), tenant(""), codec)
        encode_request("request 5", Request("t", "yes", system=""), tenant("Be kind."), codec)
    assert "trained with no system prompt, request 4 has the system prompt 'Answer" in caplog.messages[0]
    assert "trained with the system prompt 'Be kind.', request 5 has no system prompt" in caplog.messages[1]


@pytest.mark.parametrize("prompt_format", ["plain", "newline"])
def test_a_tenant_without_a_template_takes_one_text(folder: Path, prompt_format: str) -> None:
    codec, plain = TextCodec(folder), tenant(prompt_format=prompt_format)
    expected = codec.encode("the film\n" if prompt_format == "newline" else "the film", "plain")
    assert encode_request("request 0", Request("t", "the film"), plain, codec) == expected
    assert encode_request("request 0", Request("t", messages=TURNS[:1]), plain, codec) == expected
    for request in (Request("t", messages=TURNS), Request("t", "the film", system="Be kind.")):
        with pytest.raises(IaptError, match="request 0: tenant t was trained on plain text, without system prompt or"):
            encode_request("request 0", request, plain, codec)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"messages": TURNS[:2]}, "request 0: the last message is the assistant's; expected the user's"),
        ({"messages": [SYSTEM]}, "request 0: the last message is the system's; expected the user's"),
        ({"messages": [SYSTEM, TURNS[0]], "system": "x"}, "a system prompt is given twice, as system and as first mes"),
        ({"messages": ["hello"]}, "message 0 is str, expected an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 0 has role 'tool', expected system, user, assista"),
        ({"messages": [{"role": "user"}]}, "message 0 has content None, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"message 0 has content \[\{'type': 'text'"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 0 has content ' ', expected text"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "message 0 has tool_calls, expected role and content alone",
        ),
    ],
)
def test_what_is_no_conversation(folder: Path, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(IaptError, match=text):
        encode_request("request 0", Request("t", **fields), tenant(), TextCodec(folder))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "x", "tokens": (1,)}, "request 0: prompt and tokens are given; expected one of them"),
        ({"prompt": "x", "messages": TURNS}, "request 0: prompt and messages are given; expected one of them"),
        ({"messages": TURNS[0]}, "request 0: messages is dict, expected a list of messages"),
        ({"messages": "hello"}, "request 0: messages is str, expected a list of messages"),
        ({"tokens": (1,), "system": "x"}, "request 0: system is 'x', expected text, beside a prompt or messages"),
        ({"prompt": "x", "system": 3}, "request 0: system is 3, expected text, beside a prompt or messages"),
    ],
)
def test_what_says_twice_what_to_read(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(IaptError, match=text):
        check_text_fields("request 0", Request("t", **fields))


DEEP: Any = []
for _ in range(2000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tenant": 3}, "request 0: tenant is int, expected text"),
        ({"prompt": None}, "request 0: prompt is NoneType, expected text"),
        ({"prompt": b"yes"}, "request 0: prompt is bytes, expected text"),
        ({"prompt": DEEP}, "request 0: prompt is list, expected text"),
        ({"prompt": ["a", "b"]}, 'it is one instruction: [Request(tenant="NAME", prompt="TEXT") for TEXT in TEXTS]'),
        (
            {"tenant": "the film"},
            "tenant is 'the film' and prompt ''; expected Request(tenant=\"NAME\", prompt=\"TEXT\")",
        ),
        ({"tenant": "the film", "prompt": "t"}, "tenant is 'the film' and prompt 't'; expected Request(tenant="),
        ({"tokens": 5}, "request 0: tokens is int, expected a list of token ids"),
        ({"tokens": "567"}, "request 0: tokens is str, expected a list of token ids"),
        ({"tokens": {5: 6}}, "request 0: tokens is dict, expected a list of token ids"),
        ({"messages": 5}, "request 0: messages is int, expected a list of messages"),
        ({"prompt": "yes", "system": 3}, "request 0: system is 3, expected text, beside a prompt or messages"),
        ({"prompt": "yes \ud800"}, "request 0: the text has a broken character at place 4; expected Unicode"),
        ({"prompt": "yes", "system": "\udc00"}, "request 0: the text has a broken character at place 0"),
    ],
)
def test_fields_of_other_types_are_refused(fields: dict[str, Any], text: str) -> None:
    request = Request(**{"tenant": "t", **fields})

    def check() -> None:
        check_is_request(request, "request 0", ["t"])
        check_text_fields("request 0", request)

    with pytest.raises(IaptError) as caught:
        check()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": [], "content": "a"}, "message 0 has role [], expected system, user, assistant"),
        ({"role": "user", "content": float("nan")}, "message 0 has content nan, expected text"),
        ({"role": "user", "content": "a\ud800"}, "the text has a broken character at place 1"),
        ({("a",): 1, "role": "user", "content": "a"}, "message 0 has ('a',), expected role and content alone"),
    ],
)
def test_messages_of_other_types_are_refused(folder: Path, message: Any, text: str) -> None:
    with pytest.raises(IaptError) as caught:
        encode_request("request 0", Request("t", messages=[message]), tenant(), TextCodec(folder))
    assert text in str(caught.value)
