#!/usr/bin/env bash
# ONNX Runtime 1.23.0 computes the standard Attention operator wrongly where several query heads share a key head.
#
# Expected: ONNX operator Attention, version 23, "grouped query attention": each key and value head serves the query
# heads next to each other, so 4 query heads over 2 key heads equal 4 over the 2 repeated; 1.23.1 and 1.32.0 agree with
# NumPy to 3e-7.
# Seen in onnxruntime 1.23.0 (CPU): no error, and outputs that are off by more than their own size; with as many key
# heads as query heads it is right.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/run.py" <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper


def error(key_heads):
    shapes = {"q": [1, 4, 5, 8], "k": [1, key_heads, 5, 8], "v": [1, key_heads, 5, 8], "y": [1, 4, 5, 8]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    graph = helper.make_graph([node], "g", [values["q"], values["k"], values["v"]], [values["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    source = np.random.default_rng(0)
    q, k, v = (source.standard_normal(shapes[name]).astype(np.float32) for name in "qkv")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"q": q, "k": k, "v": v})
    k, v = (np.repeat(array, 4 // key_heads, axis=1) for array in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(8) + np.triu(np.full((5, 5), -np.inf), 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = shares / shares.sum(-1, keepdims=True) @ v
    return float(np.abs(made - wanted).max())


print("right" if error(4) < 1e-5 else "wrong", "right" if error(2) < 1e-5 else "wrong")
PYTHON
status=0
for version in 1.23.0 1.23.1 1.32.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet onnxruntime==$version onnx==1.19.1
  said=$("$folder/$version/bin/python" "$folder/run.py")
  echo "onnxruntime $version, 4 query heads over 4 and over 2 key heads: $said"
  if [ "$said" != "right $([ $version = 1.23.0 ] && echo wrong || echo right)" ]; then status=1; fi
done
[ $status = 0 ] && echo "as described" || echo "this has changed"
exit $status
