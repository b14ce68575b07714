"""A backbone with the weights that a quantised target multiplies with: rounded as an export stores them, and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import Rounding
from trainers.decoder.quantise import Blocks, quantise
from trainers.decoder.scaled import Scaled, scale_of_all, scaled

Importance = Mapping[str, np.ndarray]
"""Weights' names to how much each of their inputs counts, see `trainers.decoder.importance`; where a weight has none,
all count the same."""
ROWS_AT_ONCE = 1024
"""Outputs of a matrix that are rounded at once."""


@torch.no_grad()
def round_weights(model: nn.Module, rounding: Rounding, importance: Importance | None = None) -> None:
    """Round a backbone's matrices in place: embeddings by rows, linear layers by inputs, what both share once."""
    for module, chosen, names in _named(model, rounding):
        rows = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data  # [N, K]
        counts = importance_for(names, importance or {})
        rows.copy_(torch.from_numpy(_rounded(rows, chosen, rounding, counts).restored_rows()))


def importance_for(names: Iterable[str], importance: Importance) -> np.ndarray | None:
    """How much the inputs of a weight of these names count; None where all count the same."""
    return next((importance[name] for name in names if name in importance), None)


def _matrices(model: nn.Module, rounding: Rounding) -> list[tuple[Any, int]]:
    """The modules whose weights are rounded, one of those that share one, and to how many bits.

    Raises:
        IaptError: blocks of 32 would store a matrix that these do not, which would so be larger, not smaller; or
            TensorRT would keep a table of 4 bits twice.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    if rounding.grid == "integers" and rounding.head == 4 and head is not None and head.weight is table.weight:
        # engines of TensorRT for RTX 1.7.1 grew by twice the table's bytes, with one that is not tied by once; so they
        # do not in FP4
        raise IaptError(
            "head=4: this backbone's head is its embedding, a table that an engine of TensorRT for RTX keeps twice in "
            "4 bits, which is no smaller than once in 8; leave head out"
        )
    done: set[int] = set()
    found = []
    for module in model.modules():
        if not isinstance(module, nn.Embedding | nn.Linear | Conv1D) or id(module.weight) in done:
            continue
        outputs_first = not isinstance(module, Conv1D)
        shape = tuple(module.weight.shape)[::-1] if outputs_first else tuple(module.weight.shape)  # [K, N]
        is_table = isinstance(module, nn.Embedding)
        if not _fits(shape, Rounding.block, rounding, is_table=is_table):
            if is_table:
                done.add(id(module.weight))  # a head that is tied to it is the same numbers
            continue
        if not _fits(shape, rounding.block, rounding, is_table=is_table):
            name = next(name for name, other in model.named_modules() if other is module)
            raise IaptError(
                f"block={rounding.block} does not divide the {shape[0]} inputs of {name}, which would stay as it is; "
                f"give a smaller block, or leave it out for {Rounding.block}"
            )
        done.add(id(module.weight))
        found.append((module, rounding.bits_for(shape, is_end=is_table or module is head)))
    return found


def _fits(shape: tuple[int, ...], block: int, rounding: Rounding, *, is_table: bool) -> bool:
    """Whether a matrix ``[K, N]`` is stored in blocks: products of ONNX Runtime alone take an unfilled one."""
    if is_table or rounding.is_scaled:
        return shape[0] % block == 0 and (shape[1] >= Rounding.block or not is_table)
    return shape[0] >= block


def rounded_weights(model: nn.Module, rounding: Rounding) -> dict[str, int]:
    """The weights that are rounded by every name that they have in the model, and to how many bits each.

    The exporter stores these and no others in as few bits, so that both sides always mean the same weights.

    Args:
        model: its parameters need no values.
        rounding: the target's.
    """
    return {name: chosen for _, chosen, names in _named(model, rounding) for name in names}


def _named(model: nn.Module, rounding: Rounding) -> list[tuple[Any, int, list[str]]]:
    """What `_matrices` gives, and all names of each weight."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [(module, chosen, names[id(module.weight)]) for module, chosen in _matrices(model, rounding)]


class RoundedWeights:
    """Gives a backbone's weights as `round_weights` leaves them, one at a time.

    What a matrix is rounded to is computed once and kept in a file without a name, in the folder for temporary files:
    five to nine bits a number.
    """

    def __init__(
        self,
        model: nn.Module,
        rounding: Rounding,
        read: Callable[[str], Tensor],
        importance: Importance | None = None,
    ) -> None:
        """Take a model whose parameters need no values, and what gives its weights by their names."""
        self._read, self._rounding, self._importance = read, rounding, importance or {}
        self._bits: dict[str, int] = {}
        self._first: dict[str, str] = {}
        self._inputs_first: set[str] = set()
        for module, chosen, same in _named(model, rounding):
            self._bits |= dict.fromkeys(same, chosen)
            self._first |= dict.fromkeys(same, same[0])
            self._inputs_first |= set(same) if isinstance(module, Conv1D) else set()
        self._kept: dict[str, Blocks | Scaled] = {}

    def __call__(self, name: str) -> Tensor:
        """A weight by its name in the model's state."""
        if name not in self._bits:
            return self._read(name)
        blocks = self._kept.get(self._first[name])
        if blocks is None:
            weight = self._read(name)
            weight = weight.T if name in self._inputs_first else weight
            same = [other for other, first in self._first.items() if first == self._first[name]]
            blocks = _rounded(weight, self._bits[name], self._rounding, importance_for(same, self._importance))
            del weight
            self._kept[self._first[name]] = blocks
        rows = torch.from_numpy(blocks.restored_rows())  # [N, K]
        return rows.T.contiguous() if name in self._inputs_first else rows


def _rounded(rows: Tensor, bits: int, rounding: Rounding, importance: np.ndarray | None) -> Blocks | Scaled:
    """``rows [N, K]`` rounded along K, a few at a time, because the quantiser takes several copies of what it is given.

    The values and scales are mapped from files.
    """
    if rounding.is_scaled:
        is_fp4 = rounding.stored_as(bits) == "fp4"
        whole = scale_of_all(*(float(end) for end in torch.aminmax(rows))) if is_fp4 else None
        made = [scaled(part.float().numpy(), bits, rounding, whole) for part in rows.split(ROWS_AT_ONCE)]
        values, scales = on_disk([part.values for part in made]), on_disk([part.scales for part in made])
        return Scaled(values, scales, made[0].whole)
    parts = [
        quantise(part.float().T.contiguous().numpy(), bits, rounding.block, importance)
        for part in rows.split(ROWS_AT_ONCE)
    ]
    values, scales = on_disk([part.values for part in parts]), on_disk([part.scales for part in parts])
    return Blocks(bits, values, scales, rows.shape[1])


def on_disk(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays, one after the other, mapped from a file which is gone when nobody maps it any more.

    No file stays open: a backbone has more matrices than a process may have files.
    """
    with tempfile.NamedTemporaryFile() as stream:
        for part in parts:
            part.tofile(stream.file)
        stream.flush()
        size = sum(part.nbytes for part in parts)
        mapped = torch.from_file(stream.name, shared=False, size=size, dtype=torch.uint8)
    return mapped.numpy().view(parts[0].dtype).reshape(-1, *parts[0].shape[1:])
