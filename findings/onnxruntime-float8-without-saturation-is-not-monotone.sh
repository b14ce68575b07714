#!/usr/bin/env bash
# ONNX Runtime's conversion to FP8 with `saturate = 0` goes back to finite numbers, or to NaN, just behind the largest.
#
# Expected: ONNX operators, Cast, second table (saturate = 0): where [x], x rounded to the type's width, is beyond
# FLT_MAX, E4M3FN gives NaN and E5M2 infinity. The largest are 448 and 57344, so that begins above 464 and at 61440 (a tie
# with the even neighbour). QuantizeLinear refers to the same table. onnx.reference 1.23.2 does so.
# Seen in onnxruntime 1.32.0 (CPU; 1.31.1 alike): to E4M3FN 465 to 479 are NaN, 480 to 495 are 448 again, from 496 on all
# is NaN; to E5M2 61440 to 65535 are NaN, and from 65536 on infinity. Of a type whose only use of NaN is "no number", an
# overflow becomes it, and code that looks for infinity does not find it. Cast and QuantizeLinear alike; with saturate = 1,
# the default, all is as specified.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 ml_dtypes==0.6.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

NAN, INF = np.nan, np.inf
CASES = [  # type, values, by the table, by onnxruntime
    (
        TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, [448, 464, 465, 479, 480, 490, 495, 496, 600, -490],
        [448, 448] + [NAN] * 8, [448, 448, NAN, NAN, 448, 448, 448, NAN, NAN, -448],
    ),
    (
        TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2, [57344, 61439, 61440, 63000, 65535, 65536, 70000, -63000],
        [57344, 57344] + [INF] * 5 + [-INF], [57344, 57344, NAN, NAN, NAN, INF, INF, NAN],
    ),
]  # fmt: skip


def model(number, dtype, operator, saturate):
    if operator == "Cast":
        nodes = [helper.make_node("Cast", ["x"], ["c"], to=number, saturate=saturate)]
        nodes.append(helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT))
    else:
        nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["c"], saturate=saturate)]
        nodes.append(helper.make_node("DequantizeLinear", ["c", "scale"], ["y"]))
    fixed = [onnx.numpy_helper.from_array(np.float32(1), "scale"), onnx.numpy_helper.from_array(np.zeros((), dtype), "zero")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], fixed if operator != "Cast" else [])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(made, full_check=True)
    return made


fits = True
for number, dtype, values, wanted, seen in CASES:
    x = np.array(values, np.float32)
    largest = float(ml_dtypes.finfo(dtype).max)
    for operator in ("Cast", "QuantizeLinear"):
        for saturate in (0, 1):
            made = model(number, dtype, operator, saturate)
            session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
            found, reference = session.run(None, {"x": x})[0], ReferenceEvaluator(made).run(None, {"x": x})[0]
            if not saturate:
                print(operator, dtype.__name__, "of", values, "\n    onnxruntime:   ", found, "\n    onnx.reference:", reference)
            clipped = np.sign(x) * largest
            fits &= np.array_equal(found, clipped if saturate else seen, equal_nan=True)
            fits &= np.array_equal(reference, clipped if saturate else wanted, equal_nan=True)
sys.exit(0 if fits else 1)
PYTHON
"$folder/env/bin/python" "$folder/run.py" || { echo "this has changed"; exit 1; }
echo "as described"
