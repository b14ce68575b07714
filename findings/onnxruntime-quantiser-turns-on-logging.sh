#!/usr/bin/env bash
# Importing ONNX Runtime's weight quantiser makes the whole program log from INFO on.
#
# Expected: a library that is imported leaves the root logger alone, as Python's logging HOWTO asks of libraries.
# Seen in onnxruntime 1.31.1: `onnxruntime.quantization.matmul_nbits_quantizer` calls `logging.basicConfig(level=INFO)`
# when it is imported. A program that has not set up logging yet gets a handler on the root logger and level INFO, so
# that every other library's INFO lines appear on stderr (an export of 30 layers: about 400 lines of onnxscript and
# onnx-ir); and its own `logging.basicConfig(...)` afterwards does nothing, without a word.
# Exits with 0 while it is so; 1 when not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 onnx-ir==1.1.0 numpy==2.4.4

"$folder/env/bin/python" - <<'PYTHON'
import logging
import sys

before = (len(logging.root.handlers), logging.root.level)
import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: E402, F401

after = (len(logging.root.handlers), logging.root.level)
logging.basicConfig(level=logging.ERROR)
is_kept = logging.root.level == logging.INFO
print(f"handlers and level of the root logger: {before} before, {after} after; a later basicConfig is ignored: {is_kept}")
sys.exit(0 if before == (0, logging.WARNING) and after == (1, logging.INFO) and is_kept else 1)
PYTHON
