#!/usr/bin/env bash
# ONNX Runtime 1.28 to 1.31 give wrong answers from 4- and 8-bit weights whose packed form they saved themselves.
#
# Expected: a model that is saved with session.save_external_prepacked_constant_initializers answers as the one that it
# was made from, since its kernels find what they would have packed. Replicas would share it, and open at once.
# Seen in onnxruntime 1.31.1 (1.28.0 and 1.30.0 alike; AVX2): of three com.microsoft::MatMulNBits of 8 bits one answers
# right, one not, and one with NaN; of 4 bits the same. What is packed for accuracy_level 4 depends on the address that
# it stands at, and it is saved wherever the one before it ends. Weights in fp32 are right.
# onnxruntime 1.32.0 pads it, and is right; up to 1.27.0 such weights are not saved in packed form.
# Exits with 0 while it is so; 1 when not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.4
"$folder/env/bin/pip" install --quiet --no-deps --target "$folder/newer" onnxruntime==1.32.0

cat >"$folder/run.py" <<'PYTHON'
import os
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, save

INPUTS, OUTPUTS, BLOCK, PRODUCTS = 64, 32, 32, 3
draw = np.random.default_rng(0)
nodes, constants, weights = [], [], []
for n in range(PRODUCTS):
    levels = draw.integers(0, 256, size=(OUTPUTS, INPUTS // BLOCK, BLOCK)).astype(np.uint8)
    scales = draw.uniform(0.01, 0.02, size=(OUTPUTS, INPUTS // BLOCK)).astype(np.float32)
    weights.append(((levels.astype(np.float32) - 128) * scales[..., None]).reshape(OUTPUTS, INPUTS))
    constants += [numpy_helper.from_array(levels, f"levels{n}"), numpy_helper.from_array(scales, f"scales{n}")]
    sizes = {"K": INPUTS, "N": OUTPUTS, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    nodes.append(helper.make_node("MatMulNBits", ["x", f"levels{n}", f"scales{n}"], [f"y{n}"], domain="com.microsoft", **sizes))
value = helper.make_tensor_value_info
outputs = [value(f"y{n}", TensorProto.FLOAT, ["rows", OUTPUTS]) for n in range(PRODUCTS)]
graph = helper.make_graph(nodes, "three", [value("x", TensorProto.FLOAT, ["rows", INPUTS])], outputs, constants)
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
source, packed = (os.path.join(sys.argv[1], name) for name in ("source.onnx", "packed.onnx"))
save(helper.make_model(graph, opset_imports=opsets, ir_version=10), source, save_as_external_data=True, location="source.data")


def session(path, save_to=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if save_to is not None:
        options.optimized_model_filepath = save_to
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "packed.data")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


x = draw.normal(size=(3, INPUTS)).astype(np.float32)
wanted = [x @ weight.T for weight in weights]
for opened in (session(source, packed), session(packed)):
    given = opened.run(None, {"x": x})
    print(*("right" if np.abs(y - w).max() < 0.02 * np.abs(w).max() else "wrong" for y, w in zip(given, wanted, strict=True)))
PYTHON
run() { "$folder/env/bin/python" "$folder/run.py" "$folder" | tr '\n' ';'; }
older=$(run)
newer=$(PYTHONPATH="$folder/newer" run)
echo "packed anew; packed, from the file: onnxruntime 1.31.1: $older 1.32.0: $newer"
[ "$older" = "right right right;right wrong wrong;" ] && [ "$newer" = "right right right;right right right;" ]
