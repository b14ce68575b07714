"""Tiny ONNX graphs with the dynamic sizes of the real ones, and their manifests' entries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

from iapt_export.contract.manifest import GraphSpec, Range, Ranges, TensorSpec
from iapt_export.graphs.ops.rational_op import rational_function

ONNX_TYPES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
RANGES = Ranges(batch=Range(1, 2, 4), sequence=Range(1, 8, 16), past=Range(5, 16, 32), tenants=Range(1, 2, 8))


def tiny_prefill(folder: Path, dtype: str = "fp16", opset: int = 23) -> tuple[Path, GraphSpec]:
    """``y = Rational(x @ weight[tenant_index])``: tenants by row, a function for a body, external weights."""
    kind = ONNX_TYPES[dtype]
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": {opset}, "ai.iapt": 1]>
        prefill ({kind}[batch, sequence, 8] x, int64[batch] tenant_index, {kind}[tenants_iapt, 8, 8] generator_weight)
            => ({kind}[batch, sequence, 8] y) {{
            rows = Gather <axis = 0> (generator_weight, tenant_index)
            hidden = MatMul (x, rows)
            scaled = Mul (hidden, scale)
            numerator = Constant <value = float[1, 6] {{0.1, 0.5, 0.2, 0.1, 0.01, 0.001}}> ()
            denominator = Constant <value = float[1, 4] {{0.1, 0.2, 0.1, 0.1}}> ()
            y = ai.iapt.Rational <form = "A"> (scaled, numerator, denominator)
        }}""")
    scale = np.linspace(0.5, 1.5, 8, dtype=np.float32)
    element_type = model.graph.input[0].type.tensor_type.elem_type
    numpy_type = onnx.helper.tensor_dtype_to_np_dtype(element_type)
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale.astype(numpy_type), "scale"))
    model.functions.append(rational_function(6, 4, "A", opset))
    path = folder / "prefill.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    spec = GraphSpec(
        "prefill.onnx",
        [
            TensorSpec("x", dtype, ["batch", "sequence", 8]),
            TensorSpec("tenant_index", "int64", ["batch"]),
            TensorSpec("generator_weight", dtype, ["tenants_iapt", 8, 8]),
        ],
        [TensorSpec("y", dtype, ["batch", "sequence", 8])],
    )
    return path, spec


def tiny_decode(folder: Path, dtype: str = "fp16") -> tuple[Path, GraphSpec]:
    """One step of grouped-query attention over a cache, with a padding mask; opset 23's Attention node."""
    kind = ONNX_TYPES[dtype]
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 23]>
        decode ({kind}[batch, 4, 1, 16] query, int64[batch, total] attention_mask,
                {kind}[batch, 2, past, 16] past_key_values_0_key, {kind}[batch, 2, 1, 16] step)
            => ({kind}[batch, 4, 1, 16] attended, {kind}[batch, 2, total, 16] present_0_key) {{
            present_0_key = Concat <axis = 2> (past_key_values_0_key, step)
            mask = Cast <to = 9> (attention_mask)
            axes = Constant <value_ints = [1, 2]> ()
            mask_4d = Unsqueeze (mask, axes)
            attended = Attention <scale = 0.25> (query, present_0_key, present_0_key, mask_4d)
        }}""")
    for node in model.graph.node:
        node.name = f"/layers.0/{node.op_type}"
    path = folder / "decode.onnx"
    onnx.save(model, path)
    spec = GraphSpec(
        "decode.onnx",
        [
            TensorSpec("query", dtype, ["batch", 4, 1, 16]),
            TensorSpec("attention_mask", "int64", ["batch", "total"]),
            TensorSpec("past_key_values_0_key", dtype, ["batch", 2, "past", 16]),
            TensorSpec("step", dtype, ["batch", 2, 1, 16]),
        ],
        [
            TensorSpec("attended", dtype, ["batch", 4, 1, 16]),
            TensorSpec("present_0_key", dtype, ["batch", 2, "total", 16]),
        ],
    )
    return path, spec


def tiny_attention(folder: Path, dtype: str = "fp16") -> tuple[Path, GraphSpec]:
    """Grouped-query attention over a whole instruction, as in prefill; TensorRT has no fused fp32 kernel for it."""
    kind = ONNX_TYPES[dtype]
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 23]>
        attention ({kind}[batch, 4, sequence, 16] query, {kind}[batch, 2, sequence, 16] key)
            => ({kind}[batch, 4, sequence, 16] attended) {{
            attended = Attention <scale = 0.25, is_causal = 1> (query, key, key)
        }}""")
    path = folder / "attention.onnx"
    onnx.save(model, path)
    spec = GraphSpec(
        "attention.onnx",
        [
            TensorSpec("query", dtype, ["batch", 4, "sequence", 16]),
            TensorSpec("key", dtype, ["batch", 2, "sequence", 16]),
        ],
        [TensorSpec("attended", dtype, ["batch", 4, "sequence", 16])],
    )
    return path, spec


def save_nodes(folder: Path, nodes: str, weight: str = "float[8, 8]") -> tuple[Path, GraphSpec]:
    """A graph of the given nodes from ``x`` and ``w`` to ``y``, each node named after its operator."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 23, "custom": 1]>
        graph (float[batch, 8] x, {weight} w) => (float[batch, 8] y) {{ {nodes} }}""")
    for node in model.graph.node:
        node.name = f"/model/{node.op_type}"
    path = folder / "graph.onnx"
    onnx.save(model, path)
    spec = GraphSpec(
        "graph.onnx",
        [TensorSpec("x", "fp32", ["batch", 8]), TensorSpec("w", "fp32", [8, 8])],
        [TensorSpec("y", "fp32", ["batch", 8])],
    )
    return path, spec
