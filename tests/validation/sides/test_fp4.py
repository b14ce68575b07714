"""ONNX Runtime without a kernel for FP4 computes what onnx's reference does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.graphs import run_onnx
from validation.sides.fp4 import with_kernels_for_fp4

INPUTS, OUTPUTS = 32, 6


def graph(codes: np.ndarray) -> onnx.ModelProto:
    """Codes ``[INPUTS, OUTPUTS]`` of FP4 behind two ``DequantizeLinear`` and a ``Cast``, as an export has them."""
    draw = np.random.default_rng(0)
    packed = (codes.reshape(-1)[0::2] | codes.reshape(-1)[1::2] << 4).astype(np.uint8).tobytes()
    scales = draw.uniform(0.01, 448, (INPUTS // 16, OUTPUTS)).astype(ml_dtypes.float8_e4m3fn)
    held = [
        helper.make_tensor("v", TensorProto.FLOAT4E2M1, codes.shape, packed, raw=True),
        numpy_helper.from_array(scales, "s"),
        numpy_helper.from_array(np.float32(2**-9), "g"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["s", "g"], ["wide"]),
        helper.make_node("DequantizeLinear", ["v", "wide"], ["w"], axis=0, block_size=16),
        helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT16),
    ]
    made = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)], held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def test_every_number_of_fp4_is_what_the_reference_has() -> None:
    codes = np.resize(np.arange(16, dtype=np.uint8), (INPUTS, OUTPUTS))
    model = graph(codes)
    (wanted,) = ReferenceEvaluator(model).run(None, {})
    assert len(np.unique(np.abs(wanted))) > 30 and (wanted < 0).any()
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented):
        run_onnx(model.SerializeToString(), {})  # once this fails, the way around is for nothing
    with_kernels_for_fp4(model)
    assert np.array_equal(run_onnx(model.SerializeToString(), {})["y"], wanted)


def test_a_graph_without_fp4_stays_as_it_is() -> None:
    model = graph(np.zeros((INPUTS, OUTPUTS), np.uint8))
    del model.graph.initializer[0]
    before = model.SerializeToString()
    with_kernels_for_fp4(model)
    assert model.SerializeToString() == before
