"""Engines whose weights are stored in 8 or 4 bits hold about half and a quarter of what those in fp16 do."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from engines.tensorrt.builder import BuildOptions, engine_from_onnx
from engines.tensorrt.engine_info import check_engine, read_header
from iapt_export.building.footprint import model_weights
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import Range, Ranges
from iapt_export.graphs.export import Serving, export_graphs
from tests.graphs import specs_for
from tests.tiny import tiny_llama
from trainers.decoder.quantise import DEQUANTISED, Rounding

RANGES = Ranges(batch=Range(1, 2, 4), sequence=Range(1, 8, 16), past=Range(5, 16, 32), tenants=Range(1, 2, 8))

KERNELS = 1_200_000
"""Bytes that an engine of rounded weights may have in kernels beyond one of fp16; 0.81 million seen."""


@functools.cache
def half() -> object:
    """A tied table of 2 million numbers, and 3.5 million in a layer."""
    return tiny_llama(num_hidden_layers=1, hidden_size=512, intermediate_size=1792, vocab_size=4096).half()


def engine_of(rounding: Rounding | None, folder: Path, options: BuildOptions | None = None) -> int:
    """Bytes of the engine that decodes with these weights."""
    model, capacity = half(), RANGES.past.max
    spec = specs_for(model, [], "fp16", capacity)["serve_decode"]
    serving = Serving(capacity=capacity, rounding=rounding)
    export_graphs(model, [], folder, dtype="fp16", opset=23, names=("serve_decode",), serving=serving)
    engine = folder / "serve_decode.engine"
    info = engine_from_onnx(folder / "serve_decode.onnx", engine, spec, RANGES, options)
    assert check_engine(spec, info, RANGES, engine) == []
    header = read_header(engine)
    assert header is not None and len(header.compute_capabilities) == 5
    return info.size_bytes


def test_an_engine_holds_each_weight_once_in_its_bits(tmp_path: Path) -> None:
    """What the weights take less is what the engine takes less, but for kernels; a table held twice would show."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    sizes, foreseen = {}, {}
    for dtype, rounding in {"fp16": None, **DEQUANTISED}.items():
        (folder := tmp_path / dtype).mkdir()
        sizes[dtype], foreseen[dtype] = engine_of(rounding, folder), model_weights(half(), rounding, 2)[1]
    assert foreseen["int8"] < 0.54 * foreseen["fp16"] and foreseen["int4"] < 0.45 * foreseen["fp16"]
    for dtype in DEQUANTISED:
        saved = sizes["fp16"] - sizes[dtype]
        assert 0 < foreseen["fp16"] - foreseen[dtype] - saved < KERNELS < 4096 * 512, (sizes, foreseen)


def test_tensorrt_is_asked_whether_a_gpu_has_the_type(tmp_path: Path) -> None:
    """What the plan refuses with int4, TensorRT does itself where it is asked."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    with pytest.raises(IaptError, match=r"sm75.*int4"):
        engine_of(DEQUANTISED["int4"], tmp_path, BuildOptions(compute_capability="7.5"))
