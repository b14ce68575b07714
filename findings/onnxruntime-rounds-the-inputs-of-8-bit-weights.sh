#!/usr/bin/env bash
# Since 1.25, ONNX Runtime rounds to 8 bits what a matrix of 8 bits is multiplied with, where the graph has it in fp32.
#
# Expected: DequantizeLinear of int8 weights (per tensor, per output, or in blocks) and MatMul over an fp32 input is
# the product with the restored matrix (ONNX operators), to the precision of fp32: "weight-only" quantisation.
# Seen in onnxruntime 1.32.0 (CPU; 1.25.0, 1.26.0 and 1.31.1 alike): at the default optimisation the pair becomes
# com.microsoft::MatMulNBits with accuracy_level 4, which rounds the input to int8 in blocks of 32. One input of 40
# among 63 of about 1 costs over 1 % of the largest output. 1.24.1 keeps the pair and is right to 1e-6. So answers of a
# model change with the package, and nothing in its file says so.
# `session.qdq_matmulnbits_accuracy_level` = 0, or `session.disable_quant_qdq` = 1, give the product back.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

INPUTS, OUTPUTS, STEP = 64, 16, np.float32(0.01)
KINDS = {
    "per tensor": ((), {}),
    "per output": ((OUTPUTS,), {"axis": 1}),
    "in blocks": ((2, OUTPUTS), {"axis": 0, "block_size": 32}),
}
source = np.random.default_rng(0)
values = source.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
x = source.standard_normal((1, INPUTS)).astype(np.float32)
x[0, 5] = 40
wanted = x @ (values * STEP)


def off(kind, **entries):
    shape, how = KINDS[kind]
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], **how), helper.make_node("MatMul", ["x", "w"], ["y"])]
    constants = [onnx.numpy_helper.from_array(values, "q"), onnx.numpy_helper.from_array(np.full(shape, STEP), "s")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("x", INPUTS), ("y", OUTPUTS))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    options = onnxruntime.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.abs(session.run(None, {"x": x})[0] - wanted).max() / np.abs(wanted).max()


fits = True
for kind in KINDS:
    default = off(kind)
    exact = [off(kind, qdq_matmulnbits_accuracy_level="0"), off(kind, disable_quant_qdq="1")]
    print(f"onnxruntime {onnxruntime.__version__}, int8 {kind}: {default:.2g} of the largest output away")
    print(f"    with the options {exact[0]:.2g} and {exact[1]:.2g}")
    fits &= max(exact) < 1e-5 and (default > 5e-3 if sys.argv[1] == "rounds" else default < 1e-5)
sys.exit(0 if fits else 1)
PYTHON
for pair in 1.32.0:rounds 1.24.1:right; do
  python3 -m venv "$folder/${pair%:*}"
  "$folder/${pair%:*}/bin/pip" install --quiet onnx==1.20.0 "onnxruntime==${pair%:*}" numpy==2.3.5
  "$folder/${pair%:*}/bin/python" "$folder/run.py" "${pair#*:}" || { echo "this has changed"; exit 1; }
done
echo "as described"
