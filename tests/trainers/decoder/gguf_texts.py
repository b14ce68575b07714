"""The tokenizers of GGUF files that are compared with llama.cpp.

Their words cross every border that a way of splitting text could draw, so that another way gives other tokens.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.trainers.decoder.gguf_files import TinyFile, random_tensors
from trainers.decoder.gguf_tokenizer import AS_TRANSFORMERS, DIGITS_APART, LIKE_QWEN2

TEXTS = (
    "the film is a quiet joy",
    "a 2024 story, 12345 times!  two  spaces\n\n new\tline",
    "don't DON'T we'll é ü 日本語 🙂",
    " leading",
    "trailing ",
    "x=3.14;if(a<b){c+=1;}",
    "١٢٣ ½ ²",
    "\u00a0nbsp ABCdef GHIjkl's",
    "",
    "ⅷ 3½4",
    "\r\n\r\n  x",
    "'S 'LL 'd",
    "positive<|im_end|>\nnegative <|im_start|>user",
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<pad>", "<eos>", "<bos>", "<unk>"]


def _pairs() -> tuple[list[str], list[list[str]]]:
    """Words and merges of a byte-level vocabulary that was learned without splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=2,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    return sorted(state["vocab"], key=state["vocab"].__getitem__), state["merges"]


def _byte_level(pre: str, start: bool | None = None) -> TinyFile:
    words, merges = _pairs()
    return _file(
        "llama",
        words,
        {
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
            "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(words) - len(SPECIALS)),
            "tokenizer.ggml.add_bos_token": start,
        },
    )


def _sentencepiece(family: str, has_space: bool | None, start: bool | None = None) -> TinyFile:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    ranks = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = sorted(sorted(ranks, key=ranks.__getitem__), key=lambda piece: len(piece) == 1)
    words = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return _file(
        family,
        words,
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.scores": [0.0] * (len(SPECIALS) + 256) + [-float(rank) for rank in range(len(pieces))],
            "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [6] * 256 + [1] * len(pieces),
            "tokenizer.ggml.bos_token_id": 4,
            "tokenizer.ggml.eos_token_id": 3,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 5,
            "tokenizer.ggml.add_bos_token": start,
            "tokenizer.ggml.add_space_prefix": has_space,
        },
    )


def _file(family: str, words: list[str], fields: dict[str, Any]) -> TinyFile:
    table = np.zeros((len(words), 64), np.float32)
    names = [name for name in ("token_embd.weight", "output.weight") if name in random_tensors(TinyFile(family))]
    fields = {"tokenizer.ggml.tokens": words, "vocab_size": len(words), **fields}
    return TinyFile(family, fields, dict.fromkeys(names, table))


TEXT_CASES: dict[str, TinyFile] = {
    **{f"pre {pre}": _byte_level(pre) for pre in (*AS_TRANSFORMERS, *DIGITS_APART, *LIKE_QWEN2)},
    "pre llama-bpe with start": _byte_level("llama-bpe", True),
    "pre llama-bpe without start": _byte_level("llama-bpe", False),
    "pre gpt-2 with start": _byte_level("gpt-2", True),
    **{
        f"sentencepiece {family} {has_space}": _sentencepiece(family, has_space)
        for family, has_space in (
            *(("llama", None), ("llama", True), ("llama", False)),
            *(("phi3", None), ("phi3", False), ("gemma2", False), ("gemma3", False)),
        )
    },
    "sentencepiece llama without start": _sentencepiece("llama", None, False),
}
"""Name to file; those of ``pre`` without a word on the start token."""
