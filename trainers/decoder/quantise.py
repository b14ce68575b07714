"""Weight-only quantisation: values of 4 or 8 bits in blocks with a scale each.

`Blocks` are made by ONNX Runtime's own quantiser for its own operators, `trainers.decoder.scaled` is for TensorRT.

Shapes: N outputs of a linear layer, K inputs of it, both of the stored matrix; G = ceil(K / block) blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from iapt_export.contract.errors import IaptError


@dataclass(frozen=True)
class Rounding:
    """How a target stores the backbone's matrices."""

    bits: int
    """8 or 4, of most; see `bits_for`."""
    grid: Literal["blocks", "integers"] = "blocks"
    """``blocks`` for ONNX Runtime's own operators, in fp32 graphs. ``integers`` for DequantizeLinear in fp16 graphs,
    which the weights are rounded to first."""

    @property
    def is_scaled(self) -> bool:
        """Whether DequantizeLinear restores the matrices; see `trainers.decoder.scaled`."""
        return self.grid != "blocks"


QUANTISED = {"int8": Rounding(8), "int4": Rounding(4)}
"""ONNX Runtime's types of stored weights; activations, cache and tenants' weights are fp32."""
DEQUANTISED = {"int8": Rounding(8, "integers"), "int4": Rounding(4, "integers")}
"""Those of TensorRT for RTX; all else is fp16."""
BLOCK_SIZE = 32
"""Values that share a scale. The smallest that every kernel of ONNX Runtime takes, and the nearest to fp32."""
ACCURACY_LEVEL = 4
"""The kernel rounds activations to 8 bits, block by block, and multiplies integers. Level 0, which does not, was 40
times as slow in 8 bits and 20 times in 4 on a processor with AVX2, and its logits were hardly nearer to fp32's."""
FRAGILE_BITS = 8
"""The least for the embedding and the head, and for products with more inputs than outputs (an MLP's second).
With the latter in 4 bits, an adapter of SmolLM2-135M fell from 0.83 to 0.63; so it keeps 0.77."""


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
        outputs, blocks = self.values.shape[:2]
        if self.bits == 4:
            wide = self.values.astype("<u2")
            steps = ((wide | wide << 4) & 0x0F0F).view(np.int8) - np.int8(8)  # the lower half of a byte is first
        else:
            steps = (self.values ^ np.uint8(0x80)).view(np.int8)  # less 128
        steps = steps.reshape(outputs, blocks, BLOCK_SIZE)
        rows = np.multiply(steps, self.scales.reshape(outputs, blocks, 1), dtype=np.float32).reshape(outputs, -1)
        return np.ascontiguousarray(rows[:, : self.num_inputs])


def rounding_of(target: str, dtype: str) -> Rounding | None:
    """How a target of that name and type rounds the backbone's weights; None where it does not."""
    return {"onnxruntime": QUANTISED, "tensorrt-rtx": DEQUANTISED}.get(target, {}).get(dtype)


def bits_for(shape: Sequence[int], bits: int, *, is_end: bool) -> int:
    """Bits of a matrix ``[K, N]`` in a backbone of ``bits``; ``is_end`` for the embedding and the head."""
    return FRAGILE_BITS if is_end or shape[0] > shape[1] else bits


def quantise(weight: np.ndarray, bits: int) -> Blocks:
    """Round a matrix ``[K, N]`` (fp32) to ``bits`` bits, blocks of `BLOCK_SIZE` along K.

    Raises:
        IaptError: see `require_quantiser`.
    """
    require_quantiser()
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=bits)
    values, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    return Blocks(bits, values, scales, len(weight))


def require_quantiser() -> None:
    """Refuse where quantising cannot work.

    Raises:
        IaptError: ONNX Runtime, whose quantiser does it, is not installed.
    """
    try:
        import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: F401
    except ImportError as error:
        raise IaptError(
            "int8 and int4 need ONNX Runtime's quantiser, which is not installed; "
            "pip install -e '.[cpu]', or choose fp32"
        ) from error
