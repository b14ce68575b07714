"""An attention of ours in a transformers backbone while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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
