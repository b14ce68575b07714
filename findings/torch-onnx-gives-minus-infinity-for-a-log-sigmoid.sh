#!/usr/bin/env bash
# A model's logsigmoid is minus infinity from -18 on once it is exported, and logaddexp is infinite beyond 88.
#
# Expected: `torch.nn.functional.logsigmoid(-18)` is -18 and `torch.logaddexp(100, 99)` 100.31; such functions are
# there because log(sigmoid(x)) and log(exp(x) + exp(y)) overflow as they are written. Gated linear attention takes the
# first for its decay.
# Seen in torch 2.13.0 with onnxscript 0.7.2 (opset 20, dynamo) and onnxruntime 1.32.0 (CPU): the graph is Sigmoid and
# Log, and Exp, Exp, Add and Log. logsigmoid(-15) is -14.84, and -18, -20 and -100 are minus infinity, as ONNX
# Runtime's Sigmoid is 0 there. Nothing is said.
# -softplus(-x), the same function, is exported exactly.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import contextlib
import io
import sys

import numpy as np
import onnxruntime
import torch


class Layer(torch.nn.Module):
    def __init__(self, computed):
        super().__init__()
        self.computed = computed

    def forward(self, *values):
        return self.computed(*values)


def both(computed, *values):
    """What PyTorch gives, and what the exported graph does."""
    feeds = tuple(torch.tensor(one) for one in values)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(Layer(computed), feeds, dynamo=True, opset_version=20, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [one.name for one in session.get_inputs()]
    made = session.run(None, dict(zip(names, [one.numpy() for one in feeds])))[0]
    wanted = computed(*feeds).numpy()
    print(f"PyTorch {wanted.tolist()}")
    print(f"    exported, {[node.op_type for node in program.model_proto.graph.node]}: {made.tolist()}")
    return wanted, made


def right(wanted, made):
    return np.allclose(wanted, made, rtol=1e-5)


GATES = [-1.0, -15.0, -18.0, -20.0, -100.0]
wanted, made = both(torch.nn.functional.logsigmoid, GATES)
fits = right(wanted[0], made[0]) and not right(wanted[1], made[1])
fits &= bool(np.all(made[2:] == -np.inf) and np.all(np.isfinite(wanted)))
fits &= right(*both(lambda x: -torch.nn.functional.softplus(-x), GATES))
wanted, made = both(torch.logaddexp, [1.0, 100.0, -200.0], [2.0, 99.0, -201.0])
fits &= right(wanted[0], made[0]) and made[1:].tolist() == [np.inf, -np.inf] and bool(np.all(np.isfinite(wanted)))
sys.exit(0 if fits else 1)
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/log" || { tail -3 "$folder/log"; echo "this has changed"; exit 1; }
echo "as described"
