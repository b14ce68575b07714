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
from trainers.decoder.insertion import continue_from, read_instruction
from trainers.decoder.method import rows_of
from trainers.decoder.rounded import on_disk
from trainers.decoder.streamed import is_streamed
from validation.sides.cases import Prompt
from validation.sides.reference import Reference, numpy

Given = tuple[Prompt, tuple[int, ...]]
"""A prompt, and the tokens that follow it."""


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

    @property
    def free(self) -> list[int]:
        """PyTorch's own greedy answer, as far as it is known: up to the first likeliest token that was not fed."""
        return self.tokens[: num_equal(self.tokens, self.fed) + 1]


def num_equal(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False)))


def record_truth(
    reference: Reference,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    num_kept: int,
    given: Sequence[Given] = (),
    drafts: Sequence[Sequence[int]] | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_given: Callable[[int], None] = lambda _: None,
) -> list[Truth]:
    """Generate greedily with the reference, tenant by tenant, past any end token; and read what is given.

    Every row is computed alone and without padding, as ``generate`` would for that prompt: what padding does to a row
    of some families, the reference must not share. Drafts only save time: each token is the reference's own choice
    after those before it.

    A classifier ends after two tokens; going on compares every row over the same number of steps.

    Over a streamed backbone a draft is read once, because each further token of the reference's own would cost a
    reading of all weights: what follows the first token that PyTorch would not have chosen is compared after the
    draft's tokens, and `Truth.free` ends there.

    Args:
        reference: the PyTorch side.
        prompts: in the order of the comparison.
        new_tokens: tokens for each prompt.
        num_kept: the first so many prompts keep their logits and caches.
        given: further rows, whose tokens are given: all of them in one pass, which is quick.
        drafts: tokens of each prompt that the reference may choose, ``new_tokens`` each; without them PyTorch drafts,
            rows together, which takes longer than reading drafts does.
        on_step: called after each step of PyTorch's drafts, for progress.
        on_given: called with the number of each given row before it is computed.

    Returns:
        One `Truth` for each prompt, in their order, then one for each given row: logits of a step more than there are
        tokens, and the caches that prefill and the whole leave.
    """
    if drafts is None:
        drafts = _drafts(reference, prompts, new_tokens, on_step)
    free = [Truth(prompt) for prompt in prompts]
    fed = [Truth(prompt, forced=tokens) for prompt, tokens in given]

    def generating(number: int, truth: Truth) -> Callable[[Reference], None]:
        return lambda own: _record_greedy(own, truth, list(drafts[number]), is_kept=number < num_kept)

    def reading(number: int, truth: Truth) -> Callable[[Reference], None]:
        def read(own: Reference) -> None:
            on_given(number)
            _record_forced(own, truth, is_kept=True)

        return read

    numbered = [generating(*each) for each in enumerate(free)] + [reading(*each) for each in enumerate(fed)]
    reference.together(numbered)  # over a streamed backbone, one reading of the weights for all of them
    return free + fed


def _drafts(
    reference: Reference, prompts: Sequence[Prompt], new_tokens: int, on_step: Callable[[], None]
) -> list[list[int]]:
    """Likely tokens of each prompt."""
    batches = list(_batches(reference, prompts))

    def drafting(tenant: str, numbers: list[int]) -> Callable[[Reference], list[list[int]]]:
        return lambda own: _draft(own, tenant, [prompts[number] for number in numbers], new_tokens, on_step)

    drafted = reference.together([drafting(*batch) for batch in batches])
    made = {
        number: draft
        for (_, numbers), drafts in zip(batches, drafted, strict=True)
        for number, draft in zip(numbers, drafts, strict=True)
    }
    return [made[number] for number in range(len(prompts))]


def _batches(reference: Reference, prompts: Sequence[Prompt]) -> Iterator[tuple[str, list[int]]]:
    """The numbers of each tenant's prompts, and of the backbone's own, a few at a time."""
    for tenant in reference.methods:
        numbers = [number for number, prompt in enumerate(prompts) if prompt.tenant == tenant]
        for start in range(0, len(numbers), 8):
            yield tenant, numbers[start : start + 8]


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


def _record_greedy(reference: Reference, row: Truth, draft: list[int], *, is_kept: bool) -> None:
    """The row's own greedy tokens: the draft where reading it gives it again, else how PyTorch goes on itself.

    Over a streamed backbone the first pass is the last: what follows the draft.
    """
    while True:
        row.forced = tuple(draft[:-1])
        _record_forced(reference, row, is_kept=is_kept)
        same = num_equal(row.tokens, draft)
        if same >= len(draft) - 1:
            row.forced = ()
            return
        if is_streamed(reference.model):
            return
        draft = _continued(reference, row.prompt, row.tokens[: same + 1], len(draft))


@torch.no_grad()
def _continued(reference: Reference, prompt: Prompt, tokens: list[int], length: int) -> list[int]:
    """A draft of that length: these tokens, and PyTorch's likeliest after them, one a step."""
    logits, cache = _in_turn(reference, Truth(prompt, forced=tuple(tokens)))
    before = reference.methods[prompt.tenant].num_slots + len(prompt.tokens)
    for num_tokens in range(len(tokens) + 1, length + 1):
        tokens = [*tokens, int(logits[-1].argmax())]
        mask = torch.ones(1, before + num_tokens, dtype=torch.long)
        logits = reference.decode(prompt.tenant, torch.tensor(tokens[-1:]), mask, cache)
    return tokens


@torch.no_grad()
def _record_forced(reference: Reference, row: Truth, *, is_kept: bool) -> None:
    """What follows the prompt and the row's forced tokens.

    They are read after the prompt, in one pass over them. Over a streamed backbone they are read together with it, as
    in training, which reads the weights once: what a token attends to is the same.
    """
    read = _at_once if is_streamed(reference.model) else _in_turn
    logits, cache = read(reference, row)  # [K+1, V]
    entries = logits.shape[0] - 1
    views = _on_disk if is_streamed(reference.model) else _views
    row.final_cache = views(cache) if is_kept else []
    row.prefill_cache = [
        (key[:, : key.shape[1] - entries], value[:, : value.shape[1] - entries]) for key, value in row.final_cache
    ]
    row.tokens, row.margins, row.logits, row.peak = [], [], [], 0.0
    for step in logits:
        _take_step(row, step, is_kept=is_kept)


def _in_turn(reference: Reference, row: Truth) -> tuple[Tensor, DynamicCache]:
    """Logits ``[K+1, V]`` after the prompt and after each of K forced tokens, and the cache of all of them."""
    ids = torch.tensor([row.prompt.tokens])
    first, cache = reference.prefill(row.prompt.tenant, ids, torch.ones_like(ids))
    fed = torch.tensor([row.forced], dtype=torch.long)  # [1, K]
    if not fed.shape[1]:
        return first, cache
    rows = rows_of(reference.methods[row.prompt.tenant])
    mask = fed.new_ones(1, rows.num_slots + ids.shape[1] + fed.shape[1])
    return torch.cat([first, continue_from(reference.model, rows, fed, mask, cache).logits[0]]), cache


def _at_once(reference: Reference, row: Truth) -> tuple[Tensor, DynamicCache]:
    """`_in_turn` in one pass; methods read the prompt alone, as they do in training."""
    ids = torch.tensor([row.prompt.tokens + row.forced])
    instruction = torch.zeros_like(ids)
    instruction[:, : len(row.prompt.tokens)] = 1
    rows, cache = rows_of(reference.methods[row.prompt.tenant]), DynamicCache()
    last = rows.num_slots + len(row.prompt.tokens) - 1
    output = read_instruction(
        reference.model,
        rows,
        ids,
        torch.ones_like(ids),
        instruction_mask=instruction,
        select=lambda hidden: hidden[:, last:],
        cache=cache,
    )
    logits: Tensor = output.logits[0]
    return logits, cache


def _views(cache: DynamicCache) -> RowCache:
    """The only row's entries of a PyTorch cache, where they are."""
    return [(numpy(layer.keys[0]), numpy(layer.values[0])) for layer in cache.layers]


def _on_disk(cache: DynamicCache) -> RowCache:
    """`_views` mapped from a file: of a backbone that does not fit into memory, a token's entries are large as well."""
    arrays = [array for pair in _views(cache) for array in pair]
    ends = list(itertools.accumulate(array.size for array in arrays))
    mapped = np.split(on_disk([array.ravel() for array in arrays]), ends[:-1])
    shaped = [flat.reshape(array.shape) for flat, array in zip(mapped, arrays, strict=True)]
    return list(zip(shaped[::2], shaped[1::2], strict=True))


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
