#!/usr/bin/env bash
# Put what first light needs besides the repository into pieces of at most 60 MiB under .cache/gpu/parts, on a machine
# that has a package index; tests/gpu/unpack.sh unpacks them beside the GPU, where there may be none.
#
#   runtime    ONNX Runtime's GPU build with the machine code of one GPU generation, and small packages
#   backbone   the demo's backbone, as GGUF
#   data       what the quality plan trains on
#
# PYTHON: an environment of this repository (make venv). TARGET_PYTHON: the version there (3.12). GPU_ARCH: its
# generation (90, Hopper). PARCELS: which of the three (all).
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/gpu/parcels.sh
PYTHON="${PYTHON:-.venv/bin/python}"
TARGET_PYTHON="${TARGET_PYTHON:-3.12}"
GPU_ARCH="${GPU_ARCH:-90}"
PARCELS="${PARCELS:-runtime backbone data}"
CACHE=.cache/gpu
PARTS="$CACHE/parts"
ORT="onnxruntime-gpu==1.31.1"
# what an image with PyTorch, transformers and ONNX lacks of this project's needs
SMALL=(cyclopts docstring-parser rich-rst docutils gguf cuda-bindings cuda-pathfinder)
mkdir -p "$PARTS" "$CACHE/wheels"

get() {  # wheels for the machine there, without what they need
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -c constraints.txt \
        --python-version "$TARGET_PYTHON" --implementation cp --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$CACHE/wheels" "$@"
}

for name in $PARCELS; do
    staged="$CACHE/staged-$name"
    rm -rf "$staged"
    mkdir -p "$staged"
    case "$name" in
    runtime)
        get "$ORT"
        get "${SMALL[@]}"
        for wheel in "$CACHE"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$staged"; done
        # the Python module holds ONNX Runtime itself; the other libraries are for C, TensorRT and tools
        rm -rf "$staged"/onnxruntime/capi/libonnxruntime.so* "$staged"/onnxruntime/capi/*_tensorrt.so \
            "$staged"/onnxruntime/{transformers,tools,quantization,datasets}
        "$PYTHON" -m tests.gpu.thin "$staged/onnxruntime/capi/libonnxruntime_providers_cuda.so" "$GPU_ARCH"
        ;;
    backbone)
        PYTHONPATH="examples:$PWD" "$PYTHON" -c \
            'import sys, shutil
from get_backbone import BACKBONES, DEFAULT, find_parts
shutil.copy(find_parts(BACKBONES[DEFAULT])[0], sys.argv[1])' "$staged"
        ;;
    data)
        "$PYTHON" examples/prepare_data.py > /dev/null
        find .cache/data -maxdepth 1 \( -name '*.whl' -o -name '*.tar.gz' \) -exec cp {} "$staged" \;
        ;;
    *)
        echo "no parcel is called $name; PARCELS may hold runtime, backbone, data" >&2
        exit 1
        ;;
    esac
    parcel "$name" "$staged" "$PARTS"
    rm -rf "$staged"
done
du -h "$PARTS"/*
