"""An instruction as token ids, in the form in which training and serving feed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeGuard

from iapt_export.contract.errors import IaptError
from iapt_export.contract.prompt_format import PromptFormat, before_answer

Message = dict[str, str]
"""``{"role": ..., "content": ...}``"""
AskedFormat = Literal["auto", PromptFormat]
"""A format, or the one that fits tokenizer and data."""


def with_one_template(tokenizer: Any, name: str) -> Any:
    """A tokenizer whose chat template is the one for prompts; some have others besides, for tools or documents.

    Args:
        tokenizer: of transformers; changed.
        name: of the model, for the error's text.

    Raises:
        IaptError: it has several, and none of them is called ``default``.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict):
        if "default" not in templates:
            raise IaptError(
                f"the tokenizer of {name} has the chat templates {', '.join(sorted(templates))}, and none is called "
                "default; save one as its chat_template.jinja"
            )
        tokenizer.chat_template = templates["default"]
    return tokenizer


def resolve_prompt_format(tokenizer: Any, asked: AskedFormat, *, continues: bool) -> PromptFormat:
    """Turn ``auto`` into ``chat``, where there is a template, or into ``plain`` or ``newline``.

    Args:
        tokenizer: a transformers tokenizer.
        asked: what was asked for.
        continues: whether answers go on from their prompts as they are; others begin on a line of their own, as an
            answer right behind an instruction's last letter is no text that a model has read before.

    Raises:
        IaptError: ``chat`` was asked for and the tokenizer has no chat template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not has_template:
        text = "prompt_format=chat needs a tokenizer with a chat template; this one has none, use newline or plain"
        raise IaptError(text)
    if asked == "auto":
        return "chat" if has_template else "plain" if continues else "newline"
    return asked


def format_instruction(tokenizer: Any, text: str | Sequence[Message], prompt_format: str) -> list[int]:
    """Token ids of an instruction, exactly as training and serving feed them.

    Args:
        tokenizer: a transformers tokenizer.
        text: the user's text, or the messages before the answer.
        prompt_format: ``chat`` renders the chat template with the generation prompt and adds no further special
            tokens; the others tokenise the text with the tokenizer's own special tokens (a BOS, where it has one),
            ``newline`` with a line break behind it.

    Returns:
        Ids, without padding.

    Raises:
        IaptError: empty text, several messages in a format without a template, no ids at all, or a template that
            refuses the messages or cannot be rendered.
    """
    messages = [user_message(text)] if isinstance(text, str) else list(text)
    if not messages or not messages[-1]["content"].strip():
        raise IaptError("the prompt is empty; give the model something to read")
    if prompt_format == "chat":
        rendered = _rendered(tokenizer, messages)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    elif len(messages) > 1:
        raise IaptError(
            f"{len(messages)} messages need a chat template; in the {prompt_format} format give one user message"
        )
    else:
        ids = tokenizer(before_answer(messages[0]["content"], prompt_format))["input_ids"]
    if not ids:
        raise IaptError(f"the prompt {messages[-1]['content']!r} has no tokens; give the model something to read")
    return list(ids)


def _rendered(tokenizer: Any, messages: list[Message]) -> str:
    """What the tokenizer's chat template makes of messages; many refuse a system prompt, or two turns of one side."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise IaptError(
            f"the tokenizer's chat template does not render messages of {roles}: {error}; give messages that it takes, "
            "or prompt_format=plain for text as it is"
        ) from error


def user_message(content: str) -> Message:
    """A text as what a user says."""
    return {"role": "user", "content": content}


def padding_id(tokenizer: Any, vocab_size: int, *others: int | None) -> int:
    """An id that may fill short rows: padding is masked everywhere, so any that the table of embeddings has serves.

    Args:
        tokenizer: its ``pad_token_id`` and ``eos_token_id`` are tried; checkpoints exist whose pad lies outside.
        vocab_size: rows of the table.
        others: tried between the two.
    """
    pad, eos = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)
    return next((token for token in (pad, *others, eos) if is_token_id(token, vocab_size)), 0)


def is_token_id(token: Any, vocab_size: int) -> TypeGuard[int]:
    """Whether the table of embeddings has that row."""
    return token is not None and 0 <= token < vocab_size
