"""Attention of ours in a transformers backbone.

Two things differ from what transformers does by itself. Masks are made of positions, which count real tokens, and not
of places in a padded row: a sliding window then sees the same tokens whatever stands beside a row. And nothing that a
model asks of its attention is left out: soft caps and sinks are computed, what is not known is refused by name.

Shapes: B batch, T tokens, S keys, N query heads, H key/value heads, K width of queries and keys, V width of values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from iapt_export.contract.errors import IaptError

EAGER = "iapt_by_position"
"""What the attention in PyTorch is registered under."""
HARMLESS = frozenset(
    (
        "cache_position",
        "dropout",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
"""Arguments that change nothing in a frozen decoder's attention; position ids were used before it is called."""


@dataclass(frozen=True)
class Options:
    """What a model asks of its attention beside queries, keys, values, mask and scale."""

    window: int = -1
    """Entries that a token sees, itself included; -1 for all. Where there is a mask, it holds the window already."""
    softcap: float = 0.0
    """Scores become ``softcap * tanh(scores / softcap)``; 0 leaves them (Gemma 2)."""
    sinks: Tensor | None = None
    """``[N]``, a score that takes its share of each head's softmax and gives nothing (GPT-OSS)."""


def read_options(module: nn.Module, arguments: dict[str, Any]) -> Options:
    """Sort the arguments of an attention call.

    Raises:
        IaptError: one that is not known has a value, so that leaving it out could change the answer.
    """
    known = {"sliding_window", "softcap", "s_aux", "is_causal"}
    given = {name for name, value in arguments.items() if value is not None}
    if arguments.get("is_causal") is False:
        raise IaptError(f"{type(module).__name__} attends in both directions; only causal decoders are supported")
    if strange := sorted(given - known - HARMLESS):
        raise IaptError(
            f"{type(module).__name__} asks its attention for {', '.join(strange)}, which is not carried out here; "
            "leaving it out would change the answers, so this model is not supported"
        )
    return Options(
        window=int(arguments.get("sliding_window") or -1),
        softcap=float(arguments.get("softcap") or 0.0),
        sinks=arguments.get("s_aux"),
    )


def mask_by_position(
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> Tensor | None:
    """The boolean mask ``[B, 1, T, S]`` as transformers makes it, asked for positions instead of places.

    Args:
        mask_function: transformers' rule ``(batch, head, query, key) -> may see``.
        attention_mask: ``[B, S]``, 1 at real entries, wherever padding stands.
        rest: see `transformers.masking_utils.sdpa_mask`.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        position = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # [B, S]

        def by_place(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask_function(batch, head, position[batch, query], position[batch, key])

        return sdpa_mask(mask_function=by_place, attention_mask=attention_mask, **rest)
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **rest)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """PyTorch's attention: transformers' own function where scaled dot products are all there is."""
    scaling = arguments.pop("scaling", None)
    options = read_options(module, arguments)
    if options.softcap or options.sinks is not None:
        return explicit_attention(query, key, value, attention_mask, scaling, options), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, scaling=scaling, **arguments)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention over ``query [B, N, T, K]``, ``key [B, H, S, K]`` and ``value [B, H, S, V]``, which export does not
    repeat.

    Values narrower than keys (latent attention) get zeros beside them: TensorRT takes one width only.
    """
    options = read_options(module, arguments)
    if options.softcap or options.sinks is not None:
        return explicit_attention(query, key, value, attention_mask, scaling, options), None
    missing = key.shape[-1] - value.shape[-1]
    values = F.pad(value, (0, missing)) if missing > 0 else value
    mixed = F.scaled_dot_product_attention(
        query, key, values, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    if missing > 0:
        mixed = mixed[..., : value.shape[-1]]
    return mixed.transpose(1, 2), None


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, options: Options
) -> Tensor:
    """Attention in single operators, which every runtime has: ``[B, T, N, V]``.

    Args:
        query: ``[B, N, T, K]``.
        key: ``[B, H, S, K]``.
        value: ``[B, H, S, V]``.
        mask: ``[B, 1, T, S]`` booleans; None is causal.
        scaling: factor of the scores; None is ``K ** -0.5``.
        options: soft cap and sinks.
    """
    batch, heads, length, width = query.shape
    groups, entries = key.shape[1], key.shape[2]
    if mask is None:
        place = torch.arange(entries, device=query.device)
        mask = (place <= place[-length:, None])[None, None]
    queries = query.reshape(batch, groups, heads // groups, length, width)
    scores = (queries @ key[:, :, None].transpose(-1, -2)) * (width**-0.5 if scaling is None else scaling)
    if options.softcap:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min).float()  # [B, H, G, T, S]
    if options.sinks is not None:
        sinks = options.sinks.reshape(1, groups, -1, 1, 1).expand(batch, -1, -1, length, -1).float()
        shares = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        shares = scores.softmax(dim=-1)
    mixed = shares.to(value.dtype) @ value[:, :, None]  # [B, H, G, T, V]
    return mixed.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2)


def use_own_attention(backbone: Any) -> None:
    """Let a backbone attend as above from now on, in a second call as well; one that attends by itself stays as it is.

    Rotary factors that depend on the longest row of a batch (longrope) are kept at those of the original length.
    """
    AttentionInterface.register(EAGER, _eager)
    AttentionMaskInterface.register(EAGER, mask_by_position)
    backbone.set_attn_implementation(EAGER)
    for module in backbone.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "longrope, the factors of the original length"
            module.inv_freq.copy_(module.original_inv_freq)


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


@contextlib.contextmanager
def stock_attention(backbone: Any) -> Iterator[None]:
    """Let a backbone attend as transformers chooses for its family, while the context is open."""
    before = backbone.config._attn_implementation
    if before == EAGER:
        backbone.set_attn_implementation("sdpa" if backbone._supports_sdpa else "eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


@contextlib.contextmanager
def traceable_experts(backbone: Any) -> Iterator[None]:
    """Let mixtures of experts compute with batched products, which a graph can hold, while the context is open."""
    if not backbone._can_set_experts_implementation():
        yield
        return
    before = backbone.get_experts_implementation()
    backbone.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        backbone.set_experts_implementation(before)


@contextlib.contextmanager
def real_rotations(backbone: Any) -> Iterator[None]:
    """Let DeepSeek-V2 rotate in real numbers while the context is open: its code has complex ones, a graph has not."""
    if backbone.config.model_type != "deepseek_v2":
        yield
        return
    code, rotary = sys.modules[type(backbone).__module__], backbone.model.rotary_emb

    def factors(_hidden: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[..., None].float() * rotary.inv_freq.float()  # [B, T, R / 2]
        return torch.stack([angles.cos(), angles.sin()], dim=-1) * rotary.attention_scaling

    def rotated(query: Tensor, key: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = turns[:, None].unbind(-1)  # [B, 1, T, R / 2]
        pairs = (part.float().unflatten(-1, (-1, 2)).unbind(-1) for part in (query, key))  # neighbours are a pair
        query_turned, key_turned = (
            torch.stack([left * cos - right * sin, left * sin + right * cos], dim=-1).flatten(-2)
            for left, right in pairs
        )
        return query_turned.type_as(query), key_turned.type_as(key)

    theirs = code.apply_rotary_emb
    vars(code)["apply_rotary_emb"], rotary.forward = rotated, factors
    try:
        yield
    finally:
        vars(code)["apply_rotary_emb"] = theirs
        del rotary.forward
