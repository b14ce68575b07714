"""The reference's answers to the comparison's prompts, recorded once and held against every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from engines.stepper import RowCache
from trainers.insertion import continue_from
from trainers.method import rows_of
from validation.cases import Prompt
from validation.reference import Reference, numpy


@dataclass
class Truth:
    """What PyTorch computes for one prompt."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    """The likeliest token of each step."""
    margins: list[float] = field(default_factory=list)
    """Lead of the best logit over the second at each step."""
    peak: float = 0.0
    """Largest absolute logit seen."""
    logits: list[np.ndarray] = field(default_factory=list)
    """``[V]`` for each step; kept only where asked for."""
    prefill_cache: RowCache = field(default_factory=list)
    final_cache: RowCache = field(default_factory=list)
    forced: tuple[int, ...] = ()
    """Tokens that are fed in place of the likeliest; empty where those are fed."""

    @property
    def fed(self) -> tuple[int, ...]:
        """The tokens that follow the prompt, one less than there are steps."""
        return self.forced or tuple(self.tokens[:-1])


def record_truth(
    reference: Reference,
    prompts: list[Prompt],
    *,
    new_tokens: int,
    num_kept: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[Truth]:
    """Generate greedily with the reference, tenant by tenant, past any end token.

    A classifier ends after two tokens; going on compares every row over the same number of steps.

    Args:
        reference: the PyTorch side.
        prompts: in the order of the comparison.
        new_tokens: tokens for each prompt.
        num_kept: the first so many prompts keep their logits and caches.
        on_step: called after each step, for progress.

    Returns:
        One `Truth` for each prompt, in their order.
    """
    truths = [Truth(prompt) for prompt in prompts]
    kept = {id(truth) for truth in truths[:num_kept]}
    for tenant in reference.manifest.tenants:
        rows = [truth for truth in truths if truth.prompt.tenant == tenant.name]
        for start in range(0, len(rows), 8):
            _record_batch(reference, tenant.name, rows[start : start + 8], new_tokens, kept, on_step)
    return truths


@torch.no_grad()
def _record_batch(
    reference: Reference,
    tenant: str,
    rows: list[Truth],
    new_tokens: int,
    kept: set[int],
    on_step: Callable[[], None],
) -> None:
    ids, mask = padded([row.prompt.tokens for row in rows], reference.manifest.backbone.pad_token_id)
    logits, cache = reference.prefill(tenant, ids, mask)
    mask = torch.cat([mask.new_ones(len(rows), reference.methods[tenant].num_slots), mask], dim=1)
    for index, row in _kept_rows(rows, kept):
        row.prefill_cache = row_cache(cache, mask, index)
    for step in range(new_tokens):
        best = logits.topk(2, dim=-1)
        for index, row in enumerate(rows):
            row.tokens.append(int(best.indices[index, 0]))
            row.margins.append(float(best.values[index, 0] - best.values[index, 1]))
            row.peak = max(row.peak, float(logits[index].abs().max()))
            if id(row) in kept:
                row.logits.append(numpy(logits[index]))
        on_step()
        if step + 1 < new_tokens:
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = reference.decode(tenant, best.indices[:, 0], mask, cache)
    for index, row in _kept_rows(rows, kept):
        row.final_cache = row_cache(cache, mask, index)


@torch.no_grad()
def record_forced(reference: Reference, prompt: Prompt, forced: tuple[int, ...]) -> Truth:
    """What PyTorch computes when given tokens follow a prompt: all of them in one pass, which is quick.

    Args:
        reference: the PyTorch side.
        prompt: what is read first.
        forced: the tokens that follow.

    Returns:
        Logits of ``len(forced) + 1`` steps, and the cache that prefill and the whole leave.
    """
    truth = Truth(prompt, forced=forced)
    method = reference.methods[prompt.tenant]
    ids, mask = padded([prompt.tokens], reference.manifest.backbone.pad_token_id)
    first, cache = reference.prefill(prompt.tenant, ids, mask)
    mask = torch.cat([mask.new_ones(1, method.num_slots), mask], dim=1)
    truth.prefill_cache = row_cache(cache, mask, 0)
    logits = [first]
    if forced:
        mask = torch.cat([mask, mask.new_ones(1, len(forced))], dim=1)
        rows = rows_of(method)
        logits.append(continue_from(reference.model, rows, torch.tensor([forced]), mask, cache).logits[0])
    truth.final_cache = row_cache(cache, mask, 0)
    for step in torch.cat(logits):
        best = step.topk(2)
        truth.tokens.append(int(best.indices[0]))
        truth.margins.append(float(best.values[0] - best.values[1]))
        truth.peak = max(truth.peak, float(step.abs().max()))
        truth.logits.append(numpy(step))
    return truth


def padded(prompts: list[tuple[int, ...]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[B, T]``, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_token] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def row_cache(cache: DynamicCache, mask: Tensor, row: int) -> RowCache:
    """One row's entries of a PyTorch cache ``[B, H, S, K]``, where ``mask [B, S]`` is set."""
    real = mask[row].bool()
    return [(numpy(layer.keys[row][:, real]), numpy(layer.values[row][:, real])) for layer in cache.layers]


def _kept_rows(rows: list[Truth], kept: set[int]) -> Iterator[tuple[int, Truth]]:
    return ((index, row) for index, row in enumerate(rows) if id(row) in kept)
