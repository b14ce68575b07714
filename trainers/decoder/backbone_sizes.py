"""The sizes of a backbone that methods and adapters need; light to import."""

from __future__ import annotations

from dataclasses import dataclass, field

from iapt_export.contract.sizes import BackboneSizes


@dataclass(frozen=True)
class Sizes(BackboneSizes):
    """The sizes of a backbone that a method's tensors depend on; 0 where they are not known and not needed."""

    num_kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name of a linear layer within a decoder layer, such as ``self_attn.q_proj``, to (inputs, outputs)."""
    layers_path: str = "model.layers"
    """Name of the list of decoder layers within the model."""
