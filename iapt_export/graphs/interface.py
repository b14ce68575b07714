"""The graphs' inputs and outputs, written once: tracing, the manifest and the tests read them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import READS_INSTRUCTION, SENT_PROMPTS, TENANT_INDEX, GraphSpec, TensorSpec
from iapt_export.graphs.in_place import needs_flag
from iapt_export.graphs.installed import Installed, in_decode
from trainers.decoder.insertion import kv_sizes

COEFFICIENTS = ("numerator", "denominator")
"""Weights that stay fp32 in every dtype, because the activation is evaluated in fp32."""

OPSETS = (20, 23)
"""20 decomposes attention and normalisation; 23 has operators for them."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a backbone that its graphs' interface depends on."""

    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the sizes from a transformers config, under whichever names the architecture gives them.

        Raises:
            IaptError: a size is missing, so this is not a decoder-only model with plain attention.
        """
        names = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
        heads, width, layers, vocab = (getattr(config, name, 0) for name in names)
        if not all(isinstance(size, int) and size > 0 for size in (heads, width, layers, vocab)):
            raise IaptError(
                f"the backbone's config ({type(config).__name__}) states no hidden_size, num_hidden_layers, "
                "num_attention_heads or vocab_size; only decoder-only language models can be exported"
            )
        num_kv_heads, head_dim = kv_sizes(config)
        return cls(
            hidden_size=width,
            num_layers=layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            max_positions=getattr(config, "max_position_embeddings", None) or 2**31,
        )


def weight_specs(item: Installed, dtype: str) -> list[TensorSpec]:
    """One tenant's tensors, as its file holds them but for the type, which is the graph's."""
    return [
        TensorSpec(name, "fp32" if name in COEFFICIENTS else dtype, list(parameter.shape))
        for name, parameter in item.stacked.named_parameters()
    ]


def graph_specs(
    installed: list[Installed], shape: ModelShape, dtype: str, capacity: int | None = None
) -> dict[str, GraphSpec]:
    """Interface of the bundle's graphs; names follow the ecosystem (``past_key_values.N.key``, ``present.N.key``).

    Args:
        installed: the bundle's methods.
        shape: the backbone's sizes.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        capacity: cache entries of a row in the graphs for TensorRT, which wants a fixed number; None leaves them out.

    Returns:
        ``prefill``, ``decode`` and ``serve``, ``serve_prefill`` and ``serve_decode`` if asked for, ``encoder`` where a
        method computes its prompts beforehand, ``generator`` where a method generates prompts at every layer.
    """
    tokens = [TensorSpec(name, "int64", ["batch", "sequence"]) for name in ("input_ids", "attention_mask")]
    logits = TensorSpec("logits", dtype, ["batch", 1, shape.vocab_size])
    mixed = len(installed) > 1

    def cache(prefix: str, length: str | int) -> list[TensorSpec]:
        return _cache_tensors(prefix, length, shape, dtype)

    def taken(items: list[Installed]) -> list[TensorSpec]:
        return [spec for item in items for spec in _method_inputs(item, shape, dtype, mixed)]

    decode_inputs = [
        TensorSpec("input_ids", "int64", ["batch", 1]),
        TensorSpec("attention_mask", "int64", ["batch", "total"]),
        TensorSpec("position_ids", "int64", ["batch", 1]),
        *cache("past_key_values", "past"),
        *taken(in_decode(installed)),
    ]
    flag = [TensorSpec(READS_INSTRUCTION, "bool", [])] if needs_flag([item.method for item in installed]) else []
    serve_inputs = [
        TensorSpec("input_ids", "int64", ["batch", "sequence"]),
        TensorSpec("position_ids", "int64", ["batch", "sequence"]),
        TensorSpec("seqlens_k", "int32", ["batch"]),
        TensorSpec("total_sequence_length", "int32", []),
        *cache("past_key_values", "capacity"),
        *flag,
        *taken(installed),
    ]
    specs = {
        "prefill": GraphSpec("prefill.onnx", [*tokens, *taken(installed)], [logits, *cache("present", "present")]),
        "decode": GraphSpec("decode.onnx", decode_inputs, [logits, *cache("present", "total")]),
        "serve": GraphSpec("serve.onnx", serve_inputs, [logits, *cache("present", "capacity")]),
    }
    if capacity is not None:
        for name, length, methods in (("prefill", "places", installed), ("decode", 1, in_decode(installed))):
            inputs = [
                TensorSpec("input_ids", "int64", ["batch", length]),
                TensorSpec("position_ids", "int64", ["batch", length]),
                TensorSpec("seqlens_k", "int32", ["batch"]),
                *cache("past_key_values", capacity),
                *taken(methods),
            ]
            specs[f"serve_{name}"] = GraphSpec(f"serve_{name}.onnx", inputs, [logits, *cache("present", capacity)])
    for item in installed:
        if item.encoder:
            made = TensorSpec(SENT_PROMPTS, dtype, ["batch", item.method.num_slots, shape.hidden_size])
            specs["encoder"] = GraphSpec("encoder.onnx", [*tokens, *_stacked_inputs(item, dtype)], [made])
    if generated := generators(installed):
        hidden = TensorSpec("hidden_states", dtype, ["batch", shape.num_layers, "sequence", shape.hidden_size])
        length = max(item.method.num_slots for item in generated)
        made = TensorSpec("prompts", dtype, ["batch", shape.num_layers, length, shape.hidden_size])
        specs["generator"] = GraphSpec("generator.onnx", [hidden, tokens[1], *taken(generated)], [made])
    return specs


def generators(installed: list[Installed]) -> list[Installed]:
    """The methods that generate prompts at every layer, which is what ``generator.onnx`` holds."""
    return [item for item in installed if item.method.generates]


def _cache_tensors(prefix: str, length: str | int, shape: ModelShape, dtype: str) -> list[TensorSpec]:
    sizes: list[int | str] = ["batch", shape.num_kv_heads, length, shape.head_dim]
    return [
        TensorSpec(f"{prefix}.{layer}.{part}", dtype, list(sizes))
        for layer in range(shape.num_layers)
        for part in ("key", "value")
    ]


def _method_inputs(item: Installed, shape: ModelShape, dtype: str, mixed: bool) -> list[TensorSpec]:
    """What prefill (and decode, where the method acts there) takes for a method."""
    if item.encoder is None:
        return _stacked_inputs(item, dtype)
    sent = TensorSpec(f"{item.name}.{SENT_PROMPTS}", dtype, ["batch", item.method.num_slots, shape.hidden_size])
    return [_index(item), sent] if mixed else [sent]


def _stacked_inputs(item: Installed, dtype: str) -> list[TensorSpec]:
    # a size of its own for each method, because each has its own number of tenants
    stack = f"tenants_{item.name}"
    weights = weight_specs(item, dtype)
    return [_index(item), *(TensorSpec(f"{item.name}.{w.name}", w.dtype, [stack, *w.shape]) for w in weights)]


def _index(item: Installed) -> TensorSpec:
    return TensorSpec(f"{item.name}.{TENANT_INDEX}", "int64", ["batch"])
