"""The reference: eager PyTorch generation with a KV cache. Everything exported is compared with this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trainers.insertion import PromptFunction, forward_with_prompts, last_token


@torch.no_grad()
def prefill(
    model: Any, generator: PromptFunction, num_prompt_tokens: int, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, DynamicCache]:
    """Read the instruction once, prompts included.

    Args:
        model: the frozen backbone.
        generator: the adapter's module (or any prompt function).
        num_prompt_tokens: P.
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, padding on either side.

    Returns:
        Logits ``[B, V]`` after each row's last real token, and the cache with P + T entries per layer.
    """
    cache = DynamicCache()
    index = last_token(attention_mask) + num_prompt_tokens  # [B]
    rows = torch.arange(len(input_ids), device=input_ids.device)
    output = forward_with_prompts(
        model,
        generator,
        num_prompt_tokens,
        input_ids,
        attention_mask,
        select=lambda hidden: hidden[rows, index][:, None],  # [B, 1, D]
        past_key_values=cache,
    )
    return output.logits[:, 0], cache


@torch.no_grad()
def decode(model: Any, token: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
    """One plain backbone step.

    Args:
        model: the frozen backbone.
        token: ``[B]`` int64, the tokens just chosen.
        attention_mask: ``[B, S+1]`` int64 over the cache (prompt rows first) and the new token.
        cache: S entries per layer, extended in place.

    Returns:
        Logits ``[B, V]``.
    """
    position = attention_mask.sum(dim=1, keepdim=True) - 1  # [B, 1]
    output = model(
        input_ids=token[:, None],
        attention_mask=attention_mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1]


@torch.no_grad()
def greedy(
    model: Any,
    generator: PromptFunction,
    num_prompt_tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] = (),
) -> tuple[list[list[int]], list[list[float]]]:
    """Choose the likeliest token until each row ends.

    Returns:
        Per row the new token ids (its EOS included), and for each the lead of the best logit over the second.
    """
    logits, cache = prefill(model, generator, num_prompt_tokens, input_ids, attention_mask)
    batch = len(input_ids)
    mask = torch.cat([attention_mask.new_ones(batch, num_prompt_tokens), attention_mask], dim=1)
    tokens: list[list[int]] = [[] for _ in range(batch)]
    margins: list[list[float]] = [[] for _ in range(batch)]
    done = [False] * batch
    for step in range(max_new_tokens):
        best = logits.topk(2, dim=-1)
        for row in range(batch):
            if not done[row]:
                tokens[row].append(int(best.indices[row, 0]))
                margins[row].append(float(best.values[row, 0] - best.values[row, 1]))
                done[row] = tokens[row][-1] in eos_token_ids
        if all(done) or step + 1 == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        logits = decode(model, best.indices[:, 0], mask, cache)
    return tokens, margins
