"""Element types and ONNX opsets, under the manifest's names; standard library only."""

from __future__ import annotations

FLOATS = ("fp32", "fp16", "bf16")
"""Types that a backbone can be served in."""
FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
CACHE_BYTES = {**FLOAT_BYTES, "int8": 1}
TENSOR_TYPES = {
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "bool": "bool",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""Types of the graphs' inputs and outputs, by the manifest's name, to what NumPy, ml_dtypes and torch call them."""
OPSETS = (20, 23)
"""Of the portable graphs: 20 decomposes attention and normalisation, 23 has operators for them."""
