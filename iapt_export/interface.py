"""The graphs' inputs and outputs, written once: tracing, the manifest and the tests read them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from iapt_export.errors import IaptError
from iapt_export.manifest import WEIGHT_PREFIX, GraphSpec, TensorSpec
from trainers.config import IAPTConfig
from trainers.iapt import parameter_shapes

COEFFICIENTS = ("numerator", "denominator")
"""Weights that stay fp32 in every dtype, because the activation is evaluated in fp32."""


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
        return cls(
            hidden_size=width,
            num_layers=layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or width // heads,
            vocab_size=vocab,
            max_positions=getattr(config, "max_position_embeddings", None) or 2**31,
        )


def weight_specs(config: IAPTConfig, shape: ModelShape, dtype: str) -> list[TensorSpec]:
    """One tenant's tensors, as its file holds them but for the type, which is the graph's."""
    return [
        TensorSpec(name, "fp32" if name in COEFFICIENTS else dtype, list(sizes))
        for name, sizes in parameter_shapes(config, shape.hidden_size, shape.num_layers).items()
    ]


def graph_specs(config: IAPTConfig, shape: ModelShape, dtype: str) -> dict[str, GraphSpec]:
    """Interface of the three graphs; names follow the ecosystem (``past_key_values.N.key``, ``present.N.key``).

    Args:
        config: the method's settings, which all tenants share.
        shape: the backbone's sizes.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
    """
    stacked = [
        TensorSpec(WEIGHT_PREFIX + weight.name, weight.dtype, ["tenants", *weight.shape])
        for weight in weight_specs(config, shape, dtype)
    ]
    rows = [TensorSpec("tenant_index", "int64", ["batch"]), *stacked]
    logits = TensorSpec("logits", dtype, ["batch", 1, shape.vocab_size])
    tokens: list[int | str] = ["batch", "sequence"]

    def cache(prefix: str, length: str) -> list[TensorSpec]:
        sizes: list[int | str] = ["batch", shape.num_kv_heads, length, shape.head_dim]
        return [
            TensorSpec(f"{prefix}.{layer}.{part}", dtype, list(sizes))
            for layer in range(shape.num_layers)
            for part in ("key", "value")
        ]

    prefill_inputs = [TensorSpec("input_ids", "int64", tokens), TensorSpec("attention_mask", "int64", tokens), *rows]
    decode_inputs = [
        TensorSpec("input_ids", "int64", ["batch", 1]),
        TensorSpec("attention_mask", "int64", ["batch", "total"]),
        TensorSpec("position_ids", "int64", ["batch", 1]),
        *cache("past_key_values", "past"),
    ]
    hidden = TensorSpec("hidden_states", dtype, ["batch", shape.num_layers, "sequence", shape.hidden_size])
    prompts = TensorSpec("prompts", dtype, ["batch", shape.num_layers, config.prompt_length, shape.hidden_size])
    return {
        "prefill": GraphSpec("prefill.onnx", prefill_inputs, [logits, *cache("present", "present")]),
        "decode": GraphSpec("decode.onnx", decode_inputs, [logits, *cache("present", "total")]),
        "generator": GraphSpec(
            "generator.onnx", [hidden, TensorSpec("attention_mask", "int64", tokens), *rows], [prompts]
        ),
    }
