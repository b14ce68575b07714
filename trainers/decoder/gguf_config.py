"""What a GGUF file's fields say about its decoder, as a transformers configuration.

transformers has a reader of its own. It drops, without a word, rope scaling, ``rope_freqs``, biases, partial
rotary, soft caps and some rope bases, and so loads another model than the file holds. Here each field of the
architecture is either carried into the configuration or refused by its name; llama.cpp is the judge in
tests/trainers/decoder/test_gguf_truth.py. Names of fields: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.sizes import MOST_LAYERS
from trainers.decoder.gguf_file import Fields, GgufFile
from trainers.decoder.gguf_rope import head_width, rope_parameters
from trainers.decoder.gguf_tokenizer import SPECIAL_TOKENS

Config = dict[str, Any]

HEAD_DIM = ("llama", "qwen3", "gemma2", "gemma3")
"""Architectures whose configuration always states the width of a head."""


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture is written as a transformers configuration."""

    model_type: str
    """Of transformers."""
    norm_eps: tuple[str, str]
    """The field with the norms' epsilon, and the configuration's name of it."""
    special: Callable[[Fields, Config], Config] = field(default=lambda fields, config: {})
    """What only this family has, from the fields and the configuration so far."""
    optional_biases: tuple[str, ...] = ()
    """Biases that count as zero where the file has others and not them, as in llama.cpp."""


_QKV_BIASES = (".attn_q.bias", ".attn_k.bias", ".attn_v.bias")
_ATTENTION_BIASES = (*_QKV_BIASES, ".attn_output.bias")
_MLP_BIASES = (".ffn_gate.bias", ".ffn_up.bias", ".ffn_down.bias")


def _llama(fields: Fields, _: Config) -> Config:
    names = fields.file.tensors
    return {
        "attention_bias": any(name.endswith(_ATTENTION_BIASES) for name in names),
        "mlp_bias": any(name.endswith(_MLP_BIASES) for name in names),
    }


def _phi3(fields: Fields, config: Config) -> Config:
    window = fields.take("attention.sliding_window", 0)
    original = config["rope_parameters"].get("original_max_position_embeddings")
    return {
        "sliding_window": window if 0 < window < config["max_position_embeddings"] else None,
        **({"original_max_position_embeddings": original} if original else {}),
    }


def _gemma2(fields: Fields, config: Config) -> Config:
    return {
        "sliding_window": fields.take("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.take("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.take("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
    }


def _gemma3(fields: Fields, config: Config) -> Config:
    pattern = fields.take("attention.sliding_window_pattern", 6)
    layers = config["num_hidden_layers"]
    windowed = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(layers)]
    local = {"rope_type": "default", "rope_theta": fields.take("rope.freq_base_swa", 10000.0)}
    return {
        "sliding_window": fields.need("attention.sliding_window"),
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in windowed],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "final_logit_softcapping": fields.take("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
    }


def _query_scalar(config: Config, layers_of_27b: int) -> int:
    """Gemma's scale of queries is no field: the head width, but D / H in the largest (llama.cpp, models/gemma*.cpp)."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gpt2(_: Fields, config: Config) -> Config:
    return {"n_inner": config["intermediate_size"]}


def _stablelm(fields: Fields, _: Config) -> Config:
    names = fields.file.tensors
    return {
        "use_qkv_bias": any(name.endswith(_QKV_BIASES) for name in names),
        "use_parallel_residual": not any(name.endswith("ffn_norm.weight") for name in names),
    }


def _starcoder2(fields: Fields, _: Config) -> Config:
    names = fields.file.tensors
    return {"use_bias": any(name.endswith((*_ATTENTION_BIASES, *_MLP_BIASES)) for name in names)}


_RMS = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
_LAYER = "attention.layer_norm_epsilon"

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _RMS, _llama, (*_ATTENTION_BIASES, *_MLP_BIASES)),
    "qwen2": Family("qwen2", _RMS),
    "qwen3": Family("qwen3", _RMS),
    "phi3": Family("phi3", _RMS, _phi3),
    "gemma2": Family("gemma2", _RMS, _gemma2),
    "gemma3": Family("gemma3_text", _RMS, _gemma3),
    "gpt2": Family("gpt2", (_LAYER, "layer_norm_epsilon"), _gpt2),
    "stablelm": Family("stablelm", (_LAYER, "layer_norm_eps"), _stablelm, _QKV_BIASES),
    "starcoder2": Family("starcoder2", (_LAYER, "norm_epsilon"), _starcoder2, _QKV_BIASES),
}
"""GGUF architecture to its family: those that were compared with llama.cpp."""


def _layer_count(fields: Fields) -> int:
    count = fields.need("block_count")
    if not isinstance(count, int) or not 1 <= count <= MOST_LAYERS:
        raise IaptError(f"{fields.file.path} has {count!r} as its block_count, expected 1 to {MOST_LAYERS}")
    return count


def gguf_config(file: GgufFile) -> Any:
    """The transformers configuration of the decoder in a GGUF file.

    Raises:
        IaptError: an architecture that is not read, or a field that no configuration holds; named.
    """
    from transformers import AutoConfig

    family = family_of(file)
    fields = Fields(file)
    config: Config = {
        "max_position_embeddings": fields.need("context_length"),
        "hidden_size": fields.need("embedding_length"),
        "num_hidden_layers": _layer_count(fields),
        "intermediate_size": fields.need("feed_forward_length"),
        "num_attention_heads": fields.need("attention.head_count"),
        family.norm_eps[1]: fields.need(family.norm_eps[0]),
        "vocab_size": _vocabulary_size(fields),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_token_ids(file),
    }
    if file.architecture != "gpt2":
        config["num_key_value_heads"] = fields.take("attention.head_count_kv", config["num_attention_heads"])
        width, rotated = head_width(fields, config["hidden_size"], config["num_attention_heads"])
        if file.architecture in HEAD_DIM or width * config["num_attention_heads"] != config["hidden_size"]:
            config["head_dim"] = width
        config["rope_parameters"] = rope_parameters(fields, config["max_position_embeddings"], width, rotated)
    config |= family.special(fields, config)
    fields.refuse_rest()
    return AutoConfig.for_model(family.model_type, **config)


def family_of(file: GgufFile) -> Family:
    """The family of a file's architecture.

    Raises:
        IaptError: the architecture is none of `FAMILIES`.
    """
    if file.architecture not in FAMILIES:
        raise IaptError(
            f"{file.path} holds a decoder of the GGUF architecture {file.architecture!r}; read are "
            f"{', '.join(FAMILIES)}. Give the model's Hugging Face folder instead of the GGUF file"
        )
    return FAMILIES[file.architecture]


def _vocabulary_size(fields: Fields) -> int:
    """Rows of the embedding, which field and tokenizer must agree with."""
    file = fields.file
    rows = file.shape("token_embd.weight")[0] if "token_embd.weight" in file.tensors else 0
    words = len(file.fields.get("tokenizer.ggml.tokens", ()))
    stated = fields.take("vocab_size", rows)
    if not rows or {rows, stated} != {words or rows}:
        raise IaptError(
            f"{file.path} has {words} words, {rows} rows of token_embd.weight and a vocab_size of {stated}; "
            "they must be equal, download or convert the file again"
        )
    return rows


def _token_ids(file: GgufFile) -> Config:
    """Start, end, padding and unknown token, None where the file names none, so that no family's default creeps in."""
    return {
        f"{ours}_token_id": file.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in SPECIAL_TOKENS.items()
    }
