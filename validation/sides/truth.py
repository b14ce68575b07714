"""The reference's answers to the comparison's prompts, recorded once and held against every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from engines.serving.stepper import RowCache
from trainers.decoder.insertion import continue_from
from trainers.decoder.method import rows_of
from validation.sides.cases import Prompt
from validation.sides.reference import Reference, numpy


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
    prompts: Sequence[Prompt],
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
    for tenant, rows in _batches(reference, truths):
        _record_batch(reference, tenant, rows, new_tokens, kept, on_step)
    return truths


def record_fed(reference: Reference, prompts: Sequence[Prompt], fed: Sequence[tuple[int, ...]]) -> list[Truth]:
    """What PyTorch computes when given tokens follow each prompt: all of them in one pass, which is quick.

    Args:
        reference: the PyTorch side.
        prompts: what is read first.
        fed: each prompt's tokens that follow, as many for each.

    Returns:
        One `Truth` for each prompt, in their order: logits of a step more than there are tokens, and the caches
        that prefill and the whole leave.
    """
    truths = [Truth(prompt, forced=tokens) for prompt, tokens in zip(prompts, fed, strict=True)]
    for tenant, rows in _batches(reference, truths):
        _record_fed_batch(reference, tenant, rows)
    return truths


def _batches(reference: Reference, truths: list[Truth]) -> Iterator[tuple[str, list[Truth]]]:
    """Each tenant's rows, a few at a time."""
    for tenant in reference.manifest.tenants:
        rows = [truth for truth in truths if truth.prompt.tenant == tenant.name]
        for start in range(0, len(rows), 8):
            yield tenant.name, rows[start : start + 8]


@torch.no_grad()
def _record_batch(
    reference: Reference,
    tenant: str,
    rows: list[Truth],
    new_tokens: int,
    kept: set[int],
    on_step: Callable[[], None],
) -> None:
    logits, cache, mask = _read(reference, tenant, rows)
    for index, row in _kept_rows(rows, kept):
        row.prefill_cache = row_cache(cache, mask, index)
    for step in range(new_tokens):
        for index, row in enumerate(rows):
            _take_step(row, logits[index], is_kept=id(row) in kept)
        on_step()
        if step + 1 < new_tokens:
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = reference.decode(tenant, logits.argmax(dim=-1), mask, cache)
    for index, row in _kept_rows(rows, kept):
        row.final_cache = row_cache(cache, mask, index)


@torch.no_grad()
def _record_fed_batch(reference: Reference, tenant: str, rows: list[Truth]) -> None:
    first, cache, mask = _read(reference, tenant, rows)
    for index, row in enumerate(rows):
        row.prefill_cache = row_cache(cache, mask, index)
    logits = first[:, None]  # [B, 1, V]
    fed = torch.tensor([row.forced for row in rows])  # [B, K]
    if fed.shape[1]:
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
        methods = rows_of(reference.methods[tenant])
        logits = torch.cat([logits, continue_from(reference.model, methods, fed, mask, cache).logits], dim=1)
    for index, row in enumerate(rows):
        row.final_cache = row_cache(cache, mask, index)
        for step in logits[index]:
            _take_step(row, step, is_kept=True)


def _read(reference: Reference, tenant: str, rows: list[Truth]) -> tuple[Tensor, DynamicCache, Tensor]:
    """Prefill: logits ``[B, V]``, the cache, and its mask ``[B, P+T]``, prompt slots included."""
    ids, mask = padded([row.prompt.tokens for row in rows], reference.manifest.backbone.pad_token_id)
    logits, cache = reference.prefill(tenant, ids, mask)
    return logits, cache, torch.cat([mask.new_ones(len(rows), reference.methods[tenant].num_slots), mask], dim=1)


def _take_step(row: Truth, logits: Tensor, *, is_kept: bool) -> None:
    """Note a step's ``[V]`` logits."""
    best = logits.topk(2)
    row.tokens.append(int(best.indices[0]))
    row.margins.append(float(best.values[0] - best.values[1]))
    row.peak = max(row.peak, float(logits.abs().max()))
    if is_kept:
        row.logits.append(numpy(logits))


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
