"""How a prompt's text stands before the model: an adapter and its manifest say it, training and serving follow."""

from __future__ import annotations

from typing import Literal, get_args

PromptFormat = Literal["chat", "plain", "newline"]
"""``chat``: one user message in the tokenizer's chat template; ``plain``: text as it is, which the answer goes on from;
``newline``: the text and a line break, behind which the answer begins."""
PROMPT_FORMATS: tuple[str, ...] = get_args(PromptFormat)
HOW = {
    "chat": "prompts in the tokenizer's chat template",
    "plain": "prompts as they are",
    "newline": "a line break behind each prompt",
}
"""The formats in words."""
ONE_OF = ", ".join(PROMPT_FORMATS[:-1]) + " or " + PROMPT_FORMATS[-1]


def before_answer(text: str, prompt_format: str) -> str:
    """A text of a format without a template, up to where its answer begins."""
    return f"{text}\n" if prompt_format == "newline" else text
