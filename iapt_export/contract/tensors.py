"""What a graph takes and gives: its tensors, and the sizes that their dimensions may have.

Standard library only; readers have these from `iapt_export.contract.manifest`, whose shape legend holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from iapt_export.contract.errors import BundleError

LONGEST = 2**31
"""Positions, and sizes of a dynamic dimension, at most."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """``int64``, ``int32``, ``bool``, ``fp32``, ``fp16`` or ``bf16``."""
    shape: list[int | str]
    """Fixed sizes as numbers, dynamic ones by name (see the legend)."""

    def __post_init__(self) -> None:
        if any(isinstance(size, int) and size < 0 for size in self.shape):
            raise BundleError(f"shape is {self.shape}, expected no negative size")


@dataclass(frozen=True)
class Range:
    """Sizes that a dynamic dimension may take."""

    min: int
    opt: int
    """The size that engines are tuned for."""
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise BundleError(f"range {self.min}/{self.opt}/{self.max} is not ordered: expected 1 <= min <= opt <= max")
        if self.max > LONGEST:
            raise BundleError(f"range ends at {self.max}, expected at most {LONGEST}")


@dataclass(frozen=True)
class Ranges:
    """The sizes that a bundle's graphs and engines are built and validated for."""

    batch: Range
    """Rows of one batch (B)."""
    sequence: Range
    """Instruction tokens of a row, padding included (T)."""
    past: Range
    """Cache entries before a decode step: prompts, instruction and earlier answers (S)."""
    tenants: Range
    """Tenants installed side by side (N)."""


@dataclass(frozen=True)
class GraphSpec:
    """An ONNX graph or the engine made of it."""

    path: str
    """Relative to the bundle."""
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
