"""How targets store the backbone's matrices, and the cache, in 8 or 4 bits: what a type says, and ``--quantise``.

Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iapt_export.contract.errors import IaptError, shown

FP4_BLOCK = 16
"""Values of FP4 that share a scale: NVFP4, what the GPUs multiply with, has no other."""


@dataclass(frozen=True)
class Rounding:
    """How a target stores the backbone's matrices."""

    bits: int
    """8 or 4, of most; see `bits_for`."""
    grid: Literal["blocks", "integers", "floats"] = "blocks"
    """``blocks`` for ONNX Runtime's own operators, in fp32 graphs. ``integers`` and ``floats`` for DequantizeLinear in
    fp16 graphs, which the weights are rounded to first; ``floats`` are those of `bits` alone, see `stored_as`."""
    block: int = 32
    """Values that share a scale. 32 is the smallest that every kernel of ONNX Runtime takes, and the nearest to fp32.
    """
    head: int = 8
    """Bits of the embedding and the head."""
    narrow: int = 8
    """Bits of products with more inputs than outputs (an MLP's second). With these in 4 bits, an adapter of
    SmolLM2-135M fell from 0.83 to 0.63; so it keeps 0.77."""
    cache: int = 32
    """Bits of a number in the KV cache; in 8, each head of a layer has a scale, see `trainers.decoder.importance`."""

    @property
    def is_scaled(self) -> bool:
        """Whether DequantizeLinear restores the matrices; see `trainers.decoder.scaled`."""
        return self.grid != "blocks"

    @property
    def quantise(self) -> str:
        """What of it is not as its type has it, as ``--quantise`` takes it: ``block=64,narrow=4``, or nothing."""
        usual = Rounding(self.bits)
        return ",".join(f"{name}={own}" for name in VALUES if (own := getattr(self, name)) != getattr(usual, name))

    @property
    def of_weights(self) -> str:
        """The same of the weights alone."""
        return dataclasses.replace(self, cache=Rounding.cache).quantise

    @property
    def cache_type(self) -> str:
        """What a graph's cache is declared as, empty for the graph's own type."""
        return f"int{self.cache}" if self.cache != Rounding.cache else ""

    def stored_as(self, bits: int) -> Literal["int8", "int4", "fp8", "fp4"]:
        """Which numbers stand for a matrix of so many bits, where DequantizeLinear restores it.

        Matrices that a type of 4 bits keeps in 8 are integers, whose error in blocks of 32 is a quarter of FP8's.
        """
        if self.grid == "floats" and bits == self.bits:
            return "fp8" if bits == 8 else "fp4"
        return "int8" if bits == 8 else "int4"

    def block_for(self, bits: int) -> int:
        """Values that share a scale, in a matrix of so many bits."""
        return FP4_BLOCK if self.stored_as(bits) == "fp4" else self.block

    def scale_bytes(self, bits: int) -> int:
        """Bytes of each of their scales."""
        if not self.is_scaled:
            return 4
        return 1 if self.stored_as(bits) == "fp4" else 2

    def bits_for(self, shape: Sequence[int], *, is_end: bool) -> int:
        """Bits of a matrix ``[K, N]``; ``is_end`` for the embedding and the head."""
        if is_end:
            return self.head
        return self.narrow if shape[0] > shape[1] else self.bits


QUANTISED = {"int8": Rounding(8), "int4": Rounding(4)}
"""ONNX Runtime's types of stored weights; activations, tenants' weights and, unless set otherwise, the cache are fp32.
"""
DEQUANTISED = {
    "int8": Rounding(8, "integers"),
    "int4": Rounding(4, "integers"),
    "fp8": Rounding(8, "floats"),
    "nvfp4": Rounding(4, "floats"),
}
"""Those of TensorRT for RTX; all else is fp16."""
SMALLER = {"int8": "int4", "fp8": "nvfp4"}
"""Types without a matrix in 4 bits, to those that have some."""
VALUES = {"block": (32, 64, 128), "head": (4, 8), "narrow": (4, 8), "cache": (8, 32)}
"""What ``--quantise`` may set, and to what; see docs/decisions.md for the blocks."""
AUTO = "auto"
"""What a build takes in place of settings: it measures a few with its tenants, and goes on with the one it found."""


def rounding_of(target: str, dtype: str, quantise: str = "") -> Rounding | None:
    """How a target of that name and type rounds the backbone's weights; None where it does not.

    Args:
        target: ``onnxruntime``, ``tensorrt-rtx`` or ``tensorrt``.
        dtype: its type, such as ``int4``.
        quantise: as on the command line; see `rounding_problems`.

    Raises:
        IaptError: ``quantise`` says what is not stored so.
    """
    usual = {"onnxruntime": QUANTISED, "tensorrt-rtx": DEQUANTISED}.get(target, {}).get(dtype)
    if usual is None:
        return None
    if problems := rounding_problems(quantise, dtype):
        raise IaptError("; ".join(problems))
    rounding = dataclasses.replace(usual, **_parsed(quantise))
    if rounding.is_scaled and rounding.cache != usual.cache:
        raise IaptError(
            f"quantise={shown(quantise)}: {target} keeps its cache in fp16; leave cache out, or build for "
            f"onnxruntime:int4"
        )
    return rounding


def rounding_problems(quantise: Any, dtype: str = "") -> list[str]:
    """What is wrong with a text such as ``block=64,head=8,narrow=4``, a line each.

    Args:
        quantise: the text; empty sets nothing, and `AUTO` is no setting, but what a build replaces by one.
        dtype: the type whose weights it is about, where that is known.
    """
    told = f"quantise={shown(quantise)}"
    if quantise == AUTO:
        return [
            f"{told} is for build alone, which measures settings with its tenants; name settings here, such as "
            "block=64,narrow=4, or leave it out"
        ]
    if not isinstance(quantise, str):
        return [f"{told} is no text such as 'block=64,head=8,narrow=4'"]
    problems, seen = [], set()
    for part in quantise.split(",") if quantise else []:
        name, _, value = part.partition("=")
        allowed = VALUES.get(name, ())
        if not allowed:
            problems.append(f"{told} sets {shown(name)}, expected settings of {', '.join(VALUES)}: block=64,narrow=4")
        elif value not in map(str, allowed):
            problems.append(f"{told}: {name} is {shown(value)}, expected {' or '.join(map(str, allowed))}")
        elif name in ("head", "narrow") and value == "4" and dtype in SMALLER:
            problems.append(f"{told}: {dtype} has no matrix in 4 bits; leave {name} out, or take {SMALLER[dtype]}")
        elif name == "block" and dtype == "nvfp4":
            problems.append(f"{told}: nvfp4's blocks are of {FP4_BLOCK} values, of 8 bits of 32; leave block out")
        if name in seen:
            problems.append(f"{told} sets {name} twice")
        seen.add(name)
    return problems


def in_words(dtype: str, quantise: str) -> str:
    """A type and its settings, for people: ``int4``, or ``int4 (block=64)``."""
    return f"{dtype} ({quantise})" if quantise else dtype


def _parsed(quantise: str) -> dict[str, Any]:
    parts = (part.partition("=") for part in quantise.split(",") if part)
    return {name: int(value) for name, _, value in parts}
