#!/usr/bin/env bash
# First light on a GPU; `--help` lists the options, `--rehearse` runs on a CPU. PYTHON names the interpreter.
# What tests/gpu/unpack.sh put beside the clone is found before what is installed, where it is for this Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
SITE="$PWD/.cache/gpu/site"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if PYTHONPATH="$SITE" "$PYTHON" -c 'import onnxruntime, sys; sys.exit("gpu/site" not in onnxruntime.__file__)' 2>/dev/null
then
    PYTHONPATH="$SITE:$PYTHONPATH"
fi
exec "$PYTHON" -m tests.gpu.first_light "$@"
