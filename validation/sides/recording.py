"""What PyTorch's modules compute while the reference runs one row, under the names of `validation.sides.taps`.

A run may also be given a `Hypothesis`: one deliberate mistake. Where it reproduces a target's wrong tensor, the mistake
has a name.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iapt_export.contract.graphs import PRESENT
from trainers.decoder.generate import decode, prefill
from trainers.decoder.insertion import layers_path
from trainers.decoder.method import Method, rows_of
from validation.sides.reference import Reference, numpy
from validation.sides.stepping import Row

Arrays = dict[str, np.ndarray]
OTHER_INPUT = "the generators read raw hidden states where they should be normalised, or the other way round"


@dataclass(frozen=True)
class Hypothesis:
    """One mistake that a target may have made."""

    says: str = ""
    """What it would mean, for the report."""
    kind: str = ""
    """``tenant``, ``position``, ``mask``, ``activation``, ``normalisation`` or ``scale``."""
    tenant: str | None = None
    """Compute the row as this tenant's; empty for the backbone alone."""
    shift: int = 0
    """Added to every position of the step."""
    padding: int = 0
    """Entries of padding before the row, which count as the faults below say."""
    positions_count_padding: bool = False
    padding_is_read: bool = False
    """Attention reads it."""
    padding_is_text: bool = False
    """It counts as tokens of the instruction, for everything."""
    future_is_read: bool = False
    form: str = ""
    """Evaluate the rational activation in this form."""
    normalised_otherwise: bool = False
    """Let the generators read raw hidden states where they should be normalised, or the other way round."""
    scale: float = 1.0
    """Factor on the attention scores, in ``module`` alone."""
    module: str = ""


HONEST = Hypothesis()


@torch.no_grad()
def record_row(
    reference: Reference, row: Row, step: int, hypothesis: Hypothesis = HONEST
) -> Iterator[tuple[int, Arrays]]:
    """Run one row alone over steps 0 to ``step``, and give out what its modules computed at each.

    Args:
        reference: the PyTorch side.
        row: what is run.
        step: the last step.
        hypothesis: the mistake to make, at the last step alone; what comes before was found right.

    Yields:
        The step's number, and tap name to array without the batch axis: hidden states ``[entries, D]``, keys, values
        and queries ``[H, entries, K]``, the row's padding left out.
    """
    model, pad = reference.model, hypothesis.padding
    method = reference.methods[row.tenant]
    ids = torch.tensor([[reference.manifest.backbone.pad_token_id] * pad + list(row.tokens)])
    mask = torch.tensor([[0] * pad + [1] * len(row.tokens)])
    slots = method.num_slots
    cache: Any = None
    for number in range(step + 1):
        seen: dict[str, Tensor] = {}
        wrong = hypothesis if number == step else HONEST
        tenant = row.tenant if wrong.tenant is None else wrong.tenant
        method = altered(reference.methods[tenant], wrong.form, wrong.normalised_otherwise)
        with ExitStack() as stack:
            stack.enter_context(_recorded(model, method, seen, wrong))
            stack.enter_context(_mistaken(model, wrong))
            if number == 0:
                read = torch.ones_like(mask) if wrong.padding_is_text else mask
                logits, cache = prefill(model, rows_of(method), ids, read)
                mask = torch.cat([mask.new_ones(1, slots), mask], dim=1)
            else:
                mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
                logits = decode(model, rows_of(method), torch.tensor([row.forced[number - 1]]), mask, cache)
        seen["logits"] = logits
        for layer, entries in enumerate(cache.layers):
            seen[f"{PRESENT}{layer}.key"], seen[f"{PRESENT}{layer}.value"] = entries.keys, entries.values
        yield number, {name: _without_padding(tensor, mask[0].bool()) for name, tensor in seen.items()}


def leaf_modules(model: Any) -> list[str]:
    """Paths of the backbone's modules that have no children."""
    return [path for path, module in model.named_modules() if path and not any(True for _ in module.children())]


@contextmanager
def _recorded(model: Any, method: Any, seen: dict[str, Tensor], wrong: Hypothesis) -> Iterator[None]:
    """Keep what modules without children read and make, queries, and what the rational activation reads and makes.

    The call itself is wrapped, not a hook added: LoRA changes outputs in hooks, and those count.
    """
    paths = {module: path for path, module in model.named_modules()}
    names = {name: model.get_submodule(name) for name in leaf_modules(model)}
    leaves = {module: name for name, module in names.items()}
    inside: list[str] = []
    num_heads = model.config.get_text_config().num_attention_heads
    call, attend = nn.Module.__call__, F.scaled_dot_product_attention

    def recorded_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside.append(paths.get(self, ""))
        try:
            result = call(self, *args, **kwargs)
        finally:
            inside.pop()
        if self in leaves and isinstance(result, Tensor):
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                seen[f"{leaves[self]}.input"] = args[0]
            seen[f"{leaves[self]}.output"] = result
        return result

    def recorded_attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # for one token, transformers may fold the heads that share keys into the axis of tokens
        seen[f"{inside[-1]}.query"] = query.reshape(len(query), num_heads, -1, query.shape[-1])
        return attend(query * wrong.scale if inside[-1] == wrong.module else query, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(_replaced(nn.Module, "__call__", recorded_call))
        stack.enter_context(_replaced(F, "scaled_dot_product_attention", recorded_attend))
        if method.rational_form:
            stack.enter_context(_rational_recorded(model, method, seen))
        yield


@contextmanager
def _rational_recorded(model: Any, method: Method, seen: dict[str, Tensor]) -> Iterator[None]:
    evaluate, slots = method.rational, method.slots
    layers = layers_path(model)
    at: list[int] = []

    def noting(weights: Any, layer: int, *args: Any) -> Tensor:
        at[:] = [layer]
        return slots(weights, layer, *args)

    def rational(pooled: Tensor, *args: Any) -> Tensor:
        seen[f"{layers}.{at[0]}.pooled"] = pooled
        seen[f"{layers}.{at[0]}.activated"] = evaluate(pooled, *args)
        return seen[f"{layers}.{at[0]}.activated"]

    method.rational, method.slots = rational, noting  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del method.slots
        method.rational = evaluate


def altered(method: Any, form: str = "", normalised_otherwise: bool = False) -> Any:
    """A copy of a method that evaluates its activation in another form, or reads its input in the other way."""
    method = copy.copy(method)
    if form and method.rational_form:
        evaluate = method.rational
        method.rational = lambda x, top, bottom, _: evaluate(x, top, bottom, form)
    if normalised_otherwise and method.generates:
        method.config = dataclasses.replace(method.config, normalize=not method.config.normalize)
    return method


@contextmanager
def _mistaken(model: Any, wrong: Hypothesis) -> Iterator[None]:
    """Change what the backbone is told about positions and masks."""

    def change(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        position, mask = kwargs["position_ids"], kwargs["attention_mask"]
        if wrong.positions_count_padding:
            total = mask.shape[1]
            position = torch.arange(total - position.shape[1], total)[None]
        if wrong.padding_is_read:
            mask = torch.ones_like(mask)
        if wrong.future_is_read:
            mask = mask[:, None, None].bool().expand(-1, 1, position.shape[1], -1)
        return args, {**kwargs, "position_ids": (position + wrong.shift).clamp(min=0), "attention_mask": mask}

    handle = model.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _without_padding(tensor: Tensor, real: Tensor) -> np.ndarray:
    """A row ``[1, ...]`` as an fp32 array without its batch axis and its padding."""
    row = tensor[0]
    for axis in range(row.dim() - 1):
        if row.shape[axis] == len(real) and len(real) > 1:
            return numpy(row.index_select(axis, real.nonzero()[:, 0])).copy()
    return numpy(row).copy()
