"""Matrices as ONNX's ``DequantizeLinear`` restores them, for TensorRT: numbers of few bits, a scale a block.

TensorRT 1.7.1 for RTX takes whole blocks only, and of all but FP4 only scales above 0; ONNX Runtime's quantiser gives
negative ones too. Shapes: N outputs, K inputs, G = K / block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import Rounding

LEAST_SCALE = np.float16(2**-24)
"""The smallest number of fp16 above 0, for blocks of zeros: TensorRT refuses a scale of 0."""
SMALLER_TOO = (1.0, 0.95, 0.9, 0.85, 0.8)
E4M3_MAX, E2M1_MAX = 448, 6
"""The largest numbers of FP8 and FP4."""


@dataclass(frozen=True)
class Grid:
    """Numbers that stand for a block's values."""

    dtype: type
    low: float
    high: float
    largest: float
    """The largest scale of which none becomes infinite in fp16."""
    tried: tuple[float, ...] = (1.0,)
    """Scales that are tried, times the one that reaches all of a block's values: of 4 bits another one often has a
    smaller error in sum, a tenth for random weights. A smaller one cuts off a block's largest; a larger one of FP4 puts
    it on 4, where the numbers are closer together."""


GRIDS = {
    "int8": Grid(np.int8, -127, 127, 515.5),
    "int4": Grid(np.int8, -8, 7, 8188, SMALLER_TOO),
    "fp8": Grid(ml_dtypes.float8_e4m3fn, -E4M3_MAX, E4M3_MAX, 146.125),
    "fp4": Grid(ml_dtypes.float4_e2m1fn, -E2M1_MAX, E2M1_MAX, 10240, (1.0, 1.5, 0.9)),
}


@dataclass(frozen=True)
class Scaled:
    """A rounded matrix."""

    values: np.ndarray
    """``[N, K]``, of the grid's type."""
    scales: np.ndarray
    """``[N, G]``, all above 0: fp16, or FP8 where there is a `whole`."""
    whole: float | None = None
    """Of FP4, what all scales are multiplied with."""

    def restored_rows(self) -> np.ndarray:
        """The matrix ``[N, K]`` that is multiplied with: fp16's numbers, in fp32."""
        blocks = self.values.reshape(*self.scales.shape, -1)
        wide = np.multiply(self.scales, np.float32(self.whole or 1), dtype=np.float32)[..., None]
        exact = np.multiply(blocks, wide, dtype=np.float32)
        return exact.astype(np.float16).astype(np.float32).reshape(self.values.shape)


def scale_of_all(least: float, largest: float) -> float:
    """What all of a matrix's scales in FP4 are multiplied with, from its smallest and its largest number.

    A power of two, of which FP8's largest still reaches the matrix's largest. So a product of value, scale and this is
    exact in fp16, and an engine may multiply in any order; the error is that of any other number. Not below 2 ** -15,
    so that the least scale is one of fp16's numbers too.
    """
    reach = float(np.abs(np.array([least, largest], np.float16)).max()) / (E2M1_MAX * E4M3_MAX)
    return 2.0 ** max(-15, math.ceil(math.log2(reach))) if 0 < reach < math.inf else 2.0**-15


def scaled(rows: np.ndarray, bits: int, rounding: Rounding, whole: float | None = None) -> Scaled:
    """Round a matrix ``[N, K]`` of any float type, by way of fp16, to ``bits`` bits.

    Args:
        rows: the matrix, or some of its rows.
        bits: 8 or 4.
        rounding: in which blocks, and to which numbers.
        whole: of FP4, `scale_of_all` of the whole matrix; None takes that of these rows.

    Raises:
        IaptError: a number is NaN, or larger than fp16's.
    """
    with np.errstate(over="ignore"):
        blocks = np.ascontiguousarray(rows).astype(np.float16).astype(np.float32)
    if not np.isfinite(blocks).all():
        raise IaptError(
            f"a matrix has NaN or numbers above {np.finfo(np.float16).max:.0f}, fp16's largest, which TensorRT's "
            "coarser weights come from; build for tensorrt-rtx:bf16"
        )
    kind = rounding.stored_as(bits)
    grid = GRIDS[kind]
    whole = (whole or scale_of_all(blocks.min(), blocks.max())) if kind == "fp4" else None
    blocks = blocks.reshape(len(rows), -1, rounding.block_for(bits))  # [N, G, block]
    reach = np.maximum(blocks.max(-1) / grid.high, blocks.min(-1) / grid.low)
    scales = _scales(reach, grid, whole)
    values, least = _steps(blocks, scales, grid, whole)
    for part in grid.tried[1:]:
        others = _scales(reach * np.float32(part), grid, whole)
        steps, error = _steps(blocks, others, grid, whole)
        better = error < least
        scales, least = np.where(better, others, scales), np.where(better, error, least)
        values = np.where(better[..., None], steps, values)
    return Scaled(values.reshape(len(rows), -1), scales, whole)


def _scales(reach: np.ndarray, grid: Grid, whole: float | None) -> np.ndarray:
    """The scales ``[N, G]`` that are stored for those that are wanted."""
    if whole is None:
        return np.clip(reach.astype(np.float16), LEAST_SCALE, np.float16(grid.largest))
    least, largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).smallest_subnormal), grid.largest / whole
    return np.clip(reach / np.float32(whole), least, min(E4M3_MAX, largest)).astype(ml_dtypes.float8_e4m3fn)


def _steps(blocks: np.ndarray, scales: np.ndarray, grid: Grid, whole: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Values ``[N, G, block]`` of the grid with these scales, and the sum of squared errors ``[N, G]``."""
    wide = (scales.astype(np.float32) * np.float32(whole or 1))[..., None]
    steps = blocks / wide
    steps = np.clip(np.rint(steps) if grid.dtype is np.int8 else steps, grid.low, grid.high).astype(grid.dtype)
    return steps, np.square(np.multiply(steps, wide, dtype=np.float32) - blocks).sum(-1)
