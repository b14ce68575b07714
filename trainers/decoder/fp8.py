"""Checkpoints in FP8, as DeepSeek and Qwen publish them: each matrix is stored as values of 8 bits and their scales.

A weight is its value times the scale of the value's block, a product in fp32, and is rounded once, to the type that is
computed in. A weight ``name`` of shape [R, C] has scales ``name_scale_inv`` of shape [ceil(R / r), ceil(C / c)], where
blocks are r by c and the last ones may be cut off; or one scale, where the checkpoint has no blocks. Experts that are
stored as one tensor have the same behind their own first axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from iapt_export.contract.errors import IaptError
from trainers.decoder.checkpoint import Place, named

SCALE, ACTIVATION_SCALE = "_scale_inv", "activation_scale"
"""Ends the names of scales; the second kind is of inputs, which are not rounded here."""
READ_TYPE, SCALE_TYPES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")
READ_ELSEWHERE = ("mxfp4", "bitnet")
"""Methods that transformers itself turns into weights of one type, on any machine."""
INSTEAD = "give the model as it was before that, or a GGUF file of it"


class Weight(Protocol):
    """A tensor that is read when ``[...]`` is asked of it, as transformers does while it loads."""

    def __getitem__(self, every: Any) -> Any: ...

    def get_shape(self) -> list[int]:
        """Its shape, without reading it."""


@dataclass(frozen=True)
class Blocks:
    """How a checkpoint in FP8 is scaled."""

    shape: tuple[int, int] | None
    """Rows and columns that share a scale; None for one scale a matrix."""

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What the scales of a weight have as their shape, [..., 1, 1] where there is one."""
        *outer, rows, columns = shape
        if self.shape is None:
            return (*outer, 1, 1)
        return (*outer, math.ceil(rows / self.shape[0]), math.ceil(columns / self.shape[1]))


def blocks_of(config: Any, name: str) -> Blocks | None:
    """Take the mark of FP8 off a configuration, so that it describes the model that its weights make.

    Args:
        config: of transformers; loses its ``quantization_config`` where that is of FP8.
        name: of the model, for the text.

    Returns:
        None where it is not.

    Raises:
        IaptError: it is of a format that is not read.
    """
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return None
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    method, experts = fields.get("quant_method", "a method without a name"), fields.get("expert_dtype", "fp8")
    size = fields.get("weight_block_size", (128, 128))
    if method in READ_ELSEWHERE:
        return None
    refused = f"{name} is not supported: its"
    if method != "fp8":
        raise IaptError(f"{refused} weights are quantised by {method}, which is not read; {INSTEAD}")
    if experts != "fp8":
        raise IaptError(f"{refused} experts are stored in {experts}, and FP8 alone is read; {INSTEAD}")
    if size is not None and not (
        isinstance(size, list | tuple) and list(map(type, size)) == [int, int] and min(size) > 0
    ):
        raise IaptError(f"{refused} weight_block_size is {size}, expected two numbers above 0; {INSTEAD}")
    del config.quantization_config
    return Blocks(None if size is None else (size[0], size[1]))


def check_scales(places: Mapping[str, Place], blocks: Blocks, name: str) -> None:
    """Refuse weights that cannot be told from what a checkpoint's headers say.

    Args:
        places: of the checkpoint's tensors.
        blocks: as its configuration says.
        name: of the model, for the text.

    Raises:
        IaptError: a weight in FP8 is none of E4M3, no matrix, or without scales; scales are no floats, belong to no
            weight in FP8, or have another shape than the blocks give. All are named.
    """
    problems = [text for tensor in places for text in _problems(tensor, places, blocks)]
    if problems:
        raise IaptError(f"{name} is not supported: its weights in FP8 cannot be read: {named(problems)}; {INSTEAD}")


def _problems(name: str, places: Mapping[str, Place], blocks: Blocks) -> Iterator[str]:
    place = places[name]
    if name.endswith(SCALE):
        weight = places.get(name.removesuffix(SCALE))
        if weight is None or not weight.dtype.startswith("F8"):
            yield f"{name} belongs to no weight in FP8"
        elif place.dtype not in SCALE_TYPES:
            yield f"{name} is stored as {place.dtype}, expected one of {', '.join(SCALE_TYPES)}"
        elif len(weight.shape) > 1 and not _fits(place.shape, wanted := blocks.scales_shape(weight.shape)):
            yield f"{name} is {list(place.shape)}, expected {list(wanted)} beside {list(weight.shape)}"
    elif place.dtype.startswith("F8") and not name.endswith(ACTIVATION_SCALE):
        if place.dtype != READ_TYPE or len(place.shape) < 2:
            yield f"{name} is {place.dtype} {list(place.shape)}, expected a matrix in {READ_TYPE}"
        if name + SCALE not in places:
            yield f"{name} has no {name}{SCALE} beside it"


def weights_of(places: Mapping[str, Place], blocks: Blocks) -> dict[str, Weight]:
    """The weights of a checkpoint in FP8, by their names there; each is read when it is asked for.

    Args:
        places: of its tensors, which have passed `check_scales`.
        blocks: as its configuration says.
    """
    from safetensors import safe_open

    files = {place.file: safe_open(place.file, framework="pt") for place in places.values()}
    read = {name: files[place.file].get_slice(name) for name, place in places.items()}
    weights: dict[str, Weight] = {}
    for name, place in places.items():
        if name + SCALE in places:
            weights[name] = ScaledWeight(read[name], read[name + SCALE], blocks.shape or place.shape[-2:])
        elif not _is_scale(name):
            weights[name] = read[name]
    return weights


class ScaledWeight:
    """A matrix in FP8 with its scales, read when it is asked for."""

    def __init__(self, values: Weight, scales: Weight, block: tuple[int, ...]) -> None:
        """Take values [..., R, C], scales [..., ceil(R / r), ceil(C / c)] or one, and the block [r, c]."""
        self._values, self._scales, self._block = values, scales, block

    def get_shape(self) -> list[int]:
        """Of the weight."""
        return self._values.get_shape()

    def __getitem__(self, every: Any) -> Any:
        """The weight [..., R, C], fp32."""
        values = self._values[...].float()
        *outer, rows, columns = values.shape
        grid = (math.ceil(rows / self._block[0]), math.ceil(columns / self._block[1]))
        scales = self._scales[...].float()
        scales = scales.expand(*outer, *grid) if scales.numel() == 1 else scales.reshape(*outer, *grid)
        for axis, size in ((-2, rows), (-1, columns)):
            scales = scales.repeat_interleave(self._block[axis], axis).narrow(axis, 0, size)
        return values.mul_(scales)[every]


def _is_scale(name: str) -> bool:
    return name.endswith((SCALE, ACTIVATION_SCALE))


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether scales have their shape; axes of length 1 behind the blocks' may be left out, one scale anyhow."""
    return found == wanted or (wanted[-2:] == (1, 1) and found in ((), (1,), wanted[:-2]))
