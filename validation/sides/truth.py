"""The reference's answers to the comparison's prompts, recorded once and held against every target."""

from __future__ import annotations

import itertools
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

    Every row is computed alone and without padding, as ``generate`` would for that prompt: what padding does to a row
    of some families, the reference must not share. Rows together only draft the tokens, which saves time.

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
    batches = list(_batches(reference, truths))

    def drafting(tenant: str, rows: list[Truth]) -> Callable[[Reference], list[list[int]]]:
        return lambda with_model: _draft(with_model, tenant, [row.prompt for row in rows], new_tokens, on_step)

    def recording(tenant: str, row: Truth, draft: list[int]) -> Callable[[Reference], None]:
        return lambda with_model: _record_alone(with_model, tenant, row, draft, is_kept=id(row) in kept)

    drafts = reference.together([drafting(*batch) for batch in batches])
    reference.together(
        [
            recording(tenant, row, draft)
            for (tenant, rows), drafted in zip(batches, drafts, strict=True)
            for row, draft in zip(rows, drafted, strict=True)
        ]
    )
    return truths


def record_fed(
    reference: Reference,
    prompts: Sequence[Prompt],
    fed: Sequence[tuple[int, ...]],
    on_row: Callable[[int], None] = lambda _: None,
) -> list[Truth]:
    """What PyTorch computes when given tokens follow each prompt: all of them in one pass, which is quick.

    Args:
        reference: the PyTorch side.
        prompts: what is read first.
        fed: each prompt's tokens that follow.
        on_row: called with each row's number before it is computed, for progress.

    Returns:
        One `Truth` for each prompt, in their order: logits of a step more than there are tokens, and the caches
        that prefill and the whole leave.
    """
    truths = [Truth(prompt, forced=tokens) for prompt, tokens in zip(prompts, fed, strict=True)]

    def recording(number: int, truth: Truth) -> Callable[[Reference], None]:
        def record(with_model: Reference) -> None:
            on_row(number)
            _record_forced(with_model, truth.prompt.tenant, truth, is_kept=True)

        return record

    reference.together([recording(*numbered) for numbered in enumerate(truths)])
    return truths


def _batches(reference: Reference, truths: list[Truth]) -> Iterator[tuple[str, list[Truth]]]:
    """Each tenant's rows, and the backbone's own, a few at a time."""
    for tenant in reference.methods:
        rows = [truth for truth in truths if truth.prompt.tenant == tenant]
        for start in range(0, len(rows), 8):
            yield tenant, rows[start : start + 8]


@torch.no_grad()
def _draft(
    reference: Reference, tenant: str, prompts: list[Prompt], new_tokens: int, on_step: Callable[[], None]
) -> list[list[int]]:
    """Each row's likeliest tokens as the rows give them together, padded on the left."""
    ids, mask = padded([prompt.tokens for prompt in prompts], reference.manifest.backbone.pad_token_id)
    logits, cache = reference.prefill(tenant, ids, mask)
    mask = torch.cat([mask.new_ones(len(prompts), reference.methods[tenant].num_slots), mask], dim=1)
    chosen = [logits.argmax(dim=-1)]
    on_step()
    for _ in range(new_tokens - 1):
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        chosen.append(reference.decode(tenant, chosen[-1], mask, cache).argmax(dim=-1))
        on_step()
    return torch.stack(chosen, dim=1).tolist()


def _record_alone(reference: Reference, tenant: str, row: Truth, draft: list[int], *, is_kept: bool) -> None:
    """The row's own greedy tokens: the draft where reading it gives it again, else one token more a pass."""
    while True:
        row.forced = tuple(draft[:-1])
        _record_forced(reference, tenant, row, is_kept=is_kept)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(row.tokens, draft, strict=True)))
        if same >= len(draft) - 1:
            row.forced = ()
            return
        draft = [*draft[:same], row.tokens[same], *draft[same + 1 :]]


@torch.no_grad()
def _record_forced(reference: Reference, tenant: str, row: Truth, *, is_kept: bool) -> None:
    """What follows the prompt and the row's forced tokens, in one pass over those."""
    ids = torch.tensor([row.prompt.tokens])
    first, cache = reference.prefill(tenant, ids, torch.ones_like(ids))
    row.tokens, row.margins, row.logits, row.peak = [], [], [], 0.0
    row.prefill_cache = _copied(cache) if is_kept else []
    logits = first[:, None]  # [1, 1, V]
    fed = torch.tensor([row.forced], dtype=torch.long)  # [1, K]
    if fed.shape[1]:
        methods = rows_of(reference.methods[tenant])
        mask = fed.new_ones(1, methods.num_slots + ids.shape[1] + fed.shape[1])
        logits = torch.cat([logits, continue_from(reference.model, methods, fed, mask, cache).logits], dim=1)
    row.final_cache = _copied(cache) if is_kept else []
    for step in logits[0]:
        _take_step(row, step, is_kept=is_kept)


def _copied(cache: DynamicCache) -> RowCache:
    """The only row's entries of a PyTorch cache."""
    return [(numpy(layer.keys[0]), numpy(layer.values[0])) for layer in cache.layers]


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
