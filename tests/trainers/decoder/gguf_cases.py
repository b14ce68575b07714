"""The GGUF files that are compared with llama.cpp: each family as it is, and each field that changes its answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tests.trainers.decoder.gguf_files import CONTEXT, LAYERS, Shape, TinyFile, random_tensors

TOKENS = tuple(int(token) for token in np.random.default_rng(7).integers(2, 290, 96))
"""What both sides read, longer than the windows and original contexts below."""

WIDE = Shape(key_length=32)
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}


def _biases(family: str, names: tuple[str, ...]) -> TinyFile:
    """The family with biases in every layer, each as long as its weight has rows."""
    sizes = {name: random_tensors(TinyFile(family))[f"blk.0.{name}.weight"].shape[0] for name in names}
    draw = np.random.default_rng(1)
    found = {
        f"blk.{layer}.{name}.bias": draw.standard_normal(size).astype(np.float32)
        for layer in range(LAYERS)
        for name, size in sizes.items()
    }
    return TinyFile(family, tensors=found)


def llama3_factors(original: int, factor: float = 8.0, width: int = 16, base: float = 10000.0) -> np.ndarray:
    """``rope_freqs.weight [R / 2]`` as Llama 3.1's converter writes it, by its own rule."""
    low, high = 1.0, 4.0
    found = []
    for place in range(0, width, 2):
        wavelength = 2 * math.pi * base ** (place / width)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def _longrope(family: str) -> TinyFile:
    """Read within the original length: longer rows are refused, see `trainers.decoder.family`."""
    tensors = {
        "rope_factors_short.weight": np.linspace(1, 2, 8, dtype=np.float32),
        "rope_factors_long.weight": np.linspace(1, 8, 8, dtype=np.float32),
    }
    fields = {
        "context_length": 1024,
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": 1.19,
        "rope.scaling.original_context_length": CONTEXT,
    }
    return TinyFile(family, fields, tensors)


def _without(file: TinyFile, *endings: str) -> TinyFile:
    gone = dict.fromkeys(name for name in random_tensors(file) if f".{name}".endswith(tuple(f".{e}" for e in endings)))
    return replace(file, tensors={**file.tensors, **gone})


CASES: dict[str, TinyFile] = {
    "llama": TinyFile("llama"),
    "llama rope base": TinyFile("llama", {"rope.freq_base": 500000.0}),
    "llama linear": TinyFile("llama", LINEAR),
    "llama linear without its type": TinyFile("llama", {"rope.scaling.factor": 4.0}),
    "llama yarn": TinyFile("llama", YARN),
    "llama yarn betas": TinyFile("llama", {**YARN, "rope.scaling.yarn_beta_fast": 2.0}),
    "llama yarn attention factor": TinyFile("llama", {**YARN, "rope.scaling.attn_factor": 0.8}),
    "llama rope_freqs": TinyFile("llama", tensors={"rope_freqs.weight": llama3_factors(64)}),
    "llama longrope": _longrope("llama"),
    "llama q k v biases": _biases("llama", ("attn_q", "attn_k", "attn_v")),
    "llama all biases": _biases(
        "llama", ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ),
    "llama head width": TinyFile("llama", {"attention.key_length": 32, "attention.value_length": 32}, shape=WIDE),
    "llama untied": TinyFile("llama", tensors={"output.weight": random_tensors(TinyFile("phi3"))["output.weight"]}),
    "llama named mistral": TinyFile("llama", {"general.name": "mistral"}),
    "llama lists of layers": TinyFile("llama", {"attention.head_count": [4, 4], "feed_forward_length": [96, 96]}),
    "qwen2": TinyFile("qwen2"),
    "qwen2 rope base": TinyFile("qwen2", {"rope.freq_base": 1000000.0}),
    "qwen2 linear": TinyFile("qwen2", LINEAR),
    "qwen2 yarn": TinyFile("qwen2", YARN),
    "qwen2 tied": _without(TinyFile("qwen2"), "output.weight"),
    "qwen3": TinyFile("qwen3"),
    "qwen3 head width": TinyFile("qwen3", shape=WIDE),
    "qwen3 yarn": TinyFile("qwen3", YARN),
    "qwen3 linear": TinyFile("qwen3", LINEAR),
    "phi3": TinyFile("phi3"),
    "phi3 partial rotary": TinyFile("phi3", {"rope.dimension_count": 12}),
    "phi3 longrope": _longrope("phi3"),
    "phi3 tied": _without(TinyFile("phi3"), "output.weight"),
    "gemma2": TinyFile("gemma2"),
    "gemma2 soft caps": TinyFile("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 head width and window": TinyFile("gemma2", {"attention.sliding_window": 8}, shape=WIDE),
    "gemma2 linear": TinyFile("gemma2", LINEAR),
    "gemma3": TinyFile("gemma3"),
    "gemma3 linear": TinyFile("gemma3", {**LINEAR, "rope.freq_base": 1000000.0}, layers=6),
    "gemma3 window": TinyFile("gemma3", {"attention.sliding_window": 8}, layers=7),
    "gemma3 yarn": TinyFile("gemma3", YARN, layers=6),
    "gemma3 soft cap": TinyFile("gemma3", {"final_logit_softcapping": 3.0}),
    "gpt2": TinyFile("gpt2"),
    "gpt2 context": TinyFile(
        "gpt2",
        {"context_length": 128},
        {"position_embd.weight": random_tensors(TinyFile("gpt2"))["position_embd.weight"][:128]},
    ),
    "stablelm": TinyFile("stablelm"),
    "stablelm rope base": TinyFile("stablelm", {"rope.freq_base": 500000.0}),
    "stablelm full rotary": TinyFile("stablelm", {"rope.dimension_count": 16}),
    "stablelm biases": _biases("stablelm", ("attn_q", "attn_k", "attn_v")),
    "stablelm parallel": _without(TinyFile("stablelm"), "ffn_norm.weight", "ffn_norm.bias"),
    "stablelm linear": TinyFile("stablelm", LINEAR),
    "stablelm yarn": TinyFile("stablelm", {**YARN, "rope.dimension_count": 16}),
    "starcoder2": TinyFile("starcoder2"),
    "starcoder2 linear": TinyFile("starcoder2", LINEAR),
    "starcoder2 yarn": TinyFile("starcoder2", YARN),
    "starcoder2 rope base": TinyFile("starcoder2", {"rope.freq_base": 100000.0}),
    "starcoder2 without q k v biases": _without(TinyFile("starcoder2"), "attn_q.bias", "attn_k.bias", "attn_v.bias"),
}
"""Name to file."""
