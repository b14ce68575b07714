"""What clients get over HTTP: the session's own tokens, OpenAI's shapes, and a refusal for what is not supported."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.serving.session import Request, Session
from tests.bundles import TENANTS, TinyBuild

pytest.importorskip("fastapi", reason="needs the extra serve")

from engines.serving.text import TextCodec
from tests.engines.http.served import CHAT, TEXT, Served, events, in_process, in_thread
from tests.native.tokenizers_of import SPECIAL, byte_level, gemma, save

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_build: TinyBuild) -> Iterator[Served]:
    with in_process(tiny_build.bundle, "--max-waiting", "300") as served:
        yield served


@pytest.fixture(scope="module")
def session(tiny_build: TinyBuild) -> Iterator[Session]:
    with Session.open(tiny_build.bundle, verify=False, threads=1) as session:
        yield session


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_200_streams_equal_the_session_token_by_token(server: Served, session: Session) -> None:
    bodies = [
        {"model": ("model", *TENANTS)[n % 4], "prompt": [5 + n % 50, 7 + n % 31], "max_tokens": 5 + n % 20, **GREEDY}
        for n in range(200)
    ]
    asked = [
        Request(body["model"], tokens=tuple(body["prompt"]), max_new_tokens=body["max_tokens"], ignore_eos=True)
        for body in bodies
    ]
    wanted = list(session.generate(asked))

    def one(body: Any) -> tuple[str, list[str], str]:
        found = events(server.ask(TEXT, {**body, "stream": True, "logprobs": 0})[1])
        assert found.pop() == "[DONE]"
        choices = [event["choices"][0] for event in found]
        names = [name for choice in choices if choice["logprobs"] for name in choice["logprobs"]["tokens"]]
        return "".join(choice["text"] for choice in choices), names, choices[-1]["finish_reason"]

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(one, bodies))
    for (text, names, reason), answer in zip(answers, wanted, strict=True):
        assert text == answer.text and reason == "length"
        assert names == [session.codec.decode([token], special=True) for token in answer.tokens]


def test_a_conversation_is_that_of_the_session(server: Served, session: Session) -> None:
    messages = [{"role": "system", "content": "be brief"}, *said("the film"), {"role": "assistant", "content": "yes"}]
    messages += [{"role": "user", "content": [{"type": "text", "text": "a dull "}, {"type": "text", "text": "story"}]}]
    body = {"model": "beta", "messages": messages, "max_tokens": 9, **GREEDY}
    plain = [*messages[:3], {"role": "user", "content": "a dull story"}]
    (wanted,) = session.generate([Request("beta", messages=plain, max_new_tokens=9, ignore_eos=True)])
    status, found, _ = server.ask(CHAT, body)
    assert status == 200 and found["choices"][0]["message"]["content"] == wanted.text
    assert found["usage"]["completion_tokens"] == 9
    streamed = events(server.ask(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})[1])
    deltas = [event["choices"][0]["delta"] for event in streamed[:-2]]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == wanted.text
    assert streamed[-2]["usage"] == found["usage"] and streamed[-1] == "[DONE]"


def test_text_without_the_template_that_training_had_is_said_once(
    tiny_build: TinyBuild, caplog: pytest.LogCaptureFixture
) -> None:
    """``beta`` was trained with a chat template, ``alpha`` with a line break; token ids and the backbone have none."""
    with in_thread(tiny_build.bundle) as served, caplog.at_level(logging.WARNING):
        for model, prompt in (("gamma", "a film"), ("model", "a film"), ("beta", [5, 6])):
            assert served.ask(TEXT, {"model": model, "prompt": prompt, "max_tokens": 1})[0] == 200
        assert served.ask(CHAT, {"model": "beta", "messages": said("a film"), "max_tokens": 1})[0] == 200
        assert caplog.messages == []
        for _ in range(2):
            assert served.ask(TEXT, {"model": "beta", "prompt": ["a film"], "max_tokens": 1})[0] == 200
            assert served.ask(TEXT, {"model": "alpha", "prompt": ["a film"], "max_tokens": 1})[0] == 200
    told = "; /v1/completions sends text as it is; its answers may be worse than those of /v1/chat/completions"
    assert caplog.messages == [
        f"tenant beta was trained with prompts in the tokenizer's chat template{told}",
        f"tenant alpha was trained with a line break behind each prompt{told}",
    ]


def test_several_answers_to_several_prompts(server: Served) -> None:
    body = {"model": "alpha", "prompt": ["yes", "the film"], "n": 2, "max_tokens": 6, "seed": 3, "ignore_eos": True}
    choices = server.ask(TEXT, body)[1]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] != choices[1]["text"], "each answer draws its own numbers"
    assert server.ask(TEXT, body)[1]["choices"] == choices, "the same seed draws the same"
    streamed = events(server.ask(TEXT, {**body, "stream": True})[1])[:-1]
    texts = ["".join(e["choices"][0]["text"] for e in streamed if e["choices"][0]["index"] == n) for n in range(4)]
    assert texts == [choice["text"] for choice in choices]


def test_log_probabilities(server: Served) -> None:
    body = {"model": "alpha", "messages": said("yes"), "max_tokens": 4, "logprobs": True, "top_logprobs": 3, **GREEDY}
    content = server.ask(CHAT, body)[1]["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for each in content:
        assert len(each["top_logprobs"]) == 3 and each["logprob"] == each["top_logprobs"][0]["logprob"] < 0
        assert sum(math.exp(top["logprob"]) for top in each["top_logprobs"]) < 1


def test_tokens_of_the_same_text_keep_their_log_probabilities(server: Served) -> None:
    """Most of the tiny vocabulary is halves of characters, which all read the same."""
    found = server.ask(TEXT, {"model": "alpha", "prompt": "yes", "max_tokens": 3, "logprobs": 20, **GREEDY})[1]
    for likeliest in found["choices"][0]["logprobs"]["top_logprobs"]:
        assert len(likeliest) == 20 and any(re.fullmatch(r"token_id:\d+", name) for name in likeliest)
        assert list(likeliest.values()) == sorted(likeliest.values(), reverse=True)


def test_log_probabilities_tell_where_tokens_stand_and_what_bytes_they_are(server: Served) -> None:
    """Also while text waits for what may be a stop text, and of half characters."""
    asked = {"model": "alpha", "prompt": "yes", "max_tokens": 40, "logprobs": 1, "temperature": 2, "seed": 3}
    (plain,) = server.ask(TEXT, asked)[1]["choices"]
    starts = sorted({plain["text"][place : place + 3] for place in range(5, 20)})
    (held,) = server.ask(TEXT, {**asked, "stop": [f"{start}never" for start in starts[:4]]})[1]["choices"]
    assert held["text"] == plain["text"] and held["logprobs"] == plain["logprobs"]
    offsets, pieces = plain["logprobs"]["text_offset"], plain["logprobs"]["tokens"]
    for offset, piece in zip(offsets, pieces, strict=True):
        assert "\ufffd" in piece or piece in SPECIAL or plain["text"][offset:].startswith(piece)
    assert offsets == sorted(offsets) and len(set(offsets)) > 10
    likeliest = plain["logprobs"]["top_logprobs"]
    chosen = plain["logprobs"]["token_logprobs"]
    assert all(value in each.values() for each, value in zip(likeliest, chosen, strict=True))
    assert 2 in {len(each) for each in likeliest} <= {1, 2}, "the likeliest, and the chosen one where it is another"
    (alone,) = server.ask(TEXT, {**asked, "logprobs": 0})[1]["choices"]
    assert [list(each.values()) for each in alone["logprobs"]["top_logprobs"]] == [
        [value] for value in alone["logprobs"]["token_logprobs"]
    ]
    body = {**asked, "messages": said("yes"), "logprobs": True}
    del body["prompt"]
    (chat,) = server.ask(CHAT, body)[1]["choices"]
    content = chat["logprobs"]["content"]
    assert any("\ufffd" in each["token"] for each in content) and all(each["bytes"] for each in content)
    said_bytes = bytes(byte for each in content if each["token"] not in SPECIAL for byte in each["bytes"])
    assert said_bytes.decode(errors="replace") == chat["message"]["content"]


@pytest.mark.parametrize("make", [byte_level, gemma])
def test_bytes_of_tokens(make: Any, tmp_path: Path) -> None:
    save(tmp_path, make())
    codec = TextCodec(tmp_path)
    for text in ("é 日本 🫨🫨", "film 𠮷"):
        ids = codec.encode(f"x{text}", "plain")
        found = [codec.bytes_of(each) for each in ids]
        assert None not in found
        assert b"".join(each for each in found if each).decode().endswith(text)


def test_answers_of_a_form(server: Served) -> None:
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    body = {"model": "alpha", "messages": said("yes"), "response_format": form, "max_tokens": 40}
    found = server.ask(CHAT, body)[1]["choices"][0]
    assert json.loads(found["message"]["content"])["a"] in (1, 2) and found["finish_reason"] == "stop"


def test_a_grammar_that_grows_too_large_is_the_clients_and_no_answer(server: Served) -> None:
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a{1000}){1000}$"}}}
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": {**schema, "required": ["a"]}}}
    body = {"model": "alpha", "messages": said("yes"), "response_format": form, "max_tokens": 40, "temperature": 0}
    status, found, _ = server.ask(CHAT, body)
    assert status == 400 and found["error"]["param"] == "response_format"
    assert found["error"]["message"].startswith("the request of tenant alpha failed: the answer's grammar: lexer error")
    assert server.ask(CHAT, {**body, "stream": True})[:2] == (400, found)


def test_models_and_watching(server: Served) -> None:
    assert [model["id"] for model in server.ask("/v1/models")[1]["data"]] == [*TENANTS, "model"]
    assert server.ask("/v1/models/beta")[1]["parent"] == "model"
    assert server.ask("/v1/models/delta")[0] == 404
    assert server.ask("/health")[0] == server.ask("/ready")[0] == 200
    assert server.ask("/version")[1]["version"]
    assert server.ask("/openapi.json")[1]["paths"].keys() >= {CHAT, TEXT, "/v1/models"}
    before = server.state()["tenants"].get("gamma", {"generated_tokens": 0})["generated_tokens"]
    server.ask(TEXT, {"model": "gamma", "prompt": "yes", "max_tokens": 7, **GREEDY})
    assert server.state()["tenants"]["gamma"]["generated_tokens"] == before + 7
    server.ask(TEXT, {"model": "unheard of", "prompt": "yes"})
    text = server.ask("/metrics")[1]
    for name in ("num_requests_running", "num_requests_waiting", "time_to_first_token_seconds_count"):
        assert f'vllm:{name}{{model_name="gamma"}}' in text
    for name in ("inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert f'vllm:{name}_bucket{{le="+Inf",model_name="gamma"}}' in text
    assert f'vllm:generation_tokens_total{{model_name="gamma"}} {before + 7:.1f}' in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="gamma"}' in text
    assert "vllm:kv_cache_usage_perc" in text and "vllm:lora_requests_info" in text and "unheard of" not in text


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "delta"}, 404, "model", "model_not_found"),
        ({"model": "../alpha"}, 404, "model", "model_not_found"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"audio": {}}, 400, "audio", "unsupported_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, 400, "messages.0.name", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content.0.image_url",
            None,
        ),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "invalid"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages", "invalid"),
        ({"messages": [{"role": "system", "content": "x"}, *said("y")]}, 400, "messages", "invalid"),
        ({"messages": said("a " * 200)}, 400, "messages", "context_length_exceeded"),
        ({"temperature": 2.5}, 400, "temperature", "invalid_value"),
        ({"temperature": "1"}, 400, "temperature", "invalid_value"),
        ({"max_tokens": 1000}, 400, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 10**30}, 400, "max_tokens", "invalid"),
        ({"min_tokens": 4}, 400, "min_tokens", "invalid"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "invalid_value"),
        ({"logit_bias": {"9999": 1}}, 400, "logit_bias", None),
        ({"logit_bias": {"7": 1, "07": -1}}, 400, "logit_bias", "invalid_value"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
        ({"n": 65}, 400, "n", "invalid_value"),
        ({"stop": ["a" * 20_000, "b" * 20_000]}, 400, "stop", None),
        ({"stop": ""}, 400, "stop", None),
        ({"stop_token_ids": [5] * 65}, 400, "stop_token_ids", None),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "invalid_value"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ],
)
def test_what_is_not_supported_is_refused_with_its_name(
    server: Served, changes: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    found = server.ask(CHAT, {"model": "alpha", "messages": said("yes"), "max_tokens": 3, **changes})
    error = found[1]["error"]
    assert found[0] == status, error
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert error["message"] and not re.search("--|max_new_tokens|Traceback", error["message"])


def test_fields_that_ask_for_nothing_are_taken(server: Served) -> None:
    nothing = {"tools": None, "tool_choice": "none", "user": "me", "metadata": {"a": "b"}, "store": False, "n": 1}
    schema = {"name": "one", "description": None, "schema": {"enum": ["yes"]}, "strict": None}
    nothing["response_format"] = {"type": "json_schema", "json_schema": schema}
    nothing["messages"] = [{"role": "user", "content": "yes", "name": None}]
    nothing |= {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}}
    assert events(server.ask(CHAT, {"model": "alpha", "max_tokens": 9, **nothing})[1])[-1] == "[DONE]"
    nothing = {"tools": None, "stream_options": None, "response_format": {"type": "text", "json_schema": None}}
    status, found, _ = server.ask(CHAT, {"model": "alpha", "messages": said("yes"), "max_tokens": 3, **nothing})
    assert status == 200 and found["choices"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "alpha", "prompt": "\xff"}', 400),
        (b'{"model": "alpha", "prompt": "\\ud800"}', 400),
        (b'{"model": "alpha", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "alpha", "prompt": "x", "temperature": 0, "temperature": 1}', 400),
        (b'{"model": "alpha", "prompt": "x", "top_p": 1e999}', 400),
        (b'{"model": "alpha", "prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", 400),
        (b'{"model": "alpha", "prompt": ""}', 400),
        (b'{"model": "alpha", "prompt": [[]]}', 400),
        (b'{"model": "alpha", "prompt": [99999]}', 400),
        (b'{"model": "alpha", "prompt": [true]}', 400),
        (b'{"prompt": "x"}', 400),
        (b" " * (5 << 20), 413),
    ],
)
def test_bodies_that_are_none(server: Served, body: bytes, status: int) -> None:
    found = server.ask(TEXT, body)
    assert found[0] == status and set(found[1]["error"]) == {"message", "type", "param", "code"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = (
    "messages prompt max_tokens temperature top_p top_k min_p n seed stop stop_token_ids stream stream_options "
    "logprobs presence_penalty repetition_penalty logit_bias min_tokens ignore_eos response_format priority user tools"
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, TEXT]),
    fields=st.dictionaries(st.sampled_from(NAMES.split()), VALUES, max_size=4),
    is_sound=st.booleans(),
)
def test_no_body_is_a_fault_of_the_server(server: Served, path: str, fields: dict[str, Any], is_sound: bool) -> None:
    content: dict[str, Any] = {"messages": said("a")} if path == CHAT else {"prompt": "a"}
    body = {**({"model": "alpha", "max_tokens": 2, **content} if is_sound else {}), **fields}
    status, found, _ = server.ask(path, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert status in (200, 400, 404), found
    if status != 200:
        assert found["error"]["message"]


def test_an_unknown_path_and_method(server: Served) -> None:
    assert server.ask("/v1/nothing")[0] == 404 and server.ask(CHAT)[0] == 405
    assert server.ask(CHAT)[1]["error"]["code"] == "method_not_allowed"
    assert server.ask("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a"})[0] == 404, "off by default"


def test_curl(server: Served) -> None:
    if not (curl := shutil.which("curl")):
        pytest.skip("needs curl")
    body = json.dumps({"model": "alpha", "messages": said("yes"), "stream": True, "max_tokens": 5, **GREEDY})
    command = [curl, "-sN", server.url + CHAT, "-H", "content-type: application/json", "-d", body]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert events(answer)[-1] == "[DONE]"
