#!/usr/bin/env bash
# First light on a GPU; `--help` lists the options, `--rehearse` runs on a CPU. PYTHON names the interpreter.
# What tests/gpu/unpack.sh put beside the clone is found before what is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="${GPU_SITE:-$PWD/.cache/gpu/site}:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m tests.gpu.first_light "$@"
