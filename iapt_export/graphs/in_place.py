"""Reading instructions and every later step over a cache that is written in place: one graph for both, or two.

``serve`` is both in one, with ONNX Runtime's own attention. ``serve_prefill`` and ``serve_decode`` are of standard
operators, for TensorRT: each is `serve` with the flag known while it is traced, so that what it skips is not in it.

A row is laid out ``[its prompt slots | its tokens | padding]`` and its cache entries stand where they are counted:
position is place. So rows of any length share a batch, each writes at its own end, and a row's slots are exactly those
that its method has. What only the reading of an instruction needs is marked with a flag, and skipped in later steps.

Shapes: B batch, T positions of this step (slots, tokens, padding), P slots, C capacity of the cache, D hidden width,
H key/value heads, K head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import iapt_export.graphs.ops.serving_ops  # noqa: F401  (registers torch.ops.iapt.attend_in_place and instruction_only)
from trainers.decoder.attention import attending_with, grouped_attention, read_options
from trainers.decoder.family import cache_argument
from trainers.decoder.insertion import decoder_layers, hooked, projected, selected
from trainers.decoder.method import Method, Part, Rows


@dataclass
class Step:
    """One step's inputs."""

    position_ids: Tensor
    """``[B, T]`` int64, counted on through the padding; from 0 on where instructions are read."""
    seqlens_k: Tensor
    """``[B]`` int32, each row's entries after this step, less one."""
    total: Tensor | None
    """int32 scalar, the largest of them plus one; None makes the attention of standard operators."""
    past: list[Tensor]
    """Key and value buffers ``[B, H, C, K]`` of layer 0, of layer 1, and so on."""
    flag: Tensor | bool | None = None
    """Whether instructions are read: a boolean scalar, or known while tracing; None where no method needs it."""
    every: bool = False
    """Give logits behind every position, not behind each row's last one."""
    present: list[Tensor] = field(default_factory=list)
    """The buffers after the step, which share the memory of ``past``."""


def serve(backbone: Any, rows: Rows, input_ids: Tensor, step: Step) -> Tensor:
    """Run a backbone over one step.

    Args:
        backbone: a causal LM of transformers, under `in_place_attention`.
        rows: what is done to each row.
        input_ids: ``[B, T]`` int64, any token at slots and padding.
        step: the rest of the step's inputs; ``present`` is filled.

    Returns:
        Logits ``[B, 1, V]`` after each row's last token, or ``[B, T, V]`` after all.
    """
    layout = _Layout(rows, step)
    hidden = layout.embed(input_ids, backbone.get_input_embeddings()(input_ids))
    last = (step.seqlens_k.long() - step.position_ids[:, 0])[:, None, None]  # [B, 1, 1]
    with contextlib.ExitStack() as stack:
        stack.enter_context(hooked(decoder_layers(backbone), layout.before_layer))
        stack.enter_context(projected(backbone, _OneByOne(*rows.parts) if step.every else rows))
        if not step.every:
            select = lambda states: states.gather(1, last.expand(-1, 1, states.shape[-1]))  # noqa: E731
            stack.enter_context(selected(backbone, select))
        stack.enter_context(_attending(step))
        output = backbone(
            inputs_embeds=hidden,
            position_ids=step.position_ids,
            use_cache=True,
            **cache_argument(backbone, _PassThrough(layout.key_value)),
        )
    return output.logits


class _OneByOne(Rows):
    """Rows that change linear layers for one token after the other: another number of tokens takes another kernel for
    products with a tenant's weights, and the last bits differ.
    """

    def project(self, layer: int, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `trainers.decoder.method.Method.project`."""
        pairs = zip(inputs.split(1, dim=1), outputs.split(1, dim=1), strict=True)
        return torch.cat([super(_OneByOne, self).project(layer, name, *pair) for pair in pairs], dim=1)


class _Layout:
    """Where a row's slots and tokens stand, and how a method's parts get there."""

    def __init__(self, rows: Rows, step: Step) -> None:
        self.rows = rows
        self.step = step
        place = step.position_ids  # [B, T]
        counts = [
            part.method.num_slots * (1 if part.active is None else part.active.long()[:, None]) for part in rows.parts
        ]
        slots = sum(counts) if counts else 0
        self.is_slot = place < slots  # [B, T]
        self.is_instruction = ((place >= slots) & (place <= step.seqlens_k[:, None])).long()

    def embed(self, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        """Embeddings of the tokens, and in the slots the soft prompts of methods that have one, else zeros."""
        for part in self.rows.parts:
            changed = part.method.embed(part.weights, input_ids, embeddings, self.is_instruction)
            if changed is not embeddings:
                changed = part.choose(changed, embeddings)
                embeddings = changed if part.method.in_decode else self.only(changed, embeddings)
        if self.rows.num_slots == 0:
            return embeddings
        changed = embeddings.masked_fill(self.is_slot[..., None], 0)
        for part in self.rows.parts:
            prompt = part.method.soft_prompt(part.weights)
            if prompt is not None:
                changed = self._replaced(part, changed, changed, 1, _always(prompt))
        return self.only(changed, embeddings)

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """Put what each method makes into its rows' slots."""

        def make(part: Part, slots: Tensor) -> Tensor:
            return part.method.slots(part.weights, layer, slots, hidden, self.is_instruction)

        changed = hidden
        for part in self.rows.parts:
            changed = self._replaced(part, changed, hidden, 1, make)
        return hidden if changed is hidden else self.only(changed, hidden)

    def key_value(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Set the keys and values ``[B, H, T, K]`` of the slots of methods that bring them."""
        both = []
        for which, plain in enumerate((key, value)):

            def make(part: Part, slots: Tensor, which: int = which) -> Tensor:
                return part.method.key_value(part.weights, layer, slots, slots)[which]

            changed = plain
            for part in self.rows.parts:
                if part.method.changes_cache:
                    changed = self._replaced(part, changed, plain, 2, make)
            both.append(plain if changed is plain else self.only(changed, plain))
        return both[0], both[1]

    def only(self, changed: Tensor, unchanged: Tensor) -> Tensor:
        """``changed`` while instructions are read, ``unchanged`` in later steps."""
        assert self.step.flag is not None
        if isinstance(self.step.flag, bool):
            return changed if self.step.flag else unchanged
        return torch.ops.iapt.instruction_only(changed, unchanged, self.step.flag)

    def _replaced(
        self, part: Part, target: Tensor, read: Tensor, axis: int, make: Callable[[Part, Tensor], Tensor]
    ) -> Tensor:
        """``target`` with the slots of a part's rows replaced by what the part makes of those of ``read``."""
        count = part.method.num_slots
        if count == 0:
            return target
        length = target.shape[axis]
        first = torch.arange(count, device=read.device).clamp(max=length - 1)
        slots = read.index_select(axis, first)
        changed = make(part, slots)
        if changed is slots:
            return target
        changed = part.choose(changed.to(target.dtype), target.index_select(axis, first))
        if self.step.total is None:  # behind slices of a computed length TensorRT knows no size any more
            places = torch.arange(length, device=read.device)
            spread = changed.index_select(axis, places.clamp(max=count - 1))
            return torch.where((places < count)[:, None], spread, target)
        return torch.ops.iapt.set_first(target, changed, length, axis)


def _always(prompt: Tensor) -> Callable[[Part, Tensor], Tensor]:
    return lambda _part, slots: prompt.expand_as(slots)


class _PassThrough(DynamicCache):
    """Hands new keys and values on to the attention, which owns the buffers."""

    def __init__(self, change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.change = change

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of this step ``[B, H, T, K]``."""
        return self.change(layer_idx, key_states, value_states)


_steps: list[Step] = []
"""The step under way: attention functions of transformers take no arguments of ours."""


@contextlib.contextmanager
def _attending(step: Step) -> Iterator[None]:
    step.present = list(step.past)
    _steps.append(step)
    try:
        yield
    finally:
        _steps.pop()


def in_place_attention(backbone: Any) -> AbstractContextManager[None]:
    """Let a backbone attend over the buffers of the step under way, while the context is open."""
    return attending_with(backbone, "iapt_export_in_place", _attend, lambda *_args, **_kwargs: None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # none: see `in_place_attention`; some families pass it by name
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [B, heads, T, K]`` over the cache and ``key, value [B, H, T, K]``."""
    step, layer = _steps[-1], int(module.layer_idx)  # type: ignore[arg-type]
    batch, heads, length, width = query.shape
    options = read_options(module, arguments)
    past = step.past[2 * layer : 2 * layer + 2]
    if step.total is None:
        begin = step.position_ids[:, 0]
        keys, values = (torch.ops.iapt.tensor_scatter(*pair, begin) for pair in zip(past, (key, value), strict=True))
        step.present[2 * layer], step.present[2 * layer + 1] = keys, values
        seen = _seen(step.position_ids, past[0].shape[2], options.window)
        return grouped_attention(module, query, keys, values, seen, scaling, **arguments)

    def flat(states: Tensor) -> Tensor:
        return states.transpose(1, 2).reshape(batch, length, -1)

    mixed, step.present[2 * layer], step.present[2 * layer + 1] = torch.ops.iapt.attend_in_place(
        flat(query),
        flat(key),
        flat(value),
        past,
        [step.seqlens_k, step.total],
        [] if options.sinks is None else [options.sinks],
        [float(scaling if scaling is not None else width**-0.5), options.softcap],
        options.window,
    )
    return mixed.reshape(batch, length, heads, width), None


def _seen(position_ids: Tensor, capacity: int, window: int) -> Tensor:
    """``[B, 1, T, C]`` bool: the entries that each position attends to, itself and those before it."""
    entries = torch.arange(capacity, device=position_ids.device)
    positions = position_ids[:, None, :, None]
    return (entries <= positions) if window < 0 else (entries <= positions) & (entries > positions - window)


def needs_flag(methods: list[Method]) -> bool:
    """Whether anything is computed only while instructions are read."""
    return any(method.num_slots or type(method).embed is not Method.embed for method in methods)
