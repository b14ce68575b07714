#!/usr/bin/env bash
# onnxslim and polygraphy's constant folding turn a function body's `Constant <value_float = 1.0>` into a double.
#
# Expected: `value_float` makes a float32 (ONNX operators, Constant), before and after; the model runs as it did.
# Seen in onnxslim 0.1.98 and polygraphy 0.53.6 (onnx-graphsurgeon 0.6.1): the tool reports success, the body holds a
# `value` tensor of float64, and ONNX Runtime refuses the file (Add of float and double).
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 onnxslim==0.1.98 polygraphy==0.53.6 onnx-graphsurgeon==0.6.1
cat > "$folder/make.py" <<'PYTHON'
import sys

import onnx
import onnx.parser

model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20, "own": 1]>
g (float[4] x) => (float[4] y) { y = own.plus_one (x) }
<domain: "own", opset_import: ["": 20]>
plus_one (x) => (y) { one = Constant <value_float = 1.0> ()
  y = Add (x, one) }""")
onnx.checker.check_model(model, full_check=True)
onnx.save(model, sys.argv[1])
PYTHON
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime

try:
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    print("right" if session.run(None, {"x": np.zeros(4, np.float32)})[0].tolist() == [1.0] * 4 else "other numbers")
except Exception as error:
    print("double" if "double" in str(error) else f"refused: {error}")
PYTHON
bin=$folder/env/bin
"$bin/python" "$folder/make.py" "$folder/model.onnx"
"$bin/onnxslim" "$folder/model.onnx" "$folder/onnxslim.onnx" > /dev/null
"$bin/polygraphy" surgeon sanitize --fold-constants "$folder/model.onnx" -o "$folder/polygraphy.onnx" > /dev/null
status=0
for name in model onnxslim polygraphy; do
  said=$("$bin/python" "$folder/run.py" "$folder/$name.onnx")
  echo "$name.onnx in ONNX Runtime: $said"
  if [ "$said" != "$([ $name = model ] && echo right || echo double)" ]; then status=1; fi
done
[ $status = 0 ] && echo "as described" || echo "this has changed"
exit $status
