from __future__ import annotations

import sys

import pytest

from engines.tensorrt import flavour as tensorrt_flavour
from engines.tensorrt.flavour import check_target, flavour, load_tensorrt
from iapt_export.contract.errors import IaptError, NotRunnableError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tensorrt", "int8"), "target tensorrt: dtype 'int8' is not supported; use fp32, fp16, bf16$"),
        (("tensorrt-rtx", "int2"), "dtype 'int2' is not supported; use fp32, fp16, bf16, int8, int4, fp8, nvfp4"),
        (
            ("tensorrt-rtx", "fp8"),
            "capability 8.0, 8.6 have no fp8 weights; choose one of 8.9, 12.0, 12.1 with --c",
        ),
        (("tensorrt-rtx", "nvfp4", 23, "8.9"), "8.9 have no nvfp4 weights; choose one of 12.0, 12.1 with --compute-c"),
        (("tensorrt-rtx", "int4", 20), "int4 weights need DequantizeLinear with blocks, which opset 20 lacks; use"),
        (("tensorrt-rtx", "int4", 23, "7.5"), "7.5 have no int4 weights; choose one of 8.0, 8.6, 8.9, 12.0, 12.1"),
        (("tensorrt-rtx", "fp16", 18), "opset 18 is not supported; use 20 or 23"),
        (("tensorrt-rtx", "bf16", 23, "7.5"), "compute capability 7.5 have no bf16 matrix kernels here; use fp16"),
        (("tensorrt-rtx", "fp32", 23, "7.5"), "compute capability 7.5 have no fp32 matrix kernels"),
        (("tensorrt", "int4", 17, "9.0"), "'int4' is not supported.*; opset 17 is.*; compute capability '9.0'"),
    ],
)
def test_targets_that_cannot_be_built(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(IaptError, match=message):
        check_target(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_one_opset_serves_every_type(target: str, dtype: str) -> None:
    check_target(target, dtype, 23)
    check_target(target, dtype, 20)


def test_int8_weights_are_for_every_gpu_and_others_for_those_that_have_them() -> None:
    for capability in (None, "portable", "8.0", "12.1"):
        check_target("tensorrt-rtx", "int4", 23, capability)
    check_target("tensorrt-rtx", "int8", 23, "7.5")
    for dtype, capabilities in {"fp8": ("8.9", "12.0", "12.1"), "nvfp4": ("12.0", "12.1")}.items():
        for capability in capabilities:
            check_target("tensorrt-rtx", dtype, 23, capability)


def test_a_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotRunnableError, match=r"tensorrt is not installed .*pip install -e '\.\[tensorrt\]'"):
        load_tensorrt("tensorrt")


@pytest.mark.parametrize("error", [OSError("libnvinfer.so: no such file"), ImportError("libnvinfer.so: no such file")])
def test_a_broken_installation(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(tensorrt_flavour.importlib, "import_module", fail)
    with pytest.raises(
        NotRunnableError, match=r"tensorrt is installed but does not load: libnvinfer.so.*--force-reins"
    ):
        load_tensorrt("tensorrt")


def test_flavours_differ_in_what_they_can_do() -> None:
    rtx, datacentre = flavour("tensorrt-rtx"), flavour("tensorrt")
    assert rtx.builds_without_gpu
    assert not rtx.plugins
    assert datacentre.plugins
    assert "9.0" in datacentre.compute_capabilities
    assert "9.0" not in rtx.compute_capabilities
