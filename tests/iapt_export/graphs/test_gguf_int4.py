"""A Q4_0 GGUF file and int4 share a grid: blocks of 32, one scale, no zero point. Nothing is rounded twice."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
from onnx import numpy_helper

from iapt_export.contract.low_bits import Rounding
from iapt_export.graphs.export import Serving, export_graphs
from tests.trainers.decoder.gguf_files import TinyFile, write
from trainers.decoder.backbone import load_backbone
from trainers.decoder.quantise import Blocks


def test_q4_0_survives_int4_exactly(tmp_path: Path) -> None:
    file = TinyFile("llama", layers=1, quantised=gguf.GGMLQuantizationType.Q4_0)
    model = load_backbone(str(write(tmp_path / "tiny.gguf", file))).model
    export_graphs(
        model, [], tmp_path, dtype="fp32", opset=23, names=("serve",), serving=Serving(24, rounding=Rounding(4))
    )
    graph = onnx.load(tmp_path / "serve.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    num_rows = 0
    rows = {row.tobytes() for weight in model.state_dict().values() if weight.ndim == 2 for row in weight.numpy()}
    for node in graph.node:
        fields = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type != "MatMulNBits" or fields["bits"] != 4:
            continue
        values, scales = stored[node.input[1]], stored[node.input[2]]
        matrix = Blocks(4, values, scales.reshape(values.shape[:2]), fields["K"]).restored()
        num_rows += matrix.shape[1]
        assert all(np.ascontiguousarray(column).tobytes() in rows for column in matrix.T)
    assert num_rows == 64 + 64 + 2 * 96, "q, output, gate and up; what narrows has 8 bits"
