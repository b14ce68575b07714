#!/usr/bin/env bash
# onnx's reference evaluator gives capped scores where Attention is asked for the raw ones.
#
# Expected: with `qk_matmul_output_mode = 0` the fourth output of Attention (ONNX operators, versions 23 and 24) "is the
# output of qk matmul", before `softcap`; so is it in onnxruntime 1.31.1 (CPU), to the last bit of NumPy's product.
# Seen in onnx 1.23.2: `onnx.reference` returns softcap * tanh(qk / softcap) for modes 0 and 1 alike. Without a softcap,
# and for the first output, both runtimes agree. Who holds a runtime's scores against the reference sees a fault that is
# not the runtime's.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cat >"$folder/try.py" <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

SOFTCAP = 1.0
random = np.random.default_rng(0)
feeds = {name: random.standard_normal((1, 1, 3, 4), dtype=np.float32) for name in "QKV"}
raw = feeds["Q"] @ feeds["K"].transpose(0, 1, 3, 2) / 2
capped = SOFTCAP * np.tanh(raw / SOFTCAP)
node = helper.make_node("Attention", list("QKV"), ["Y", "", "", "scores"], softcap=SOFTCAP, qk_matmul_output_mode=0)
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in feeds.items()]
outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, raw.shape)]
graph = helper.make_graph([node], "one", inputs, outputs)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
onnx.checker.check_model(model)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
found = {"onnxruntime": session.run(None, feeds)[0], "onnx.reference": ReferenceEvaluator(model).run(None, feeds)[0]}
for name, scores in found.items():
    print(f"{name}: {np.abs(scores - raw).max():.2g} from the raw scores, {np.abs(scores - capped).max():.2g} from the capped")
same = np.allclose(found["onnxruntime"], raw, atol=1e-6) and np.allclose(found["onnx.reference"], capped, atol=1e-6)
raise SystemExit(0 if same and np.abs(raw - capped).max() > 0.1 else 1)
PY
"$folder/env/bin/python" "$folder/try.py" || { echo "this has changed"; exit 1; }
