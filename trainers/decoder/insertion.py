"""Put a method into a frozen decoder: the only file that knows how a backbone is laid out.

Our choices, fixed in every bundle's manifest: prompts are prepended; a method that makes prompts at every layer
replaces what the layer before made of them; prompt slots hold positions 0..P-1 and tokens follow, counted over real
tokens only; a slot that a row's method does not use is masked like padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from iapt_export.contract.errors import IaptError
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.family import cache_argument, check_family
from trainers.decoder.method import Rows


def decoder_layers(backbone: Any) -> nn.ModuleList:
    """The decoder's list of layers, see `layers_path`."""
    layers: nn.ModuleList = backbone.get_submodule(layers_path(backbone))
    return layers


def layers_path(backbone: Any) -> str:
    """Name of the decoder's list of layers, found by its length and its place nearest the root.

    Raises:
        IaptError: no list of ``config.num_hidden_layers`` modules exists.
    """
    num_layers = backbone.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not lists:
        raise IaptError(
            f"no list of {num_layers} decoder layers was found in {type(backbone).__name__}; "
            "only decoder-only language models with one list of layers are supported"
        )
    return min(lists, key=lambda name: (name.count("."), name))


def sizes_of(backbone: Any) -> Sizes:
    """The sizes that methods' tensors and graphs depend on: those of its cache as `trainers.decoder.family` sees them.

    Raises:
        IaptError: the model's family is not supported.
    """
    config = backbone.config.get_text_config()
    family = check_family(backbone)
    return Sizes(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=family.num_kv_heads,
        head_dim=family.head_dim,
        value_dim=family.value_dim,
        vocab_size=config.vocab_size,
        linears=_common_linears(decoder_layers(backbone)),
        layers_path=layers_path(backbone),
    )


def _common_linears(layers: nn.ModuleList) -> dict[str, tuple[int, int]]:
    """The linear layers that every decoder layer has in one size; some decoders mix dense and sparse layers."""
    first, *others = [{name: _linear_size(module) for name, module in linear_layers(layer).items()} for layer in layers]
    return {name: size for name, size in first.items() if all(other.get(name) == size for other in others)}


def linear_layers(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a decoder layer by name; GPT-2 keeps its own transposed kind."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _linear_size(module: nn.Module) -> tuple[int, int]:
    inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)  # type: ignore[arg-type]
    return int(inputs), int(outputs)


def read_instruction(
    backbone: Any,
    rows: Rows,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    instruction_mask: Tensor | None = None,
    select: Callable[[Tensor], Tensor] | None = None,
    cache: Any = None,
) -> Any:
    """Run a backbone over ``[prompt slots; tokens]``.

    Args:
        backbone: a causal LM of transformers.
        rows: what is done to each row.
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 1 at real tokens; padding may stand on either side.
        instruction_mask: ``[B, T]``, 1 at the tokens that methods may read; None means all real tokens.
        select: applied to the final hidden states ``[B, P+T, D]`` before the LM head, to compute only some logits.
        cache: an empty one to fill, or None to keep none.

    Returns:
        The backbone's output; logits and cache include the P prompt slots unless ``select`` dropped them.
    """
    readable = attention_mask if instruction_mask is None else instruction_mask
    rows = rows.prepared(backbone, input_ids, readable)
    embeddings = rows.embed(input_ids, backbone.get_input_embeddings()(input_ids), readable)  # [B, T, D]
    count = rows.num_slots
    prompts = rows.prompts(embeddings.new_zeros(embeddings.shape[0], count, embeddings.shape[2]))  # [B, P, D]
    mask = torch.cat([rows.slot_mask(attention_mask), attention_mask], dim=1)  # [B, P+T]
    if rows.changes_cache and cache is None:
        cache = DynamicCache()  # where keys and values pass by, also in training

    # without a prompt in front, padding on the left sees nothing; what runtimes make of that may be NaN, and spreads
    sees_nothing = rows.mixed or (bool(rows.parts) and count == 0)

    def replace(layer: int, hidden: Tensor) -> Tensor:
        if sees_nothing:
            hidden = hidden.masked_fill(mask[..., None] == 0, 0)
        slots = hidden[:, :count]
        changed = rows.slots(layer, slots, hidden[:, count:], readable)
        return hidden if changed is slots else torch.cat([changed, hidden[:, count:]], dim=1)

    with ExitStack() as stack:
        if count or sees_nothing:
            stack.enter_context(hooked(decoder_layers(backbone), replace))
        if rows.changes_cache:
            stack.enter_context(_cache_filled(cache, rows))
        stack.enter_context(projected(backbone, rows))
        stack.enter_context(selected(backbone, select))
        return backbone(
            inputs_embeds=torch.cat([prompts, embeddings], dim=1) if count else embeddings,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=cache is not None,
            **cache_argument(backbone, cache),
        )


def continue_from(
    backbone: Any,
    rows: Rows,
    input_ids: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    *,
    position_ids: Tensor | None = None,
) -> Any:
    """Run a backbone over tokens that follow a filled cache.

    Args:
        backbone: a causal LM of transformers.
        rows: what was done to each row when the instruction was read.
        input_ids: ``[B, K]`` int64, the next tokens.
        mask: ``[B, S+K]`` int64 over the cache's entries and these tokens.
        cache: S entries a layer, extended in place.
        position_ids: ``[B, K]``; None counts the mask's real tokens.

    Returns:
        The backbone's output with logits ``[B, K, V]``.
    """
    rows = rows.in_decode
    token_mask = mask[:, -input_ids.shape[1] :]
    tokens: dict[str, Tensor] = {"input_ids": input_ids}
    if rows.parts:
        tokens = {"inputs_embeds": rows.embed(input_ids, backbone.get_input_embeddings()(input_ids), token_mask)}
    with projected(backbone, rows):
        return backbone(
            **tokens,
            attention_mask=mask,
            position_ids=positions(mask)[:, -input_ids.shape[1] :] if position_ids is None else position_ids,
            use_cache=True,
            **cache_argument(backbone, cache),
        )


def positions(mask: Tensor) -> Tensor:
    """Position ids ``[B, S]`` that count real tokens only, from a mask ``[B, S]``; padding repeats its neighbour's."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def last_token(mask: Tensor) -> Tensor:
    """Index ``[B]`` of each row's last real token in ``mask [B, S]``."""
    index = torch.arange(mask.shape[1], device=mask.device)
    return (mask * index).argmax(dim=1)


@contextmanager
def hooked(layers: nn.ModuleList, replace: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Pass every layer's input through ``replace(layer, hidden)`` while the context is open."""

    def hook_for(index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (replace(index, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": replace(index, kwargs["hidden_states"])}

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _cache_filled(cache: DynamicCache, rows: Rows) -> Iterator[None]:
    """Let the rows set the slots' keys and values where a layer hands them to the cache, after RoPE."""
    update = cache.update

    def filled(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        count = rows.num_slots
        slot_entries = rows.key_value(layer, key[:, :, :count], value[:, :, :count])
        both = zip(slot_entries, (key, value), strict=True)
        key, value = (torch.cat([new, old[:, :, count:]], dim=2) for new, old in both)
        return update(key, value, layer, *args, **kwargs)

    cache.update = filled
    try:
        yield
    finally:
        del cache.update


@contextmanager
def projected(backbone: Any, rows: Rows) -> Iterator[None]:
    """Pass the outputs of linear layers through the rows while the context is open.

    A shared expert gets the tokens of all rows in one list ``[B T, M]``, latents are expanded as ``[B, 1, S, M]``; rows
    see them as ``[B, T, M]``.
    """
    batch = [0]  # of the layer that runs

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch[0] = (args[0] if args else kwargs["hidden_states"]).shape[0]

    def hook_for(layer: int, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if output.dim() == 3:
                return rows.project(layer, name, args[0], output)
            by_row = (part.reshape(batch[0], -1, part.shape[-1]) for part in (args[0], output))
            return rows.project(layer, name, *by_row).reshape(output.shape)

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(backbone) if rows.linear_names else ()):
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            linears = linear_layers(layer)
            for name in rows.linear_names:
                stack.callback(linears[name].register_forward_hook(hook_for(index, name)).remove)
        yield


@contextmanager
def selected(backbone: Any, select: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Apply ``select`` to what enters the LM head while the context is open."""
    if select is None:
        yield
        return
    handle = backbone.get_output_embeddings().register_forward_pre_hook(lambda _module, args: (select(args[0]),))
    try:
        yield
    finally:
        handle.remove()
