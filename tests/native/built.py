"""What ``make cpp`` leaves, and the words with which tests skip where it was not called."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.native import LIBRARIES, OPS_LIBRARY, PLUGIN_LIBRARY

ROOT = Path(__file__).resolve().parents[2]
OPS = LIBRARIES / OPS_LIBRARY
PLUGIN = LIBRARIES / PLUGIN_LIBRARY

needs_ops = pytest.mark.skipif(not OPS.is_file(), reason=f"{OPS_LIBRARY} is not built; 'make cpp' builds it")
needs_plugin = pytest.mark.skipif(
    not PLUGIN.is_file(), reason=f"{PLUGIN_LIBRARY} is not built; 'make cpp' builds it where nvcc is"
)
INSTALLED = ROOT / "build" / "install"
RUNNER = INSTALLED / "bin" / "iapt_run"
TOKENIZER = INSTALLED / "lib" / "libonnxruntime-genai.so"
TENSORRT_RUNNER = INSTALLED / "lib" / "libiapt_tensorrt_rtx.so"
READER = ROOT / "build" / "cpp" / "bin" / "read_texts"
ROWS = ROOT / "build" / "cpp" / "bin" / "answer_rows"
JUDGE = ROOT / "build" / "cpp" / "bin" / "fuzz_files"
FUZZER = ROOT / "build" / "cpp-sanitize" / "bin" / "fuzz_files"

needs_runner = pytest.mark.skipif(not RUNNER.is_file(), reason="iapt_run is not built; 'make cpp' builds it")
needs_tokenizer = pytest.mark.skipif(
    not TOKENIZER.is_file(), reason="the C++ tokenizer is not installed; 'make cpp' installs it"
)
needs_fuzzer = pytest.mark.skipif(not FUZZER.is_file(), reason="the fuzz target is not built; 'make cpp' builds it")
