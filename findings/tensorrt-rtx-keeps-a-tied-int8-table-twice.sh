#!/usr/bin/env bash
# TensorRT for RTX stores an INT8 table that embedding and head share twice, unless it stands as the head reads it.
#
# Expected: DequantizeLinear of one constant, read by Gather (rows of an embedding) and by Transpose and MatMul (a tied
# head), is one table in the engine, as INT4 is: 8 MiB for 8192 x 1024 values in 8 bits.
# Seen in tensorrt-rtx 1.7.1.116, whose engines are built without a GPU: 16.8 MiB of INT8, 4.6 MiB of INT4. With the same
# table turned round, [inputs, outputs] for MatMul, and Gather along axis 1 with a Transpose of what it gives, INT8 takes
# 8.7 MiB.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 tensorrt-rtx==1.7.1.116
cat >"$folder/try.py" <<'PY'
import sys

import numpy as np
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

WIDTH, WORDS, BLOCK = 1024, 8192, 32
CAPABILITIES = ("SM80", "SM86", "SM89", "SM120", "SM121")


def graph(bits: int, turned: bool) -> onnx.ModelProto:
    shape = [WIDTH, WORDS] if turned else [WORDS, WIDTH]
    axis = 0 if turned else 1
    blocks = [size // BLOCK if place == axis else size for place, size in enumerate(shape)]
    content = np.random.default_rng(0).integers(0, 256, WIDTH * WORDS * bits // 8, np.uint8).tobytes()
    kind = TensorProto.INT8 if bits == 8 else TensorProto.INT4
    table = helper.make_tensor("table", kind, shape, content, raw=True)
    scales = numpy_helper.from_array(np.full(blocks, 0.01, np.float16), "scales")
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scales"], ["w"], axis=axis, block_size=BLOCK),
        helper.make_node("Gather", ["w", "ids"], ["g"], axis=1 if turned else 0),
        *([helper.make_node("Transpose", ["g"], ["x"], perm=[1, 0])] if turned else []),
        helper.make_node("Tanh", ["x" if turned else "g"], ["z"]),
        *([] if turned else [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])]),
        helper.make_node("MatMul", ["z", "w" if turned else "t"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", WORDS])
    built = helper.make_graph(nodes, "g", [ids], [y], [table, scales])
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def engine_bytes(model: onnx.ModelProto) -> int:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise SystemExit(f"the parser refuses it: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("ids", (1,), (4,), (8,))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(CAPABILITIES)
    for place, name in enumerate(CAPABILITIES):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), place)
    return len(memoryview(builder.build_serialized_network(network, config)))


sizes = {(bits, turned): engine_bytes(graph(bits, turned)) for bits in (8, 4) for turned in (False, True)}
for (bits, turned), size in sizes.items():
    print(f"INT{bits}, {'as the head reads it' if turned else 'rows of the embedding'}: {size / 2**20:.1f} MiB")
times = {key: size / (WIDTH * WORDS * key[0] / 8) for key, size in sizes.items()}
twice, rest = times.pop((8, False)), times.values()
sys.exit(0 if 2 < twice < 2.3 and all(1 < time < 1.4 for time in rest) else 1)
PY
"$folder/env/bin/python" "$folder/try.py" || { echo "this has changed"; exit 1; }
