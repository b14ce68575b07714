"""Matrices as ONNX's ``DequantizeLinear`` restores them, for TensorRT: small integers, an fp16 scale a block.

TensorRT 1.7.1 for RTX takes whole blocks only, and of INT8 only scales above 0; ONNX Runtime's quantiser gives negative
ones too. Shapes: N outputs, K inputs, G = K / block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iapt_export.contract.errors import IaptError

LEAST_SCALE = np.float16(2**-24)
"""The smallest number of fp16 above 0, for blocks of zeros: TensorRT refuses a scale of 0."""
LARGEST_SCALE = {8: np.float16(515.5), 4: np.float16(8188)}
"""The largest of which no step becomes infinite in fp16."""
RANGES = {8: (-127, 127), 4: (-8, 7)}
"""Bits to the smallest and the largest step."""
SHRUNK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8)}
"""Scales that are tried, times the one that reaches all of a block's values: of 4 bits a smaller one that cuts off its
largest often has a smaller error in sum (a tenth for random weights)."""


@dataclass(frozen=True)
class Scaled:
    """A rounded matrix."""

    values: np.ndarray
    """int8 ``[N, K]``, the steps."""
    scales: np.ndarray
    """fp16 ``[N, G]``, all above 0."""

    def restored_rows(self) -> np.ndarray:
        """The matrix ``[N, K]`` that is multiplied with: fp16's numbers, in fp32."""
        blocks = self.values.reshape(*self.scales.shape, -1)
        exact = np.multiply(blocks, self.scales[..., None], dtype=np.float32)
        return exact.astype(np.float16).astype(np.float32).reshape(self.values.shape)


def scaled(rows: np.ndarray, bits: int, block: int) -> Scaled:
    """Round a matrix ``[N, K]`` of any float type, by way of fp16, to ``bits`` bits, a scale for ``block`` numbers.

    Raises:
        IaptError: a number is NaN, or larger than fp16's.
    """
    low, high = RANGES[bits]
    with np.errstate(over="ignore"):
        blocks = np.ascontiguousarray(rows).astype(np.float16).astype(np.float32)
    if not np.isfinite(blocks).all():
        raise IaptError(
            f"a matrix has NaN or numbers above {np.finfo(np.float16).max:.0f}, fp16's largest, and TensorRT's int8 "
            "and int4 come from fp16; build for tensorrt-rtx:bf16"
        )
    blocks = blocks.reshape(len(rows), -1, block)  # [N, G, block]
    reach = np.maximum(blocks.max(-1) / high, blocks.min(-1) / low)
    scales = np.clip(reach.astype(np.float16), LEAST_SCALE, LARGEST_SCALE[bits])
    values, least = _steps(blocks, scales, bits)
    for part in SHRUNK[bits][1:]:
        tried = np.clip((reach * np.float32(part)).astype(np.float16), LEAST_SCALE, LARGEST_SCALE[bits])
        steps, error = _steps(blocks, tried, bits)
        better = error < least
        scales, least = np.where(better, tried, scales), np.where(better, error, least)
        values = np.where(better[..., None], steps, values)
    return Scaled(values.reshape(len(rows), -1), scales)


def _steps(blocks: np.ndarray, scales: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps ``[N, G, block]`` (int8) with these scales, and the sum of squared errors ``[N, G]``."""
    wide = scales.astype(np.float32)[..., None]
    steps = np.clip(np.rint(blocks / wide), *RANGES[bits])
    return steps.astype(np.int8), np.square(steps * wide - blocks).sum(-1)
