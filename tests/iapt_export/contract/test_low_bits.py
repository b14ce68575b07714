"""``--quantise``: what it sets, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from iapt_export.building.build_request import BuildRequest
from iapt_export.building.jobs import check_request
from iapt_export.building.plan import TargetPlan, plan_targets
from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.low_bits import (
    AUTO,
    DEQUANTISED,
    QUANTISED,
    Rounding,
    in_words,
    rounding_of,
    rounding_problems,
)
from trainers.training.config import TrainConfig


@pytest.mark.parametrize(
    ("target", "dtype", "text", "rounding", "canonical"),
    [
        ("onnxruntime", "int4", "", Rounding(4), ""),
        ("onnxruntime", "int4", "block=32,head=8,narrow=8", Rounding(4), ""),
        ("onnxruntime", "int4", "narrow=4,block=64", Rounding(4, block=64, narrow=4), "block=64,narrow=4"),
        ("tensorrt-rtx", "int4", "head=4", Rounding(4, "integers", head=4), "head=4"),
        ("onnxruntime", "int8", "block=128,head=8", Rounding(8, block=128), "block=128"),
        ("tensorrt-rtx", "fp8", "block=64", Rounding(8, "floats", block=64), "block=64"),
        ("tensorrt-rtx", "nvfp4", "narrow=4,head=4", Rounding(4, "floats", head=4, narrow=4), "head=4,narrow=4"),
    ],
)
def test_a_text_sets_what_it_names(target: str, dtype: str, text: str, rounding: Rounding, canonical: str) -> None:
    made = rounding_of(target, dtype, text)
    assert made == rounding and rounding.quantise == canonical
    assert rounding_of(target, dtype, canonical) == rounding
    plans = [TargetPlan(target, dtype, 23, canonical)]
    assert plan_targets([f"{target}:{dtype}"], None, None, text) == plans and plans[0].rounding == rounding


def test_floats_are_those_of_the_types_own_bits() -> None:
    """What a type of 4 bits keeps in 8 are integers; FP4 has blocks and scales of its own."""
    kinds = {name: [rounding.stored_as(bits) for bits in (8, 4)] for name, rounding in DEQUANTISED.items()}
    assert kinds == {
        "int8": ["int8", "int4"],
        "int4": ["int8", "int4"],
        "fp8": ["fp8", "int4"],
        "nvfp4": ["int8", "fp4"],
    }
    nvfp4 = DEQUANTISED["nvfp4"]
    assert [(nvfp4.block_for(bits), nvfp4.scale_bytes(bits)) for bits in (8, 4)] == [(32, 2), (16, 1)]
    assert (QUANTISED["int4"].scale_bytes(4), DEQUANTISED["fp8"].scale_bytes(8)) == (4, 2)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [("fp32", None), ("int4", QUANTISED["int4"]), ("fp8", DEQUANTISED["fp8"]), ("nvfp4", DEQUANTISED["nvfp4"])],
)
def test_training_rounds_as_the_first_target_that_has_the_type(dtype: Any, rounding: Rounding | None) -> None:
    assert TrainConfig(weights=dtype).rounding == rounding


def test_other_types_have_none() -> None:
    assert rounding_of("onnxruntime", "fp16", "block=64") is None
    assert rounding_of("tensorrt", "int4") is None
    assert rounding_of("onnxruntime", "fp8") is None and rounding_of("tensorrt", "nvfp4") is None
    both = plan_targets(["onnxruntime:int4", "tensorrt-rtx:fp16"], None, None, "block=64")
    assert [plan.quantise for plan in both] == ["block=64", ""]


def test_a_cache_in_8_bits_is_onnx_runtimes_and_no_matter_of_weights() -> None:
    rounding = rounding_of("onnxruntime", "int8", "cache=8,block=64")
    assert rounding == Rounding(8, block=64, cache=8)
    assert (rounding.quantise, rounding.of_weights, rounding.cache_type) == ("block=64,cache=8", "block=64", "int8")
    assert rounding_of("onnxruntime", "int8", "cache=32") == QUANTISED["int8"] and not QUANTISED["int8"].cache_type
    with pytest.raises(IaptError, match=r"quantise='cache=8': tensorrt-rtx keeps its cache in fp16; leave cache out"):
        rounding_of("tensorrt-rtx", "int4", "cache=8")
    with pytest.raises(IaptError, match=r"quantise=cache=8 sets cache, and training has none; leave it out here"):
        TrainConfig(weights="int4", quantise="cache=8")


def test_a_cache_in_8_bits_is_refused_before_any_work_where_no_kernel_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    request = BuildRequest(model="m", output="o", targets=["onnxruntime:int4"], quantise="cache=8")
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    with pytest.raises(NotRunnableError, match=r"needs ONNX Runtime 1\.27 or newer, and this is 1\.26\.0; pip"):
        check_request(request)
    monkeypatch.setattr("onnxruntime.__version__", "1.27.0")
    assert check_request(request)[0][0].quantise == "cache=8"


def test_bits_are_those_of_the_matrix() -> None:
    wide, square, narrow = (32, 64), (32, 32), (64, 32)
    for rounding, expected in {
        QUANTISED["int4"]: [4, 4, 8, 8],
        QUANTISED["int8"]: [8, 8, 8, 8],
        Rounding(4, head=4): [4, 4, 8, 4],
        Rounding(4, narrow=4): [4, 4, 4, 8],
    }.items():
        bits = [rounding.bits_for(shape, is_end=False) for shape in (wide, square, narrow)]
        assert [*bits, rounding.bits_for(narrow, is_end=True)] == expected


@pytest.mark.parametrize(
    ("text", "dtype", "told"),
    [
        ("blok=64", "int4", ["quantise='blok=64' sets 'blok', expected settings of block, head, narrow"]),
        ("64", "int4", ["quantise='64' sets '64', expected settings of block"]),
        ("block=64,", "int4", ["sets '', expected settings"]),
        ("block = 64", "int4", ["sets 'block ', expected settings"]),
        ("block=48", "int4", ["quantise='block=48': block is '48', expected 32 or 64 or 128"]),
        ("block", "int4", ["block is '', expected 32"]),
        ("head=6,narrow=2", "int4", ["head is '6', expected 4 or 8", "narrow is '2', expected 4 or 8"]),
        ("head=8,head=4", "int4", ["sets head twice"]),
        ("cache=4", "int8", ["quantise='cache=4': cache is '4', expected 8 or 32"]),
        ("narrow=4", "int8", ["int8 has no matrix in 4 bits; leave narrow out, or take int4"]),
        (AUTO, "int4", ["quantise='auto' is for build alone, which measures settings with its tenants; name settings"]),
        ("head=4", "fp8", ["fp8 has no matrix in 4 bits; leave head out, or take nvfp4"]),
        ("block=32", "nvfp4", ["nvfp4's blocks are of 16 values, of 8 bits of 32; leave block out"]),
        (64, "int4", ["quantise=64 is no text such as 'block=64,head=8,narrow=4'"]),
    ],
)
def test_what_no_kernel_has_is_refused(text: Any, dtype: str, told: list[str]) -> None:
    problems = rounding_problems(text, dtype)
    assert len(problems) == len(told) and all(map(str.__contains__, problems, told)), problems
    target = "onnxruntime" if dtype in QUANTISED else "tensorrt-rtx"
    with pytest.raises(IaptError, match="quantise="):
        rounding_of(target, dtype, text)
    with pytest.raises(IaptError, match="quantise="):
        TrainConfig(weights=dtype, quantise=text)  # type: ignore[arg-type]
    if dtype == "int4" and text != AUTO:
        with pytest.raises(IaptError, match="build request: quantise="):
            BuildRequest(model="m", output="o", quantise=text)


def test_a_setting_that_nothing_uses_is_refused() -> None:
    said = (
        r"--quantise says how int8, int4, fp8 and nvfp4 store .* what is built is onnxruntime:fp32, tensorrt-rtx:fp16; "
        "leave it"
    )
    with pytest.raises(IaptError, match=said):
        plan_targets(["onnxruntime", "tensorrt-rtx"], None, None, "block=32")
    with pytest.raises(IaptError, match="quantise is for rounded weights, and weights is fp32; give --weights int4"):
        TrainConfig(quantise="block=64")


def test_in_words() -> None:
    assert (in_words("int4", ""), in_words("int4", "block=64")) == ("int4", "int4 (block=64)")
