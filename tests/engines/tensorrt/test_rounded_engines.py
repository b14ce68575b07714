"""Engines whose weights are stored in 8 or 4 bits hold about half and a quarter of what those in fp16 do."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from engines.tensorrt.builder import BuildOptions, engine_from_onnx
from engines.tensorrt.engine_info import check_engine, read_header
from engines.tensorrt.flavour import RTX
from iapt_export.building.footprint import model_weights
from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import DEQUANTISED, Rounding
from iapt_export.contract.manifest import Range, Ranges
from iapt_export.graphs.export import Serving, export_graphs
from tests.graphs import specs_for
from tests.thorough import default_for
from tests.tiny import tiny_llama

RANGES = Ranges(batch=Range(1, 2, 4), sequence=Range(1, 8, 16), past=Range(5, 16, 32), tenants=Range(1, 2, 8))

NEWEST = {"fp8": "8.9", "nvfp4": "12.0"}
"""Types that not every GPU of a portable engine has, to the oldest that has them."""

KERNELS = 1_200_000
"""Bytes that an engine of rounded weights may have in kernels beyond one of fp16; 0.81 million seen."""


@functools.cache
def half(vocabulary: int = 4096, is_tied: bool = True) -> Any:
    """A tied table of 2 million numbers, and 3.5 million in a layer."""
    sizes = {"hidden_size": 512, "intermediate_size": 1792, "vocab_size": vocabulary}
    return tiny_llama(num_hidden_layers=1, tie_word_embeddings=is_tied, **sizes).half()


def engine_of(rounding: Rounding | None, folder: Path, options: BuildOptions | None = None, model: Any = None) -> int:
    """Bytes of the engine that decodes with these weights."""
    model, capacity = model or half(), RANGES.past.max
    spec = specs_for(model, [], "fp16", capacity)["serve_decode"]
    serving = Serving(capacity=capacity, rounding=rounding)
    export_graphs(model, [], folder, dtype="fp16", opset=23, names=("serve_decode",), serving=serving)
    engine = folder / "serve_decode.engine"
    info = engine_from_onnx(folder / "serve_decode.onnx", engine, spec, RANGES, options)
    assert check_engine(spec, info, RANGES, engine) == []
    header = read_header(engine)
    asked = options.compute_capability if options else None
    assert header is not None and header.compute_capabilities == ((asked,) if asked else RTX.portable)
    return info.size_bytes


COARSE = {
    "int4,block=128,narrow=4": Rounding(4, "integers", block=128, narrow=4),
    "nvfp4,head=4,narrow=4": Rounding(4, "floats", head=4, narrow=4),
}
MOST = {"int8": 0.54, "fp8": 0.54, "int4": 0.45, "nvfp4": 0.45, **dict(zip(COARSE, (0.36, 0.29), strict=True))}
"""Of fp16's bytes."""


@functools.cache
def bytes_in_fp16(folder: Path) -> int:
    folder.mkdir()
    return engine_of(None, folder)


@pytest.mark.parametrize("dtype", default_for("int4".__eq__, MOST))
def test_an_engine_holds_each_weight_once_in_its_bits(
    dtype: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What the weights take less is what the engine takes less, but for kernels; a table held twice would show."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    rounding = {**DEQUANTISED, **COARSE}[dtype]
    options = BuildOptions(compute_capability=NEWEST.get(dtype.partition(",")[0]))
    saved = bytes_in_fp16(tmp_path_factory.getbasetemp() / "fp16") - engine_of(rounding, tmp_path, options)
    whole, foreseen = (model_weights(half(), kind, 2)[1] for kind in (None, rounding))
    assert foreseen < MOST[dtype] * whole
    assert 0 < whole - foreseen - saved < KERNELS < 4096 * 512, (saved, whole, foreseen)


@pytest.mark.thorough
def test_a_head_of_four_bits_is_held_once_where_it_is_not_the_embedding(tmp_path: Path) -> None:
    """Both tables of a vocabulary that is 8192 tokens larger; one that is both was held twice, and is refused."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    rounding, sizes, foreseen = Rounding(4, "integers", block=128, head=4, narrow=4), [], []
    for vocabulary in (4096, 12288):
        (folder := tmp_path / str(vocabulary)).mkdir()
        model = half(vocabulary, is_tied=False)
        sizes.append(engine_of(rounding, folder, model=model))
        foreseen.append(model_weights(model, rounding, 2)[1])
    assert abs(sizes[1] - sizes[0] - (foreseen[1] - foreseen[0])) < 100_000, (sizes, foreseen)
    with pytest.raises(IaptError, match=r"head=4: .* an engine of TensorRT for RTX keeps twice in 4 bits, .*; leave"):
        model_weights(tiny_llama(), rounding, 2)


@pytest.mark.parametrize(
    ("dtype", "capability", "told"),
    default_for(
        lambda case: case[0] == "nvfp4",
        [
            ("int4", "7.5", r"sm75.*int4"),
            ("fp8", "8.6", r"sm86.*fp8_e4m3"),
            ("fp8", None, r"sm80.*sm86.*fp8_e4m3"),
            ("nvfp4", "8.9", r"sm89.*fp4_e2m1"),
        ],
    ),
)
def test_tensorrt_is_asked_whether_a_gpu_has_the_type(
    dtype: str, capability: str | None, told: str, tmp_path: Path
) -> None:
    """What the plan refuses with these types, TensorRT does itself where it is asked."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    with pytest.raises(IaptError, match=told):
        engine_of(DEQUANTISED[dtype], tmp_path, BuildOptions(compute_capability=capability))


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "capability"), [("fp8", "12.0"), ("fp8", "12.1"), ("nvfp4", "12.1")])
def test_every_gpu_that_the_plan_allows_is_built_for(dtype: str, capability: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    assert engine_of(DEQUANTISED[dtype], tmp_path, BuildOptions(compute_capability=capability)) > 1_000_000
