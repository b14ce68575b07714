"""How targets store the backbone's matrices in 8 or 4 bits: what a type says, and what ``--quantise`` says besides.

Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iapt_export.contract.errors import IaptError, shown


@dataclass(frozen=True)
class Rounding:
    """How a target stores the backbone's matrices."""

    bits: int
    """8 or 4, of most; see `bits_for`."""
    grid: Literal["blocks", "integers"] = "blocks"
    """``blocks`` for ONNX Runtime's own operators, in fp32 graphs. ``integers`` for DequantizeLinear in fp16 graphs,
    which the weights are rounded to first."""
    block: int = 32
    """Values that share a scale. 32 is the smallest that every kernel of ONNX Runtime takes, and the nearest to fp32.
    """
    head: int = 8
    """Bits of the embedding and the head."""
    narrow: int = 8
    """Bits of products with more inputs than outputs (an MLP's second). With these in 4 bits, an adapter of
    SmolLM2-135M fell from 0.83 to 0.63; so it keeps 0.77."""

    @property
    def is_scaled(self) -> bool:
        """Whether DequantizeLinear restores the matrices; see `trainers.decoder.scaled`."""
        return self.grid != "blocks"

    @property
    def quantise(self) -> str:
        """What of it is not as its type has it, as ``--quantise`` takes it: ``block=64,narrow=4``, or nothing."""
        usual = Rounding(self.bits)
        return ",".join(f"{name}={own}" for name in VALUES if (own := getattr(self, name)) != getattr(usual, name))

    def bits_for(self, shape: Sequence[int], *, is_end: bool) -> int:
        """Bits of a matrix ``[K, N]``; ``is_end`` for the embedding and the head."""
        if is_end:
            return self.head
        return self.narrow if shape[0] > shape[1] else self.bits


QUANTISED = {"int8": Rounding(8), "int4": Rounding(4)}
"""ONNX Runtime's types of stored weights; activations, cache and tenants' weights are fp32."""
DEQUANTISED = {"int8": Rounding(8, "integers"), "int4": Rounding(4, "integers")}
"""Those of TensorRT for RTX; all else is fp16."""
VALUES = {"block": (32, 64, 128), "head": (4, 8), "narrow": (4, 8)}
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
    return dataclasses.replace(usual, **_parsed(quantise))


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
            problems.append(f"{told} sets {shown(name)}, expected settings of block, head, narrow: block=64,narrow=4")
        elif value not in map(str, allowed):
            problems.append(f"{told}: {name} is {shown(value)}, expected {' or '.join(map(str, allowed))}")
        elif name != "block" and value == "4" and dtype == "int8":
            problems.append(f"{told}: int8 has no matrix in 4 bits; leave {name} out, or take int4")
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
