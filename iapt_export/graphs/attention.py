"""Attentions of ours in a transformers backbone while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


@contextlib.contextmanager
def attending_with(backbone: Any, name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Replace a backbone's attention while the context is open.

    Args:
        backbone: a causal LM of transformers.
        name: what to register the two functions under.
        attend: as transformers' attention functions.
        mask: as transformers' mask functions; makes what ``attend`` gets as its mask.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(name)
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over ``query [B, heads, T, K]`` and ``key, value [B, H, S, K]`` without repeating the latter."""
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return mixed.transpose(1, 2), None
