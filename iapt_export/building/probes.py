"""Make a bundle's probes: what transformers makes of texts, conversations and ids, for other readers to compare with.

They cover what tokenizers are seen to differ in: normal forms, spaces at the ends and in rows, letters outside the
vocabulary, special tokens inside a text, bytes that are no whole letter, line ends, what templates trim and refuse.
"""

from __future__ import annotations

import random
from typing import Any

from jinja2 import TemplateError

from iapt_export.contract.probes import AnswerProbe, ChatProbe, Probes, TextProbe

DATE = "05 Jan 2026"
"""What templates are told, so that a bundle's bytes do not depend on the day."""
FIXED_DATE = f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro %}}\n"
"""In front of a template; the line end goes with the tag, as transformers sets ``trim_blocks``."""
TEXTS = (
    "The film is a quiet joy.",
    " a space in front",
    "spaces behind  ",
    "  two   in  rows    of spaces",
    "\ttabs\tand\n\nlines\r\nof both kinds\r",
    "\n a line first",
    "don't, I'LL, we've, it's 'quoted' and \"quoted\"",
    "1234567890 3.14159 1,000,000 ½ ² x2y3",
    "snake_case camelCase HTTPServer a+b==c; // comment",
    "(brackets) [of] {all} <kinds> @home #tag $5 50% ~/path?q=1&r=2...!!! --- ***",
    "naïve café, Straße, İstanbul, ΑΒΓ ς σ, Œuvre ﬁn",
    "decomposed: cafe\u0301, n\u0303, A\u030a, \u1112\u1161\u11ab",
    "compatibility: \ufb01 \u2460 \uff21\uff22\uff23 \u2126 \u212b \u1e9b\u0323",
    "日本語のテキスト、中文文本。한국어 문장",
    "Привет, мир! नमस्ते दुनिया สวัสดีชาวโลก שלום مرحبا",
    "🙂👩‍👩‍👧🏽 🇩🇪 ✈️ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \ue000\U000f0000",
    "\u00a0no\u00a0break \u200bzero\u200bwidth \ufeffmark \u2028line \u3000wide\u2003em",
    "\x01\x07\x7f\x85 control",
    "▁metaspace▁ Ġbyte Ċ ##piece </w>",
    "a" * 120,
    "x",
    "é",
    "😀",
    "UPPER lower Title",
    "a  1   22\n\n3\n 4\t\t5 \u0663  \u0664",
    "a  \x85\x85 b \x0b\x0c \x1c c",
    "\u0870's \ua7c0's \U0001e7e0's",
)
SYSTEM = {"role": "system", "content": "Answer in one word."}
CHATS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Is this review positive or negative?\n\nA film to remember."},),
    ({"role": "user", "content": "  spaces at both ends\n"},),
    ({"role": "user", "content": "naïve café, 日本語, 🙂 and cafe\u0301"},),
    ({"role": "user", "content": "{{ messages }} {% if x %} {# y #} \"quotes\" 'too' \\n \\"},),
    ({"role": "user", "content": "<think>\nno\n</think>\n\nWell?"},),
    (SYSTEM, {"role": "user", "content": "A dull story."}),
    ({"role": "system", "content": " Be short,\nünd kind. "}, {"role": "user", "content": "Hello"}),
    (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "Who are you?"},
    ),
    (
        SYSTEM,
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2 "},
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": " 4\n"},
        {"role": "user", "content": "½ + ½"},
    ),
    (
        {"role": "system", "content": "Réponds à l'été, 日本."},
        {"role": "user", "content": "été"},
        {"role": "assistant", "content": "<think>\nça\n</think>\n\nétés "},
        {"role": "user", "content": "🙂"},
    ),
    ({"role": "user", "content": "one"}, {"role": "user", "content": "two"}),
    ({"role": "user", "content": "one"}, SYSTEM, {"role": "user", "content": "two"}),
)
NUM_ANSWERS = 24
"""Sequences of random ids."""


def make_probes(tokenizer: Any) -> Probes:
    """Texts, conversations and ids with their right results.

    Args:
        tokenizer: a transformers tokenizer.
    """
    texts = [*TEXTS, *_with_added_tokens(tokenizer)]
    plain = [TextProbe(text, list(tokenizer(text)["input_ids"])) for text in texts]
    chats = [_chat(tokenizer, chat) for chat in CHATS] if tokenizer.chat_template else []
    return Probes(date=DATE, texts=plain, chats=chats, answers=_answers(tokenizer, [probe.ids for probe in plain]))


def _with_added_tokens(tokenizer: Any) -> list[str]:
    """Special and added tokens inside text: some swallow spaces, some are found in whole words only."""
    contents = [token.content for token in tokenizer.added_tokens_decoder.values()]
    some = dict.fromkeys([*contents[:3], *contents[-3:]])
    return [text for token in some for text in (f"a{token}b", f"a {token} b", f"{token}  {token}\n")]


def _chat(tokenizer: Any, messages: tuple[dict[str, str], ...]) -> ChatProbe:
    try:
        template = FIXED_DATE + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError):
        return ChatProbe(list(messages), None, [])
    return ChatProbe(list(messages), text, list(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _answers(tokenizer: Any, texts: list[list[int]]) -> list[AnswerProbe]:
    """Whole texts, texts that break off within a letter, special tokens alone and between, and random ids."""
    draw = random.Random(0)
    special = list(tokenizer.all_special_ids)
    sequences = [[], special, *texts, *(ids[: len(ids) // 2] for ids in texts if len(ids) > 1)]
    sequences += [ids[1:] + special[:1] + ids[:1] for ids in texts[:4]]
    sequences += [draw.choices(range(len(tokenizer)), k=8) for _ in range(NUM_ANSWERS)]
    return [
        AnswerProbe(ids, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in sequences
    ]
