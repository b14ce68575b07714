"""The tokenizer of a GGUF file: transformers rebuilds it from the file's words, here it is made to split as llama.cpp.

What transformers drops is how text is cut before words are looked up (``tokenizer.ggml.pre``, where it does not know
the name) and whether a space is put in front (``add_space_prefix``).
"""

from __future__ import annotations

import json
import logging
from typing import Any

from iapt_export.contract.errors import IaptError
from trainers.decoder.gguf_file import GgufFile

AS_TRANSFORMERS = (
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"),
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "dbrx", "smaug-bpe"),
    *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    *("tekken", "gpt-4o"),  # llama.cpp reads combining marks apart from their letters there, tekken's authors do not
)
"""``tokenizer.ggml.pre`` of byte-level words that transformers splits as llama.cpp does."""

DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Those that transformers splits as GPT-2's, where each digit is to stand alone."""

STARTED = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken")
"""Those whose text llama.cpp starts with the start token where the file does not say (``add_bos_token``)."""

LIKE_QWEN2 = ("stablelm2",)
"""Those that transformers splits as GPT-2's, and llama.cpp as Qwen 2's."""

SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""transformers' names of special tokens to GGUF's."""

WITHOUT_SPACE = ("gemma2", "gemma3")
"""Architectures whose text transformers never starts with a space."""


def gguf_tokenizer(file: GgufFile) -> Any:
    """The tokenizer of a GGUF file.

    Raises:
        IaptError: no words in the file, a kind of them that is not read, or a way of splitting that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre", "none")
    words = file.fields.get("tokenizer.ggml.tokens", [])
    if kind not in ("gpt2", "llama") or not words:
        raise IaptError(
            f"{file.path} holds a tokenizer of the kind {kind!r} with {len(words)} words; read are gpt2 (byte-level) "
            "and llama (SentencePiece). Give the model's Hugging Face folder instead of the GGUF file"
        )
    if kind == "gpt2" and pre not in (*AS_TRANSFORMERS, *DIGITS_APART, *LIKE_QWEN2):
        raise IaptError(
            f"{file.path} splits text in the way {pre!r} (tokenizer.ggml.pre) before it looks up words; known are "
            f"{', '.join((*AS_TRANSFORMERS, *DIGITS_APART, *LIKE_QWEN2))}. Text would become other tokens; give the "
            "model's Hugging Face folder instead of the GGUF file"
        )
    for name in SPECIAL_TOKENS.values():
        if (place := file.fields.get(f"tokenizer.ggml.{name}_token_id", 0)) >= len(words):
            raise IaptError(
                f"{file.path} names {place} as its {name} token, and has {len(words)} words; "
                "download or convert it again"
            )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers has no class of its own for it, and its panics are no Exception
        reason = str(error).strip().partition("\n")[0]
        raise IaptError(
            f"{file.path} has words, merges or scores of which no tokenizer can be made ({reason}); download or "
            "convert it again, or give the model's Hugging Face folder"
        ) from error
    _drop_additions(tokenizer, len(words))
    if kind == "gpt2":
        _split_words(tokenizer.backend_tokenizer, pre)
        if pre in STARTED and "tokenizer.ggml.add_bos_token" not in file.fields:
            tokenizer.add_bos_token = True
    else:
        _start_text(tokenizer.backend_tokenizer, file)
    _check_words(tokenizer, file, words)
    if not tokenizer.chat_template:
        logging.getLogger(__name__).warning("%s has no chat template; its prompts go in as text", file.path.name)
    return tokenizer


def _drop_additions(tokenizer: Any, num_words: int) -> None:
    """Take away special tokens of transformers' class that the file does not have: the model has no rows for them."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < num_words]
    if len(kept) < len(state["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**state, "added_tokens": kept}))


def _split_words(backend: Any, pre: str) -> None:
    """Cut byte-level text as the file's ``pre`` says."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    if pre in DIGITS_APART:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre in LIKE_QWEN2:
        parts = [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        return
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)


def _start_text(backend: Any, file: GgufFile) -> None:
    """Put a space before SentencePiece text, and take it from answers, only where the file says so."""
    from tokenizers import decoders, normalizers

    has_space = file.fields.get("tokenizer.ggml.add_space_prefix", True)
    if file.architecture in WITHOUT_SPACE:
        if has_space:
            raise IaptError(
                f"{file.path}: tokenizer.ggml.add_space_prefix is not false, and transformers' {file.architecture} "
                "starts no text with a space; convert the model again, or give its Hugging Face folder"
            )
        return
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if has_space else spaces
    backend.pre_tokenizer = None
    if not has_space:
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _check_words(tokenizer: Any, file: GgufFile, words: list[str]) -> None:
    """Refuse a tokenizer with other words or other special tokens than the file's."""
    if len(tokenizer) != len(words):
        raise IaptError(
            f"{file.path} lists {len(words)} words, of which transformers makes {len(tokenizer)}; some occur twice or "
            "are no words of a byte-level vocabulary. Give the model's Hugging Face folder instead of the GGUF file"
        )
    for ours, theirs in SPECIAL_TOKENS.items():
        file_id = file.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        tokenizer_id = getattr(tokenizer, f"{ours}_token_id")
        if file_id != tokenizer_id:
            raise IaptError(
                f"{file.path} names {file_id} as its {theirs} token, and transformers {tokenizer_id}; give the model's "
                "Hugging Face folder instead of the GGUF file"
            )
