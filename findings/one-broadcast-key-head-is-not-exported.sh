#!/usr/bin/env bash
# torch.onnx.export takes an attention whose only key head PyTorch broadcasts at opset 20, and stops at it at opset 23.
#
# Expected: `scaled_dot_product_attention` with 4 query heads and 1 key head runs in PyTorch (the head is broadcast, as
# transformers' Falcon with `multi_query` relies on), equals `enable_gqa=True` to the last digits, and torch.export
# takes it; so an ONNX graph that computes the same, whatever the opset.
# Seen in torch 2.13.0 with onnxscript 0.7.2: at opset 20 that is so; at opset 23, which has an operator for attention,
# the exporter raises "requires q_num_heads = kv_num_heads", and with `enable_gqa=True`, the same computation, it does not.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch
from onnx.reference import ReferenceEvaluator
import torch.nn.functional as F


class Attention(torch.nn.Module):
    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=self.said)


def outcome(said, opset):
    try:
        graph = torch.onnx.export(Attention(said), inputs, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return "heads differ" if "q_num_heads = kv_num_heads" in str(error) else f"another error: {error}"
    feeds = {value.name: tensor.numpy() for value, tensor in zip(graph.model.graph.inputs, inputs)}
    (made,) = ReferenceEvaluator(graph.model_proto).run(None, feeds)
    return "right" if torch.allclose(torch.from_numpy(made), Attention(True)(*inputs), atol=1e-5) else "wrong"


torch.manual_seed(0)
inputs = torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8)
same = torch.allclose(Attention(False)(*inputs), Attention(True)(*inputs), atol=1e-6)
torch.export.export(Attention(False), inputs)
print("PyTorch:", "the same" if same else "differ")
for opset in (20, 23):
    print(f"opset {opset}:", outcome(False, opset), "/", outcome(True, opset))
PYTHON
said=$("$folder/env/bin/python" "$folder/run.py" 2> "$folder/log" | grep -E "^(PyTorch|opset)")
echo "$said"
wanted="PyTorch: the same
opset 20: right / right
opset 23: heads differ / right"
if [ "$said" = "$wanted" ]; then echo "as described"; else echo "this has changed"; exit 1; fi
