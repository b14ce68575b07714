"""Tiny random backbones and a tiny tokenizer, made in memory: what the tests run on instead of a model hub.

All models share V = 320, D = 32, three layers, and weights drawn from a fixed seed, so that two calls
give equal models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 320
CORPUS = (
    "the film is a quiet joy from the first scene to the last",
    "a dull and noisy story that nobody will remember",
    "is this review positive or negative? positive negative yes no",
    "what is the topic of this news text? grain oil trade money",
    "system user assistant you are a helpful assistant",
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
"""Weights are drawn wider than usual, so that outputs differ enough for comparisons to mean something."""


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    """A Llama with grouped-query attention and tied embeddings, like SmolLM2."""
    return _model(LlamaConfig(**{**COMMON, "tie_word_embeddings": True, **overrides}), seed)


def tiny_qwen2(seed: int = 0, **overrides: Any) -> Any:
    """A Qwen2: biases in the attention's projections."""
    return _model(Qwen2Config(**{**COMMON, **overrides}), seed)


def tiny_qwen3(seed: int = 0, **overrides: Any) -> Any:
    """A Qwen3: normalised queries and keys, head width apart from D / H."""
    return _model(Qwen3Config(**{**COMMON, "head_dim": 16, **overrides}), seed)


def tiny_mistral(seed: int = 0, **overrides: Any) -> Any:
    """A Mistral without sliding window."""
    return _model(MistralConfig(**{**COMMON, "sliding_window": None, **overrides}), seed)


def tiny_gpt2(seed: int = 0, **overrides: Any) -> Any:
    """A GPT-2: learned absolute positions, fused projections, layer norms with bias."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    return _model(GPT2Config(**{**fields, **overrides}), seed)


ARCHITECTURES = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gpt2": tiny_gpt2,
}


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `CORPUS`: reads any text; bos 0, eos and pad 1; ChatML template if ``chat``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1], pad_token=specials[1]
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_backbone(folder: Path, model: Any = None, chat: bool = True) -> Path:
    """Write a tiny model with its tokenizer as a Hugging Face folder, and return the folder."""
    (tiny_llama() if model is None else model).save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder


def padded(lengths: list[int], side: str = "right", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token rows of the given lengths.

    Returns:
        ``input_ids [B, T]`` and ``attention_mask [B, T]`` (int64), padded with token 1 on ``side``.
        The same seed gives the same tokens on either side.
    """
    source = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.ones(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = torch.randint(2, VOCABULARY, (length,), generator=source)
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def _model(config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
