"""``aten::rms_norm`` for opsets before 23, which have no ``RMSNormalization``.

Without a translation the exporter fails on it, and the graph has to be traced twice more to break it up.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as standard

FIRST_OPSET = 23
"""From here on the exporter translates it itself."""


def translation_table(opset: int) -> dict[Any, Any]:
    """What ``torch.onnx.export(custom_translation_table=...)`` needs at this opset."""
    return {torch.ops.aten.rms_norm.default: rms_norm} if opset < FIRST_OPSET else {}


def rms_norm(tokens: Any, shape: list[int], weight: Any = None, eps: float | None = None) -> Any:
    """``tokens [..., *shape]`` over their root mean square, times ``weight [*shape]``; in fp32, as in PyTorch."""
    is_wide = tokens.dtype == ir.DataType.FLOAT
    wide = tokens if is_wide else standard.Cast(tokens, to=ir.DataType.FLOAT)
    axes = standard.Constant(value_ints=list(range(-len(shape), 0)))
    mean = standard.ReduceMean(standard.Mul(wide, wide), axes)
    root = standard.Sqrt(standard.Add(mean, torch.finfo(torch.float32).eps if eps is None else eps))
    made = standard.Mul(wide, standard.Reciprocal(root))
    if weight is not None:
        made = standard.Mul(made, weight if is_wide else standard.Cast(weight, to=ir.DataType.FLOAT))
    return made if is_wide else standard.CastLike(made, tokens)
