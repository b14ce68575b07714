"""TensorRT's rounded weights without a GPU: engines are built and checked, and ONNX Runtime runs their graphs."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import iapt_export
import validation.validate
from engines.tensorrt.engine_info import read_header
from engines.tensorrt.flavour import RTX
from iapt_export.contract.errors import IaptError, ParityError
from iapt_export.contract.low_bits import DEQUANTISED, Rounding
from iapt_export.contract.manifest import BundleManifest, file_sha256
from iapt_export.graphs import export
from iapt_export.graphs.passes.dequantise_weights import FACTORS, STEPS, WHOLE, DequantiseWeightsPass
from iapt_export.graphs.passes.fold_transposes import TRANSPOSED
from tests.bundles import TinyBuild, save_tiny_adapter
from tests.families import tiny_family
from tests.iapt_export.graphs.test_dequantise import dequantised
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import LoRAConfig
from validation.judging.compare import Settings
from validation.judging.result import Report
from validation.sides.engine_graphs import graph_runners, graphs_folder
from validation.sides.reference import Reference
from validation.sides.rounding import with_rounded_weights
from validation.validate import validate_bundle

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

QUICK = Settings(0, 4, depth="quick", peft_check=False)
GRAPHS = "graphs of tensorrt-rtx in onnxruntime"


@pytest.fixture(scope="module")
def int4(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    """A bundle of engines alone, so that it holds their graphs."""
    root = tmp_path_factory.mktemp("int4")
    made = TinyBuild(tiny_build.model, tiny_build.adapters, root / "cache", root / "bundle")
    iapt_export.build(made.request(made.bundle, "alpha", "beta", targets=("tensorrt-rtx:int4",), depth="quick"))
    return made


def validate(made: TinyBuild, bundle: Path, settings: Settings = QUICK) -> Report:
    return validate_bundle(bundle, BundleManifest.load(bundle), load_backbone(str(made.model)), settings)


@pytest.fixture(scope="module", params=["fp8", "nvfp4"])
def floats(request: Any, tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    """Bundles of the types that not every GPU has."""
    root = tmp_path_factory.mktemp(request.param)
    made = TinyBuild(tiny_build.model, tiny_build.adapters, root / "cache", root / "bundle")
    fields: dict[str, Any] = {"targets": (f"tensorrt-rtx:{request.param}",), "compute_capability": "12.0"}
    iapt_export.build(made.request(made.bundle, "alpha", "beta", depth="quick", **fields))
    return made


def worst(result: Any) -> float:
    return max(check.measured.get("relative", 0.0) for check in result.checks)


def test_a_build_compares_the_graphs_and_checks_the_engines(int4: TinyBuild) -> None:
    manifest = BundleManifest.load(int4.bundle)
    (target,) = manifest.targets
    assert (target.dtype, target.compute_capability, manifest.parity.verdict) == ("int4", "portable", "pass")
    assert "weights in 4 bits" in target.passes["serve_decode"]["DequantiseWeights"]
    assert set(manifest.parity.measured) == {
        "tensorrt-rtx:int4",
        f"{GRAPHS} with int4 weights, otherwise:fp16",
    }
    for spec in target.graphs.values():
        header = read_header(int4.bundle / spec.path)
        assert header is not None and header.compute_capabilities == RTX.portable
    assert sorted(path.name for path in int4.bundle.glob("*.onnx")) == ["serve_decode.onnx", "serve_prefill.onnx"]


def test_a_bundle_that_holds_the_graphs_is_compared_later_too(int4: TinyBuild) -> None:
    engines, exact = validate(int4, int4.bundle).targets
    assert (engines.status, exact.status, exact.dtype) == ("checked, not run", "pass", "fp16")
    assert exact.name == f"{GRAPHS} with int4 weights, otherwise"
    assert worst(exact) < 0.02, "with the same weights, no more than fp16 costs"


def test_other_graphs_than_the_engines_are_not_compared(int4: TinyBuild, tmp_path: Path) -> None:
    (target,) = BundleManifest.load(int4.bundle).targets
    assert graphs_folder(target, [tmp_path, int4.bundle]) == int4.bundle
    bundle = Path(shutil.copytree(int4.bundle, tmp_path / "bundle"))
    (bundle / "serve_decode.onnx").unlink()
    assert graphs_folder(target, [bundle]) is None
    shutil.copy(int4.bundle / "serve_prefill.onnx", bundle / "serve_decode.onnx")
    assert graphs_folder(target, [bundle]) is None
    report = validate(int4, bundle)
    assert [result.status for result in report.targets] == ["checked, not run"] and report.verdict == "fail"


def test_engines_that_run_are_held_to_the_same_limits(int4: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: whatever runs the target's graphs, both comparisons are made of it."""
    opened = functools.partial(lambda bundle, target, device: graph_runners(bundle, target))
    monkeypatch.setattr(validation.validate, "open_runners", opened)
    served, exact = validate(int4, int4.bundle).targets
    assert (served.name, served.dtype, served.status) == ("tensorrt-rtx", "int4", "pass")
    assert (exact.name, exact.dtype) == ("tensorrt-rtx with int4 weights, otherwise", "fp16")
    assert exact.status == "pass" and worst(exact) < 0.02 < 0.1 < worst(served), "what the weights cost is not there"


@pytest.mark.thorough
def test_fp8_and_nvfp4_are_built_and_compared_as_int4_is(floats: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = BundleManifest.load(floats.bundle)
    (target,) = manifest.targets
    assert (target.compute_capability, manifest.parity.verdict) == ("12.0", "pass")
    stored = {"fp8": {TensorProto.FLOAT8E4M3FN}, "nvfp4": {TensorProto.FLOAT4E2M1, TensorProto.INT8}}[target.dtype]
    for name, spec in target.graphs.items():
        header = read_header(floats.bundle / spec.path)
        assert header is not None and header.compute_capabilities == ("12.0",)
        held = onnx.load(floats.bundle / f"{name}.onnx").graph.initializer
        assert {tensor.data_type for tensor in held if tensor.name.endswith(STEPS)} == stored
    engines, exact = validate(floats, floats.bundle).targets
    assert (engines.status, exact.status) == ("checked, not run", "pass")
    assert exact.name == f"{GRAPHS} with {target.dtype} weights, otherwise" and worst(exact) < 0.02
    opened = functools.partial(lambda bundle, target, device: graph_runners(bundle, target))
    monkeypatch.setattr(validation.validate, "open_runners", opened)
    served, exact = validate(floats, floats.bundle).targets
    assert (served.dtype, exact.status) == (target.dtype, "pass")
    assert worst(exact) < 0.02 < worst(served), "what the weights cost is not there"


def test_a_fault_in_integers_is_found(int4: TinyBuild, tmp_path: Path) -> None:
    hold_against_a_fault(int4, FACTORS, tmp_path)


@pytest.mark.thorough
def test_a_fault_in_floats_is_found(floats: TinyBuild, tmp_path: Path) -> None:
    (target,) = BundleManifest.load(floats.bundle).targets
    hold_against_a_fault(floats, WHOLE if target.dtype == "nvfp4" else FACTORS, tmp_path)


def hold_against_a_fault(made: TinyBuild, suffix: str, tmp_path: Path) -> None:
    """The scales of one layer are a quarter too large."""
    bundle = Path(shutil.copytree(made.bundle, tmp_path / "bundle"))
    model = onnx.load(bundle / "serve_prefill.onnx")
    name = f"model.layers.1.mlp.up_proj.weight.transposed{suffix}"
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    scales = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(scales * scales.dtype.type(1.25), name))
    onnx.save(model, bundle / "serve_prefill.onnx")
    manifest = BundleManifest.load(bundle)
    (target,) = manifest.targets
    hashes = target.source_sha256 | {"serve_prefill": file_sha256(bundle / "serve_prefill.onnx")}
    manifest = dataclasses.replace(manifest, targets=[dataclasses.replace(target, source_sha256=hashes)])
    report = validate_bundle(bundle, manifest, load_backbone(str(made.model)), QUICK)
    _, exact = report.targets
    assert (report.verdict, exact.status) == ("fail", "fail")


@pytest.mark.thorough
def test_a_build_whose_graphs_compute_something_else_fails(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter leaves one weight unrounded that PyTorch's side rounds."""

    def forgetful(bits: dict[str, int], rounding: Rounding) -> DequantiseWeightsPass:
        return DequantiseWeightsPass({name: count for name, count in bits.items() if "up_proj" not in name}, rounding)

    monkeypatch.setattr(export, "DequantiseWeightsPass", forgetful)
    asked = tiny_build.request(
        tmp_path / "out", "alpha", cache=tmp_path / "cache", targets=("tensorrt-rtx:int4",), depth="quick"
    )
    with pytest.raises(ParityError, match=f"{GRAPHS} with int4 weights, otherwise fp16 differs from PyTorch"):
        iapt_export.build(asked)


@pytest.mark.thorough
def test_a_merged_adapter_is_rounded_as_the_build_did(tiny_build: TinyBuild, tmp_path: Path) -> None:
    config = LoRAConfig(rank=2, target_modules=("q_proj", "down_proj"))
    folder = save_tiny_adapter(tmp_path / "lora", 0, load_backbone(str(tiny_build.model)).fingerprint, config)
    made = TinyBuild(tiny_build.model, {"lora": folder}, tmp_path / "cache", tmp_path / "bundle")
    fields: dict[str, Any] = {"targets": ("tensorrt-rtx:int4",), "merge_lora": True, "past": "1:64:160"}
    # the answers of so random a model differ by more than fp16's limits, which were measured on a real one
    iapt_export.build(made.request(made.bundle, prove=False, **fields))
    backbone = load_backbone(str(made.model))
    reference = Reference(made.bundle, BundleManifest.load(made.bundle), backbone)
    rounded = with_rounded_weights(reference, DEQUANTISED["int4"]).model
    held = dequantised(made.bundle / "serve_prefill.onnx")
    assert "model.layers.1.self_attn.q_proj.weight.transposed" in held
    for name, rows in held.items():
        weight = rounded.get_parameter(name.removesuffix(TRANSPOSED)).detach().numpy()
        assert np.array_equal(rows.astype(np.float32), weight), name


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (
            lambda: tiny_llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=1),
            {},
            "tensorrt-rtx:int4 stores matrices with inputs in whole blocks of 32, and this backbone has none; "
            "build for tensorrt-rtx:fp16",
        ),
        (lambda: tiny_family("bloom"), {}, "int4 is for graphs over a cache .* Build for tensorrt-rtx:fp16"),
        (tiny_llama, {"opset": 20}, "int4 weights need DequantizeLinear with blocks, which opset 20 lacks"),
        (tiny_llama, {"compute_capability": "7.5"}, "GPUs of compute capability 7.5 have no int4 weights; choose one"),
    ],
    ids=["no whole blocks", "no cache in place", "opset", "gpu"],
)
def test_what_cannot_be_stored_is_refused_before_the_work(
    make: Callable[[], Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = save_tiny_backbone(tmp_path / "model", make())
    made = TinyBuild(model, {}, tmp_path / "cache", tmp_path / "bundle")
    with pytest.raises(IaptError, match=message):
        iapt_export.build(made.request(made.bundle, adapters=[], targets=("tensorrt-rtx:int4",), **fields))
    assert not (tmp_path / "bundle").exists()
