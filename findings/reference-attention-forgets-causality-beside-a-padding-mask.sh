#!/usr/bin/env bash
# onnx's reference evaluator lets every query of a causal Attention see the first key alone where the mask is one row.
#
# Expected: a mask "broadcastable to (batch_size, q_num_heads, q_sequence_length, total_sequence_length)", as a padding
# mask of (batch, 1, 1, keys) is, intersects with `is_causal`: query i attends key j iff j <= i (ONNX operators,
# Attention versions 23 and 24). OpenVINO 2026.4.1 (CPU) agrees with NumPy.
# Seen in onnx 1.23.2: `onnx.reference` makes the causal mask as high as the mask it was given, one row, and broadcasts
# that: each query gets the first value, whatever the keys; with past keys, each sees the past and one more. Neither errors nor
# warnings. onnxruntime 1.32.0 (CPU) refuses the mask when it runs ("inconsistent q_sequence_length"), against the same
# sentence. The same mask written out for each query gives the right answer in all three.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

QUERIES, WIDTH = 4, 8
source = np.random.default_rng(0)
arrays = {name: source.standard_normal((2, 1, QUERIES, WIDTH)).astype(np.float32) for name in "QKV"}
padding = np.ones((2, 1, 1, QUERIES), bool)
padding[1, :, :, 3] = False
allowed = padding & np.tri(QUERIES, dtype=bool)
scores = np.where(allowed, arrays["Q"] @ arrays["K"].swapaxes(2, 3) / np.sqrt(WIDTH), -np.inf)
shares = np.exp(scores - scores.max(-1, keepdims=True))
wanted = shares / shares.sum(-1, keepdims=True) @ arrays["V"]
first = np.broadcast_to(arrays["V"][:, :, :1], wanted.shape)


def runtimes(model):
    text = model.SerializeToString()
    yield "onnx.reference", lambda feeds: ReferenceEvaluator(model).run(None, feeds)[0]
    session = onnxruntime.InferenceSession(text, providers=["CPUExecutionProvider"])
    yield "onnxruntime", lambda feeds: session.run(None, feeds)[0]
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(text, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    yield "openvino", lambda feeds: compiled(feeds)[0]


onnxruntime.set_default_logger_severity(4)
seen = []
for mask in (padding, np.broadcast_to(padding, (2, 1, QUERIES, QUERIES)).copy()):
    feeds = arrays | {"mask": mask}
    inputs = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()]
    outputs = [helper.make_tensor_value_info("Y", TensorProto.FLOAT, wanted.shape)]
    graph = helper.make_graph([helper.make_node("Attention", list(feeds), ["Y"], is_causal=1)], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    for name, run in runtimes(model):
        try:
            made = np.array(run(feeds))
        except Exception as error:
            print(f"{name}, mask of {list(mask.shape)}: refused")
            seen.append("refused" if "inconsistent q_sequence_length" in str(error) else str(error))
            continue
        off = np.abs(made - wanted).max()
        print(f"{name}, mask of {list(mask.shape)}: {off:.2g} from NumPy, {np.abs(made - first).max():.2g} from the first value")
        seen.append("right" if off < 1e-5 else "first" if np.allclose(made, first, atol=1e-6) else "other")
sys.exit(0 if seen == ["first", "refused", "right"] + ["right"] * 3 else 1)
PYTHON
"$folder/env/bin/python" "$folder/run.py" || { echo "this has changed"; exit 1; }
echo "as described"
