"""Put per-layer prompts into a frozen decoder: the only file that knows how a backbone is laid out.

Our choices, fixed in every bundle's manifest: prompts are prepended; at every layer the P rows that
the previous layer made of its prompts are dropped and this layer's prompts take their place; prompt
rows hold positions 0..P-1 and tokens follow, counted over real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainers.errors import IaptError

PromptFunction = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, instruction hidden states ``[B, T, D]``, instruction mask ``[B, T]``) to prompts ``[B, P, D]``."""


def decoder_layers(backbone: Any) -> nn.ModuleList:
    """The decoder's list of layers, found by its length and its place nearest the root.

    Raises:
        IaptError: no list of ``config.num_hidden_layers`` modules exists.
    """
    num_layers = backbone.config.num_hidden_layers
    lists = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    if not lists:
        raise IaptError(
            f"no list of {num_layers} decoder layers was found in {type(backbone).__name__}; "
            "only decoder-only language models with one list of layers are supported"
        )
    return lists[min(lists, key=lambda name: (name.count("."), name))]


def forward_with_prompts(
    backbone: Any,
    prompts: PromptFunction,
    num_prompt_tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    instruction_mask: Tensor | None = None,
    select: Callable[[Tensor], Tensor] | None = None,
    past_key_values: Any = None,
) -> Any:
    """Run a backbone over ``[prompts; tokens]`` with fresh prompts at every layer.

    Args:
        backbone: a causal LM of transformers.
        prompts: makes a layer's prompts from the instruction's hidden states right before it.
        num_prompt_tokens: P.
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 1 at real tokens; padding may stand on either side.
        instruction_mask: ``[B, T]``, 1 at the tokens the generators may read; None means all real tokens.
        select: applied to the final hidden states ``[B, P+T, D]`` before the LM head, to compute only some logits.
        past_key_values: an empty cache to fill, or None to keep none.

    Returns:
        The backbone's output; logits and cache include the P prompt rows unless ``select`` dropped them.
    """
    embeddings = backbone.get_input_embeddings()(input_ids)  # [B, T, D]
    batch, _, width = embeddings.shape
    slots = embeddings.new_zeros(batch, num_prompt_tokens, width)
    mask = torch.cat([attention_mask.new_ones(batch, num_prompt_tokens), attention_mask], dim=1)  # [B, P+T]
    readable = attention_mask if instruction_mask is None else instruction_mask

    def replace(layer: int, hidden: Tensor) -> Tensor:
        tokens = hidden[:, num_prompt_tokens:]  # [B, T, D]
        return torch.cat([prompts(layer, tokens, readable).to(hidden.dtype), tokens], dim=1)

    with _hooked(decoder_layers(backbone), replace), _selected(backbone, select):
        return backbone(
            inputs_embeds=torch.cat([slots, embeddings], dim=1),
            attention_mask=mask,
            position_ids=positions(mask),
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )


def positions(mask: Tensor) -> Tensor:
    """Position ids ``[B, S]`` that count real tokens only, from a mask ``[B, S]``; padding repeats its neighbour's."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def last_token(mask: Tensor) -> Tensor:
    """Index ``[B]`` of each row's last real token in ``mask [B, S]``."""
    index = torch.arange(mask.shape[1], device=mask.device)
    return (mask * index).argmax(dim=1)


@contextmanager
def _hooked(layers: nn.ModuleList, replace: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Pass every layer's input through ``replace(layer, hidden)`` while the context is open."""

    def hook_for(index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (replace(index, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": replace(index, kwargs["hidden_states"])}

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _selected(backbone: Any, select: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Apply ``select`` to what enters the LM head while the context is open."""
    if select is None:
        yield
        return
    handle = backbone.get_output_embeddings().register_forward_pre_hook(lambda _module, args: (select(args[0]),))
    try:
        yield
    finally:
        handle.remove()
