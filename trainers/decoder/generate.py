"""The reference: eager PyTorch generation with a KV cache. Everything exported is compared with this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trainers.decoder.insertion import continue_from, last_token, read_instruction
from trainers.decoder.method import Rows


@torch.no_grad()
def prefill(model: Any, rows: Rows, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, DynamicCache]:
    """Read the instruction once, prompts included.

    Args:
        model: the frozen backbone.
        rows: what is done to each row.
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, padding on either side.

    Returns:
        Logits ``[B, V]`` after each row's last real token, and the cache with P + T entries per layer.
    """
    cache = DynamicCache()
    index = last_token(attention_mask) + rows.num_slots  # [B]
    numbers = torch.arange(len(input_ids), device=input_ids.device)
    output = read_instruction(
        model,
        rows,
        input_ids,
        attention_mask,
        select=lambda hidden: hidden[numbers, index][:, None],  # [B, 1, D]
        cache=cache,
    )
    return output.logits[:, 0], cache


@torch.no_grad()
def decode(model: Any, rows: Rows, token: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """One step: the plain backbone's, but for methods that treat generated tokens too.

    Args:
        model: the frozen backbone.
        rows: what was done to each row when its instruction was read.
        token: ``[B]`` int64, the tokens just chosen.
        mask: ``[B, S+1]`` int64 over the cache (prompt slots first) and the new token.
        cache: S entries per layer, extended in place.

    Returns:
        Logits ``[B, V]``.
    """
    return continue_from(model, rows, token[:, None], mask, cache).logits[:, -1]


@torch.no_grad()
def greedy(
    model: Any,
    rows: Rows,
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
    logits, cache = prefill(model, rows, input_ids, attention_mask)
    batch = len(input_ids)
    mask = torch.cat([rows.slot_mask(attention_mask), attention_mask], dim=1)
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
        logits = decode(model, rows, best.indices[:, 0], mask, cache)
    return tokens, margins
