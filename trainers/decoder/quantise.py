"""Weight-only quantisation: values of 4 or 8 bits in blocks with a scale each.

`Blocks` are for ONNX Runtime's own operators, made by its own quantiser or, in 4 bits and where it is known how much
each input counts, with better scales; `trainers.decoder.scaled` is for TensorRT.

Shapes: N outputs of a linear layer, K inputs of it, both of the stored matrix; G = ceil(K / block) blocks.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from iapt_export.contract.errors import IaptError

ACCURACY_LEVEL = 4
"""The kernel rounds activations to 8 bits, block by block, and multiplies integers. Level 0, which does not, was 40
times as slow in 8 bits and 20 times in 4 on a processor with AVX2, and its logits were hardly nearer to fp32's."""

ENDS = (-8, 7)
"""The least and the largest whole number of 4 bits."""
PLACES = (-8, -12, -10, -8.75, -7.25, -6.25)
"""Where the largest value of a block is tried to stand among them; beyond -8 it is cut off. In SmolLM2-135M these leave
0.53 of the error of ONNX Runtime's scales (mean over its matrices), twelve of them 0.50, both signs of these 0.52."""
ROUNDED = 1e-6
"""What a sum of a block's values is wrong by in fp32, over what it is."""
AT_ONCE = 2**18
"""Values whose scales are sought at once: so few that what is computed of them stays in the processor's caches."""


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix, as ``com.microsoft::MatMulNBits`` takes it; symmetric, so without zero points."""

    bits: int
    values: np.ndarray
    """uint8 ``[N, G, block * bits / 8]``, two values a byte in 4 bits."""
    scales: np.ndarray
    """fp32 ``[N, G]``."""
    num_inputs: int
    """K."""

    def restored(self) -> np.ndarray:
        """The matrix ``[K, N]`` (fp32) that the kernels multiply with."""
        return np.ascontiguousarray(self.restored_rows().T)

    def restored_rows(self) -> np.ndarray:
        """The same turned round, ``[N, K]``."""
        steps = self.steps()
        rows = np.multiply(steps, self.scales[..., None], dtype=np.float32).reshape(len(steps), -1)
        return np.ascontiguousarray(rows[:, : self.num_inputs])

    def steps(self) -> np.ndarray:
        """The whole numbers that are multiplied with the scales: int8 ``[N, G, block]``."""
        if self.bits == 4:
            wide = self.values.astype("<u2")
            steps = ((wide | wide << 4) & 0x0F0F).view(np.int8) - np.int8(8)  # the lower half of a byte is first
        else:
            steps = (self.values ^ np.uint8(0x80)).view(np.int8)  # less 128
        return steps.reshape(*self.values.shape[:2], -1)


def quantise(weight: np.ndarray, bits: int, block: int, importance: np.ndarray | None = None) -> Blocks:
    """Round a matrix ``[K, N]`` (fp32) to ``bits`` bits, in blocks of so many along K.

    Args:
        weight: the matrix.
        bits: 8 or 4.
        block: values that share a scale.
        importance: fp32 ``[K]``, how much each input counts: what is least in sum is each value's squared error times
            that of its input. In 8 bits it makes no difference; None leaves the scales as ONNX Runtime has them.

    Raises:
        IaptError: see `require_quantiser`.
    """
    quantiser = require_quantiser()
    if importance is not None and bits == 4:
        return _weighed(weight, block, importance)
    config = quantiser.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits)
    values, scales, _ = quantiser.DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    return Blocks(bits, values, scales.reshape(values.shape[:2]), len(weight))


def _weighed(weight: np.ndarray, block: int, importance: np.ndarray) -> Blocks:
    """A matrix ``[K, N]`` in 4 bits, with the scales of `_fitted`; a block of GGUF's Q4_0 stays exact."""
    inputs, outputs = weight.shape
    groups = -(-inputs // block)
    values, scales = np.empty((outputs, groups, block // 2), np.uint8), np.empty((outputs, groups), np.float32)

    def in_blocks(array: np.ndarray) -> np.ndarray:
        """``[K, N]`` as ``[G, block, N]``, of which sums over a block are quick."""
        unfilled = ((0, groups * block - inputs), (0, 0))
        return np.pad(array, unfilled).reshape(groups, block, -1)

    counts = in_blocks(importance[:, None])
    at_once = max(1, AT_ONCE // (groups * block))

    def round_some(start: int) -> None:
        own = slice(start, start + at_once)
        with np.errstate(divide="ignore", invalid="ignore"):  # blocks of zeros
            matrix = in_blocks(weight[:, own])
            fitted = _fitted(matrix, counts)  # [G, 1, n]
            steps = _nearest(matrix, np.where(fitted == 0, 0, 1 / fitted), out=matrix)
        halves = (steps + 8).astype(np.uint8)
        values[own] = (halves[:, ::2] | halves[:, 1::2] << 4).transpose(2, 0, 1)
        scales[own] = fitted[:, 0].T

    # whole pieces to each thread: PyTorch's meet after every operation, and were no quicker than one of these
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(round_some, range(0, outputs, at_once)))
    return Blocks(4, values, scales, inputs)


def _fitted(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The scales ``[G, 1, N]`` with the least error for ``values [G, block, N]``, of those that come of `PLACES`.

    Each place gives whole numbers, and these the scale that suits them best, by least squares: with ``a = sum(c q w)``
    and ``b = sum(c q q)``, of counts c, whole numbers q and values w, it is ``a / b`` and takes ``a * a / b`` off the
    error. Nothing is better than the first place by less than what sums are rounded by.
    """
    largest = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)
    weighted, most, first = values * counts, np.zeros_like(largest), largest / PLACES[0]
    fitted, nearest, product = first, np.empty_like(values), np.empty_like(values)
    for place in PLACES:
        _nearest(values, place / largest, out=nearest)
        a = _sum(np.multiply(weighted, nearest, out=product))
        np.multiply(nearest, nearest, out=nearest)
        b = _sum(np.multiply(nearest, counts, out=nearest))
        gain, scale = a * a / b, a / b
        better = gain > most * (1 + ROUNDED)  # no where nothing counts or all is zero, and these are no numbers
        most, fitted = np.where(better, gain, most), np.where(better, scale, fitted)
    return np.where(np.abs(fitted - first) <= ROUNDED * np.abs(first), first, fitted)


def _nearest(values: np.ndarray, factors: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The whole numbers of 4 bits that are nearest to products."""
    np.multiply(values, factors, out=out)
    np.rint(out, out=out)
    return np.clip(out, *ENDS, out=out)


def _sum(values: np.ndarray) -> np.ndarray:
    """Sums ``[G, 1, N]`` over blocks of a power of two, in one order whatever N is.

    `np.sum` may add in another order for another N, and the export and PyTorch's side of its proof, which round other
    parts of a matrix at a time, would now and then choose other scales.
    """
    while (half := values.shape[1] // 2) > 0:
        values = values[:, :half] + values[:, half:]
    return values


def require_quantiser() -> Any:
    """ONNX Runtime's quantiser.

    Raises:
        IaptError: it is not installed.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    except ImportError as error:
        raise IaptError(
            "int8 and int4 need ONNX Runtime's quantiser, which is not installed; "
            "pip install -e '.[cpu]', or choose fp32"
        ) from error
    finally:  # onnxruntime 1.31.1 makes the whole program log from INFO on, just by being imported
        root.handlers[:] = handlers
        root.setLevel(level)
    return matmul_nbits_quantizer
