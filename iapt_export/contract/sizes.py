"""The sizes of a backbone, which its graphs, its engines and the methods' tensors depend on; standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """K, the width of a key's head, and of a value's where nothing else is said."""
    vocab_size: int
    """V, the width of the logits."""
    value_dim: int = field(default=0, kw_only=True)
    """The width of a value's head where it is another (latent attention); else 0."""

    @property
    def cache_widths(self) -> tuple[int, int]:
        """The widths of a cached key's head and of a value's."""
        return self.head_dim, self.value_dim or self.head_dim
