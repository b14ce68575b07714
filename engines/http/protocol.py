"""What clients send, as OpenAI's and vLLM's protocols have it, and the session's requests that it stands for.

Nothing is dropped in silence: a field that is not named here is refused with its name. ``null`` means what leaving a
field out means.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from engines.http.refusals import RefusalError
from engines.serving.grammar import Grammar
from engines.serving.request import Request
from engines.serving.sampling import Sampling
from iapt_export.contract.schema import parse_json

MAX_CHOICES = 64
"""Answers to one call: prompts times ``n``."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that are not supported, and the values that ask for nothing, with which they are taken."""
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


def _wrong(param: str, text: str) -> RefusalError:
    """What fields say together, which pydantic would tell without a name."""
    return RefusalError(400, text, param=param, code="invalid_value")


class StreamOptions(_Strict):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(_Strict):
    """A schema with its name."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to that alone")
        return self

    def grammar(self) -> Grammar | None:
        """What the session takes."""
        if self.json_schema is not None:
            return Grammar(json_schema=self.json_schema.schema_)
        return Grammar(json_object=True) if self.type == "json_object" else None


class _Generating(_Strict):
    """What both endpoints take."""

    model: str = Field(max_length=256)
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: Number = Field(0.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stop_token_ids: list[TokenId] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    repetition_penalty: Number = Field(1.0, gt=0)
    logit_bias: dict[str, Number] = Field({}, max_length=1024)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    priority: int = 0
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @field_validator("logit_bias")
    @classmethod
    def _biased_ids(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(re.fullmatch("0|[1-9][0-9]{0,8}", key) for key in value):
            raise ValueError("expected token ids as keys")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Generating:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "stream_options is only for stream=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self, choice: int, seed: int) -> dict[str, Any]:
        """Fields of the session's request for one of the answers."""
        return {
            "sampling": Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                seed=(seed + choice) % 2**63,
                top_k=max(self.top_k, 0),
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias={int(key): value for key, value in self.logit_bias.items()},
            ),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids),
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "grammar": None if self.response_format is None else self.response_format.grammar(),
            "priority": self.priority,
        }

    def first_seed(self) -> int:
        """The one that was sent, or any."""
        return secrets.randbits(48) if self.seed is None else self.seed


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As the session takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generating):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _wrong("top_logprobs", "top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _wrong("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        return self

    def requests(self) -> list[Request]:
        """One for each answer."""
        seed = self.first_seed()
        return [
            Request(
                self.model,
                messages=[message.plain() for message in self.messages],
                max_new_tokens=self.max_completion_tokens or self.max_tokens,
                logprobs=self.top_logprobs if self.logprobs else None,
                **self.settings(choice, seed),
            )
            for choice in range(self.n)
        ]


class CompletionRequest(_Generating):
    """``POST /v1/completions``."""

    prompt: Any
    """Text, texts, token ids, or lists of token ids."""
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("prompt")
    @classmethod
    def _is_prompt(cls, value: Any) -> Any:
        lists = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        texts = isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
        if not texts and not all(isinstance(each, list) and all(type(id_) is int for id_ in each) for each in lists):
            raise ValueError("expected text, a list of texts, token ids, or lists of token ids")
        return value

    @model_validator(mode="after")
    def _is_no_crowd(self) -> CompletionRequest:
        if not self.prompts() or len(self.prompts()) * self.n > MAX_CHOICES:
            raise _wrong("prompt", f"expected 1 to {MAX_CHOICES} answers, found {len(self.prompts()) * self.n}")
        return self

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def requests(self, prompts: Sequence[Sequence[int]]) -> list[Request]:
        """One for each answer, prompt after prompt, whose token ids these are."""
        seed = self.first_seed()
        return [
            Request(
                self.model,
                tokens=tuple(tokens),
                max_new_tokens=self.max_tokens,
                logprobs=self.logprobs,
                **self.settings(choice, seed),
            )
            for tokens in prompts
            for choice in range(self.n)
        ]


class LoadRequest(_Strict):
    """``POST /v1/load_lora_adapter``."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=1024)
    load_inplace: bool = False


class UnloadRequest(_Strict):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None


def read_body(body: bytes) -> dict[str, Any]:
    """A request's JSON without what asks for nothing.

    Raises:
        RefusalError: it is no JSON object.
    """
    try:
        content = parse_json(body)
    except ValueError as error:
        raise RefusalError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise RefusalError(400, "the body is no JSON object", code="invalid_json")
    return {name: value for name, value in content.items() if not any(value == one for one in NEUTRAL.get(name, ()))}
