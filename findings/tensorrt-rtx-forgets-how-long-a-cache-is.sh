#!/usr/bin/env bash
# TensorRT for RTX parses Attention over a cache that TensorScatter writes, and drops the input that says how long it is.
#
# Expected: `nonpad_kv_seqlen` (ONNX operators, Attention version 24, "Cache update happens outside the Attention
# operator") is the number of valid keys of each row; what stands behind them takes no part. What the parser cannot keep
# it refuses by name, as it does for softcap, softmax_precision, a second output and a circular TensorScatter.
# TensorRT has the same input, IAttention's key_value_lengths ("a per-batch lengths tensor of shape [batch_size]"), and
# the attention's layer reads it where the network is written by hand.
# Seen in tensorrt-rtx 1.7.1.116, which parses without a GPU: no error, and a network that has the same layers with the
# input and without it; no layer reads the lengths. So unwritten places of the cache get weight: with a cache of zeros, 8
# long and 1 written, what the network says is an eighth of the answer (onnxruntime 1.32.0 on the CPU with the input gives
# 1, without it 0.125; the engine was not run). A mask of valid keys (`attn_mask`) is kept.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 tensorrt-rtx==1.7.1.116
cat > "$folder/run.py" <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
import tensorrt_rtx as trt
from onnx import TensorProto, helper

HEADS, LONG, WIDTH = 1, 8, 4


def model(how):
    """One new key and value are written, and attended over: `how` is "lengths", "mask" or "neither"."""
    cache = [1, HEADS, LONG, WIDTH]
    kinds = {"q": [1, HEADS, 1, WIDTH], "k": cache, "v": cache, "k1": [1, HEADS, 1, WIDTH], "v1": [1, HEADS, 1, WIDTH]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in kinds.items()]
    inputs.append(helper.make_tensor_value_info("written", TensorProto.INT64, [1]))
    nodes = [
        helper.make_node("TensorScatter", ["k", "k1", "written"], ["keys"], axis=2),
        helper.make_node("TensorScatter", ["v", "v1", "written"], ["values"], axis=2),
        helper.make_node("Add", ["written", "one"], ["lengths"]),
    ]
    taken = ["q", "keys", "values"]
    if how == "lengths":
        taken += ["", "", "", "lengths"]
    if how == "mask":
        nodes.append(helper.make_node("Less", ["places", "lengths"], ["valid"]))
        nodes.append(helper.make_node("Reshape", ["valid", "shape"], ["mask"]))
        taken += ["mask"]
    nodes.append(helper.make_node("Attention", taken, ["y"]))
    fixed = {"one": np.array([1]), "places": np.arange(LONG), "shape": np.array([1, 1, 1, LONG])}
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, kinds["q"])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in ("keys", "values")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(v, k) for k, v in fixed.items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


def answer(how):
    zeros = np.zeros((1, HEADS, LONG, WIDTH), np.float32)
    new = np.ones((1, HEADS, 1, WIDTH), np.float32)
    feeds = {"q": new * 0, "k": zeros, "v": zeros, "k1": new, "v1": new, "written": np.array([0])}
    return onnxruntime.InferenceSession(model(how), providers=["CPUExecutionProvider"]).run(["y"], feeds)[0].max()


def parsed(how):
    """Whether a layer of the parsed network reads the lengths, and the kinds of its layers."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model(how)):
        return "refused", None
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    read = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    kinds = sorted(str(layer.type).rsplit(".", 1)[-1] for layer in layers)
    return ("lengths" in read), kinds


def by_hand():
    """Whether the lengths are read where they are set through TensorRT's own interface."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    q = network.add_input("q", trt.float32, (1, HEADS, 1, WIDTH))
    keys, values = (network.add_input(name, trt.float32, (1, HEADS, LONG, WIDTH)) for name in ("keys", "values"))
    lengths = network.add_input("lengths", trt.int32, (1,))
    network.add_attention(q, keys, values, trt.AttentionNormalizationOp.SOFTMAX, False).key_value_lengths = lengths
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    return any(layer.get_input(i) and layer.get_input(i).name == "lengths" for layer in layers for i in range(layer.num_inputs))


for how in ("lengths", "neither", "mask"):
    print(f"onnxruntime, {how}: y = {answer(how):.4g}")
found = {how: parsed(how) for how in ("lengths", "neither", "mask")}
print("TensorRT for RTX: are the lengths read by any layer?", {how: read for how, (read, _) in found.items()})
print("the same layers with lengths and without:", found["lengths"][1] == found["neither"][1])
right = [answer(how) for how in ("lengths", "neither", "mask")] == [1.0, 0.125, 1.0]
reads = [read for read, _ in found.values()] == [False, False, True]
print("are they, where key_value_lengths is set by hand?", by_hand())
raise SystemExit(0 if by_hand() and right and reads and found["lengths"][1] == found["neither"][1] else 1)
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/log" || { tail -3 "$folder/log"; echo "this has changed"; exit 1; }
echo "as described"
