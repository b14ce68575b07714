#!/usr/bin/env bash
# ONNX Runtime's and OpenVINO's causal Attention with past keys sees the future where queries and new keys differ in number.
#
# Expected: ONNX operators, Attention (versions 23 and 24), is_causal: query i attends key j iff j <= i + offset, and
# "offset = past_sequence_length when past_key is provided", however many new keys come with it ("query and key might have
# different lengths").
# Seen: onnxruntime 1.32.0 (CPU), one query: with past keys the causal mask is left out, so 1 query, 3 past and 4 new keys
# give the answer over all 7 and not over 4; with 2 queries, or without past, it is right (without past since PR 29050,
# issue 29020). OpenVINO 2026.4.1 (CPU) takes all keys minus the queries for the offset: wrong for 1 and for 2 queries, right
# where there are as many new keys as queries, which is how decoders use it. onnx.reference 1.23.2 is right in all.
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

WIDTH = 8


def attended(feeds, offset):
    keys, values = (np.concatenate([feeds[f"past_{name}"], feeds[name]], 2) for name in "KV")
    scores = feeds["Q"] @ keys.swapaxes(2, 3) / np.sqrt(WIDTH)
    scores = np.where(np.tri(*scores.shape[-2:], offset, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True) @ values


def answers(feeds):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()]
    names = ["Y", "present_K", "present_V"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, None, WIDTH]) for name in names]
    node = helper.make_node("Attention", ["Q", "K", "V", "", "past_K", "past_V"], names, is_causal=1)
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    text = model.SerializeToString()
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(text, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {
        "onnxruntime": onnxruntime.InferenceSession(text, providers=["CPUExecutionProvider"]).run(None, feeds)[0],
        "openvino": np.array(compiled(feeds)[0]),
        "onnx.reference": ReferenceEvaluator(model).run(None, feeds)[0],
    }


source, seen = np.random.default_rng(0), []
for queries, past, new in ((1, 3, 4), (2, 3, 4), (1, 3, 1), (4, 3, 4)):
    shapes = {"Q": queries, "K": new, "V": new, "past_K": past, "past_V": past}
    feeds = {name: source.standard_normal((1, 1, long, WIDTH)).astype(np.float32) for name, long in shapes.items()}
    for name, made in answers(feeds).items():
        off, late = (np.abs(made - attended(feeds, offset)).max() for offset in (past, past + new - queries))
        verdict = "right" if off < 1e-5 else "as if the queries stood last" if late < 1e-5 else "other"
        print(f"{queries} queries, {past} past and {new} new keys, {name}: {verdict}, {off:.2g} from NumPy")
        seen.append(verdict)
late, right = "as if the queries stood last", "right"
sys.exit(0 if seen == [late, late, right, right, late, right] + [right] * 6 else 1)
PYTHON
"$folder/env/bin/python" "$folder/run.py" || { echo "this has changed"; exit 1; }
echo "as described"
