"""The sizes of a backbone, which its graphs, its engines and the methods' tensors depend on; standard library only."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 2**24
"""What any of these sizes is at most."""
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class BackboneSizes:
    """As the backbone's cache and embeddings have them."""

    hidden_size: int
    """D, the width of the hidden states."""
    num_layers: int
    """L, the number of decoder layers."""
    num_kv_heads: int
    """H, the key/value heads of the cache."""
    head_dim: int
    """K, the width of a key/value head."""
    vocab_size: int
    """V, the width of the logits."""
