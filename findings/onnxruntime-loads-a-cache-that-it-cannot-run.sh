#!/usr/bin/env bash
# ONNX Runtime 1.25 and 1.26 load attention over a cache in 8 bits for the CPU, and cannot run it.
#
# Expected: what a session has no kernel for is refused when the model is loaded (NOT_IMPLEMENTED), as 1.24 refuses this
# graph: com.microsoft::GroupQueryAttention with int8 buffers, k_quant_type and v_quant_type, and scales.
# Seen in onnxruntime 1.26.0 (1.25.0 and 1.25.1 alike): the CPU's kernel says that it takes int8, the session opens, and
# the first run fails with "Tensor type mismatch", whatever the lengths. So a server starts and answers nobody.
# onnxruntime 1.27.0 to 1.32.0 compute it right, here within 1e-6 of NumPy.
# Exits with 0 while it is so; 1 when not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.26.0 onnx==1.23.2 numpy==2.4.4
"$folder/env/bin/pip" install --quiet --no-deps --target "$folder/newer" onnxruntime==1.27.0

cat >"$folder/run.py" <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

HEADS, WIDTH, CAPACITY, PAST = 2, 16, 8, 3
draw = np.random.default_rng(0)
scales = {name: np.repeat(np.array(of_heads, np.float32), WIDTH) for name, of_heads in (("k", (0.02, 0.05)), ("v", (0.03, 0.01)))}
flat, buffer = [1, 1, HEADS * WIDTH], [1, HEADS, CAPACITY, WIDTH]
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, flat) for name in ("query", "key", "value")]
inputs += [helper.make_tensor_value_info(name, TensorProto.INT8, buffer) for name in ("past_key", "past_value")]
inputs += [helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]), helper.make_tensor_value_info("total", TensorProto.INT32, [])]
outputs = [helper.make_tensor_value_info("mixed", TensorProto.FLOAT, flat)]
outputs += [helper.make_tensor_value_info(name, TensorProto.INT8, buffer) for name in ("present_key", "present_value")]
kinds = {f"{letter}_quant_type": "PER_CHANNEL" for letter in "kv"}
node = helper.make_node(
    "GroupQueryAttention",
    [*(value.name for value in inputs), "", "", "", "", "", "k", "v"],
    [value.name for value in outputs],
    domain="com.microsoft", num_heads=HEADS, kv_num_heads=HEADS, kv_cache_bit_width=8, **kinds,
)
constants = [numpy_helper.from_array(array, name) for name, array in scales.items()]
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
model = helper.make_model(helper.make_graph([node], "one", inputs, outputs, constants), opset_imports=opsets, ir_version=10)
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
states = {name: draw.normal(size=flat).astype(np.float32) for name in ("query", "key", "value")}
past = {name: draw.integers(-127, 128, size=buffer).astype(np.int8) for name in ("past_key", "past_value")}
lengths = {"seqlens_k": np.array([PAST], np.int32), "total": np.array(PAST + 1, np.int32)}
try:
    mixed = session.run(["mixed"], states | past | lengths)[0].reshape(HEADS, 1, WIDTH)
except Exception as error:  # its exceptions share no public base class
    print("fails" if "Tensor type mismatch" in str(error) else str(error))
    raise SystemExit
whole = []
for name, letter in (("key", "k"), ("value", "v")):
    scale = scales[letter].reshape(HEADS, 1, WIDTH)
    new = np.clip(np.rint(states[name].reshape(HEADS, 1, WIDTH) / scale), -128, 127)
    whole.append(np.concatenate([past[f"past_{name}"][0, :, :PAST], new], axis=1) * scale)
scores = np.exp(states["query"].reshape(HEADS, 1, WIDTH) @ whole[0].transpose(0, 2, 1) / WIDTH**0.5)
wanted = scores / scores.sum(-1, keepdims=True) @ whole[1]
print("right" if np.abs(mixed - wanted).max() < 1e-6 * np.abs(wanted).max() + 1e-6 else "wrong")
PYTHON
older=$("$folder/env/bin/python" "$folder/run.py")
newer=$(PYTHONPATH="$folder/newer" "$folder/env/bin/python" "$folder/run.py")
echo "onnxruntime 1.26.0 loads the graph and its first run $older; 1.27.0 is $newer"
[ "$older" = fails ] && [ "$newer" = right ]
