"""Weight-only quantisation: values of 4 or 8 bits in blocks with a scale each.

`Blocks` are made by ONNX Runtime's own quantiser for its own operators, `trainers.decoder.scaled` is for TensorRT.

Shapes: N outputs of a linear layer, K inputs of it, both of the stored matrix; G = ceil(K / block) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iapt_export.contract.errors import IaptError

ACCURACY_LEVEL = 4
"""The kernel rounds activations to 8 bits, block by block, and multiplies integers. Level 0, which does not, was 40
times as slow in 8 bits and 20 times in 4 on a processor with AVX2, and its logits were hardly nearer to fp32's."""


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
        steps = steps.reshape(outputs, blocks, -1)
        rows = np.multiply(steps, self.scales.reshape(outputs, blocks, 1), dtype=np.float32).reshape(outputs, -1)
        return np.ascontiguousarray(rows[:, : self.num_inputs])


def quantise(weight: np.ndarray, bits: int, block: int) -> Blocks:
    """Round a matrix ``[K, N]`` (fp32) to ``bits`` bits, in blocks of so many along K.

    Raises:
        IaptError: see `require_quantiser`.
    """
    require_quantiser()
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits)
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
