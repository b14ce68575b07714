"""Which of a decoder's layers are alike, and how many of the first show all that there is to see."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from iapt_export.contract.manifest import GraphSpec
from iapt_export.graphs.installed import Installed
from trainers.decoder.insertion import decoder_layers, layers_path

NUMBER = re.compile(r"^((?:past_key_values|present)\.)(\d+)(\..+)$")
"""Names of inputs and outputs that belong to a layer."""
NUMBERS = ("layer_idx", "layer_number", "layer_id")
"""What transformers calls a layer's number, the one attribute in which equal layers differ."""


def layer_kinds(backbone: Any, installed: list[Installed]) -> list[Hashable]:
    """What each layer does, apart from its weights' values and its number: equal kinds are traced alike."""
    config = backbone.config.get_text_config()
    layers = decoder_layers(backbone)
    by_layer = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == len(layers)
    }
    return [
        (
            tuple(_module_kind(name, module) for name, module in layer.named_modules()),
            tuple((name, repr(value[index])) for name, value in by_layer.items()),
            tuple(item.stacked.layer_kind(index) for item in installed),
        )
        for index, layer in enumerate(layers)
    ]


def _module_kind(name: str, module: nn.Module) -> Hashable:
    settings = {
        key: repr(value)
        for key, value in vars(module).items()
        if key not in NUMBERS and isinstance(value, bool | int | float | str | tuple | list | None)
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return (
        name,
        type(module).__qualname__,
        tuple(sorted(settings.items())),
        tuple((key, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors),
    )


def layers_to_trace(kinds: list[Hashable]) -> int:
    """How many of the first layers must be traced: each kind of those behind them was seen twice, layer 0 aside."""
    for count in range(3, len(kinds)):
        seen = Counter(kinds[1:count])
        if all(seen[kind] >= 2 for kind in kinds[count:]):
            return count
    return len(kinds)


@contextmanager
def first_layers(backbone: Any, count: int) -> Iterator[None]:
    """Take all but the first layers out of a backbone while the context is open."""
    parent, _, name = layers_path(backbone).rpartition(".")
    owner, layers = backbone.get_submodule(parent), decoder_layers(backbone)
    config = backbone.config.get_text_config()
    setattr(owner, name, nn.ModuleList(layers[:count]))
    config.num_hidden_layers = count
    try:
        yield
    finally:
        setattr(owner, name, layers)
        config.num_hidden_layers = len(layers)


def shortened(spec: GraphSpec, count: int) -> GraphSpec:
    """An interface without the caches of all but the first layers; tenants' stacks stay whole."""

    def kept(tensors: Iterable[Any]) -> list[Any]:
        return [tensor for tensor in tensors if (layer := layer_of(tensor.name)) is None or layer < count]

    return dataclasses.replace(spec, inputs=kept(spec.inputs), outputs=kept(spec.outputs))


def layer_of(name: str) -> int | None:
    """The layer that an input or output belongs to."""
    match = NUMBER.match(name)
    return int(match[2]) if match else None


def numbered(name: str, layer: int) -> str:
    """The name of the same input or output of another layer; any other name as it is."""
    return NUMBER.sub(rf"\g<1>{layer}\g<3>", name)
