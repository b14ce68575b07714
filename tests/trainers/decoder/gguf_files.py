"""Tiny GGUF files of each family, written with gguf-py: random weights from a seed, and `tiny_tokenizer`'s words.

A file is a family's plain case, changed by fields, tensors or sizes. The weights are drawn as llama.cpp
stores them, so that nothing here knows how transformers orders rows or names tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny import CHAT_TEMPLATE, VOCABULARY, tiny_tokenizer

LAYERS = 2
CONTEXT = 256
ROTARY_BASE = 10000.0
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny decoder."""

    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    key_length: int = 16
    mlp: int = 96


@dataclass(frozen=True)
class TinyFile:
    """A file to write.

    ``fields`` and ``tensors`` are added to those of the family (or replace them); None takes one away.
    Field names are those of the architecture, without it, unless they start with ``general.`` or ``tokenizer.``.
    """

    family: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    shape: Shape = Shape()
    layers: int = LAYERS
    chat: bool = True
    quantised: gguf.GGMLQuantizationType | None = None
    """How matrices are stored; None for fp32."""


def write(path: Path, file: TinyFile) -> Path:
    """Write the file, the same bytes each time, and return its path."""
    writer = gguf.GGUFWriter(path, file.family)
    fields = {"general.name": "tiny", **_fields(file), **_vocabulary(file.chat), **file.fields}
    for name, value in fields.items():
        if value is not None:
            _add(
                writer,
                name if name.startswith(("general.", "tokenizer.", "split.")) else f"{file.family}.{name}",
                value,
            )
    for name, array in {**random_tensors(file), **file.tensors}.items():
        if array is None:
            continue
        if file.quantised is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(array, file.quantised)
            writer.add_tensor(name, packed, raw_dtype=file.quantised)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(file: TinyFile) -> dict[str, np.ndarray]:
    """The family's tensors, fp32, as llama.cpp names and orders them."""
    s, family, draw = file.shape, file.family, _Drawer()
    q, kv = s.heads * s.key_length, s.kv_heads * s.key_length
    found: dict[str, np.ndarray] = {"token_embd.weight": draw(VOCABULARY, s.width)}
    if family == "gpt2":
        found["position_embd.weight"] = draw(CONTEXT, s.width)
    for layer in range(file.layers):
        block: dict[str, np.ndarray] = {"attn_norm.weight": draw.norm(s.width)}
        if family in ("phi3", "gpt2"):
            rows = 3 * s.width if family == "gpt2" else q + 2 * kv
            block["attn_qkv.weight"] = draw(rows, s.width)
        else:
            block |= {f"attn_{name}.weight": draw(rows, s.width) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        block["attn_output.weight"] = draw(s.width, s.width if family == "gpt2" else q)
        block["ffn_norm.weight"] = draw.norm(s.width)
        if family == "phi3":
            block["ffn_up.weight"] = draw(2 * s.mlp, s.width)
        else:
            block["ffn_up.weight"] = draw(s.mlp, s.width)
            if family not in ("gpt2", "starcoder2"):
                block["ffn_gate.weight"] = draw(s.mlp, s.width)
        block["ffn_down.weight"] = draw(s.width, s.mlp)
        if family == "qwen3" or family == "gemma3":
            block |= {f"attn_{name}_norm.weight": draw.norm(s.key_length) for name in "qk"}
        if family in ("gemma2", "gemma3"):
            block |= {f"{name}.weight": draw.norm(s.width) for name in ("post_attention_norm", "post_ffw_norm")}
        if family == "qwen2":
            block |= {f"attn_{name}.bias": draw(rows) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        if family in ("gpt2", "starcoder2", "stablelm"):
            block |= {f"{name}.bias": draw(s.width) for name in ("attn_norm", "ffn_norm")}
        if family in ("gpt2", "starcoder2"):
            block |= {f"{n}.bias": draw(block[f"{n}.weight"].shape[0]) for n in ("attn_output", "ffn_up", "ffn_down")}
        if family == "gpt2":
            block["attn_qkv.bias"] = draw(3 * s.width)
        if family == "starcoder2":
            block |= {f"attn_{name}.bias": draw(rows) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        found |= {f"blk.{layer}.{name}": array for name, array in block.items()}
    found["output_norm.weight"] = draw.norm(s.width)
    if family in ("gpt2", "starcoder2", "stablelm"):
        found["output_norm.bias"] = draw(s.width)
    if family in ("qwen2", "phi3", "stablelm"):
        found["output.weight"] = draw(VOCABULARY, s.width)
    return found


class _Drawer:
    """Weights from one seed, in the order asked for; wide, so that a fault moves the answer."""

    def __init__(self) -> None:
        self._source = np.random.default_rng(0)

    def __call__(self, *shape: int) -> np.ndarray:
        return (0.2 * self._source.standard_normal(shape)).astype(np.float32)

    def norm(self, width: int) -> np.ndarray:
        return (1 + 0.1 * self._source.standard_normal(width)).astype(np.float32)


def _fields(file: TinyFile) -> dict[str, Any]:
    s, family = file.shape, file.family
    fields: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": s.width,
        "block_count": file.layers,
        "feed_forward_length": s.mlp,
        "attention.head_count": s.heads,
    }
    if family == "gpt2":
        return {**fields, "attention.layer_norm_epsilon": NORM_EPS}
    fields |= {
        "attention.head_count_kv": s.kv_heads,
        "rope.freq_base": ROTARY_BASE,
        "rope.dimension_count": s.key_length,
        "vocab_size": VOCABULARY,
    }
    layer_norm = family in ("starcoder2", "stablelm")
    fields["attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"] = NORM_EPS
    if family in ("qwen3", "gemma2", "gemma3"):
        fields |= {"attention.key_length": s.key_length, "attention.value_length": s.key_length}
    if family in ("gemma2", "gemma3"):
        fields["attention.sliding_window"] = 64
    if family == "stablelm":
        fields |= {"rope.dimension_count": s.key_length // 4, "use_parallel_residual": True}
    return fields


def _vocabulary(chat: bool) -> dict[str, Any]:
    state = json.loads(tiny_tokenizer(chat).backend_tokenizer.to_str())
    words = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    words += [f"[PAD{place}]" for place in range(len(words), VOCABULARY)]
    specials = {token["content"] for token in state["added_tokens"] if token["special"]}
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [int(gguf.TokenType.CONTROL if w in specials else 1) for w in words],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    return {**fields, "tokenizer.chat_template": CHAT_TEMPLATE} if chat else fields


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
