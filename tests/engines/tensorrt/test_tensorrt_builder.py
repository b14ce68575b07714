from __future__ import annotations

import dataclasses
import os
import signal
import sys
import types
from pathlib import Path

import pytest

from engines.cuda.driver import Driver, Gpu
from engines.tensorrt import builder as tensorrt_builder
from engines.tensorrt.builder import BuildOptions, check_options, engine_from_onnx
from engines.tensorrt.callbacks import BuildProgress, readable_lines
from engines.tensorrt.engine_info import EngineInfo, check_engine, info_path, profile_from_spec, read_header
from engines.tensorrt.flavour import runtime_version
from iapt_export.contract.errors import BundleError, IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from tests.engines.tiny_onnx import RANGES, save_nodes, tiny_attention, tiny_decode, tiny_prefill

try:
    import tensorrt_rtx
except ImportError:
    tensorrt_rtx = None

builds = pytest.mark.skipif(tensorrt_rtx is None, reason="TensorRT for RTX is not installed")


# --- building


@builds
def test_a_build_writes_an_engine_and_its_record(tmp_path: Path) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)
    engine_path = tmp_path / "engines" / "prefill.engine"
    info = engine_from_onnx(onnx_path, engine_path, spec, RANGES)
    assert sorted(path.name for path in engine_path.parent.iterdir()) == ["prefill.engine", "prefill.json"]
    assert EngineInfo.load(engine_path) == info
    assert info.target == "tensorrt-rtx"
    assert info.runtime_version == runtime_version("tensorrt-rtx")
    assert info.compute_capability == "portable"
    assert info.size_bytes == engine_path.stat().st_size
    assert info.seconds > 0
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in info.inputs] == [
        ("x", "fp16", [-1, -1, 8]),
        ("tenant_index", "int64", [-1]),
        ("generator_weight", "fp16", [-1, 8, 8]),
    ]
    assert [(tensor.name, tensor.dtype) for tensor in info.outputs] == [("y", "fp16")]
    assert check_engine(spec, info, RANGES, engine_path) == []


@builds
@pytest.mark.parametrize("capability", ["7.5", "8.6", "8.9", "12.0"])
def test_an_engine_for_a_chosen_gpu(tmp_path: Path, capability: str) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)
    options = BuildOptions(compute_capability=capability)
    info = engine_from_onnx(onnx_path, tmp_path / "prefill.engine", spec, RANGES, options)
    header = read_header(tmp_path / "prefill.engine")
    assert info.compute_capability == capability
    assert header is not None
    assert header.compute_capabilities == (capability,)
    assert check_engine(spec, info, RANGES, tmp_path / "prefill.engine") == []


@builds
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("graph", [tiny_prefill, tiny_attention, tiny_decode])
def test_every_type_builds(tmp_path: Path, graph: object, dtype: str) -> None:
    onnx_path, spec = graph(tmp_path, dtype)  # type: ignore[operator]
    info = engine_from_onnx(onnx_path, tmp_path / "graph.engine", spec, RANGES)
    assert check_engine(spec, info, RANGES, tmp_path / "graph.engine") == []


@builds
def test_opset_20_builds(tmp_path: Path) -> None:
    onnx_path, spec = tiny_prefill(tmp_path, "fp32", opset=20)
    assert engine_from_onnx(onnx_path, tmp_path / "prefill.engine", spec, RANGES).size_bytes > 0


@builds
def test_workspace_and_tf32_reach_tensorrt(tmp_path: Path) -> None:
    onnx_path, spec = tiny_prefill(tmp_path, "fp32")
    build = tensorrt_builder.network_from_onnx(onnx_path, "tensorrt-rtx")
    shapes = profile_from_spec(spec, RANGES)
    exact = tensorrt_builder._configure(build, BuildOptions(workspace_mib=64), shapes)
    rounded = tensorrt_builder._configure(build, BuildOptions(tf32=True), shapes)
    assert exact.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 64 << 20
    assert not exact.get_flag(tensorrt_rtx.BuilderFlag.TF32)
    assert rounded.get_flag(tensorrt_rtx.BuilderFlag.TF32)


# --- progress and cancelling


@builds
def test_progress_is_reported_by_phase(tmp_path: Path) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)
    steps: list[BuildProgress] = []
    engine_from_onnx(onnx_path, tmp_path / "prefill.engine", spec, RANGES, on_progress=steps.append)
    phases = dict.fromkeys(step.phase for step in steps)
    assert len(phases) > 3
    assert all(0 <= step.done <= step.total for step in steps)
    assert all(step.parent in phases for step in steps if step.parent)
    last = {step.phase: step for step in steps}
    assert all(step.done == step.total for step in last.values())


@builds
@pytest.mark.parametrize("error", [ValueError("the callback's own"), KeyboardInterrupt()])
def test_an_error_in_the_callback_cancels_the_build(tmp_path: Path, error: BaseException) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)

    def fail(step: BuildProgress) -> None:
        raise error

    with pytest.raises(type(error)):
        engine_from_onnx(onnx_path, tmp_path / "out" / "prefill.engine", spec, RANGES, on_progress=fail)
    assert not (tmp_path / "out").exists()


@builds
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_cancels_the_build_and_leaves_an_older_engine(tmp_path: Path) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)
    engine_path = tmp_path / "prefill.engine"
    engine_path.write_bytes(b"an older engine")
    interrupted: list[str] = []

    def interrupt(step: BuildProgress) -> None:
        if not interrupted:
            interrupted.append(step.phase)
            os.kill(os.getpid(), signal.SIGINT)

    # a shell that starts the tests in the background has them ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine_from_onnx(onnx_path, engine_path, spec, RANGES, on_progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine_path.read_bytes() == b"an older engine"
    assert not info_path(engine_path).exists()


# --- what TensorRT refuses


@builds
@pytest.mark.parametrize(
    ("nodes", "weight", "message"),
    [
        (
            "y = custom.Strange (x)",
            "float[8, 8]",
            r"node /model/Strange \(Strange\): the operator Strange is not known",
        ),
        ("y = Unique (x)", "float[8, 8]", r"node /model/Unique \(Unique\): the operator Unique is not supported"),
        ("y = MatMul (x, w)", "float16[8, 8]", r"node /model/MatMul \(MatMul\): .*must have same input types"),
    ],
)
def test_a_refused_node_is_named(tmp_path: Path, nodes: str, weight: str, message: str) -> None:
    onnx_path, spec = save_nodes(tmp_path, nodes, weight)
    with pytest.raises(IaptError, match=message) as caught:
        engine_from_onnx(onnx_path, tmp_path / "graph.engine", spec, RANGES)
    assert "driver version is insufficient" not in str(caught.value)
    assert not (tmp_path / "graph.engine").exists()


@builds
def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"not a graph")
    with pytest.raises(IaptError, match=r"refuses .*graph\.onnx: the file: .*Failed to parse the ONNX model"):
        engine_from_onnx(tmp_path / "graph.onnx", tmp_path / "graph.engine", GraphSpec("", [], []), RANGES)


def test_a_graph_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(IaptError, match=r"absent\.onnx does not exist; expected an ONNX graph"):
        engine_from_onnx(tmp_path / "absent.onnx", tmp_path / "graph.engine", GraphSpec("", [], []), RANGES)


@builds
def test_a_failed_build_shows_tensorrts_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_path, spec = tiny_attention(tmp_path, "fp32")
    monkeypatch.setattr(tensorrt_builder, "decompose_attention", lambda build: 0)
    with pytest.raises(IaptError, match=r"cannot build .*Attention operation was not supported.* Try another --dtype"):
        engine_from_onnx(onnx_path, tmp_path / "decode.engine", spec, RANGES)


@builds
def test_every_attention_may_be_decomposed(tmp_path: Path) -> None:
    onnx_path, _ = tiny_decode(tmp_path)
    assert tensorrt_builder.decompose_attention(tensorrt_builder.network_from_onnx(onnx_path, "tensorrt-rtx")) == 1


@builds
def test_a_graph_that_contradicts_the_manifest(tmp_path: Path) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)
    wrong = dataclasses.replace(spec, inputs=[TensorSpec("x", "fp32", ["batch", 8]), *spec.inputs[1:]], outputs=[])
    with pytest.raises(BundleError) as caught:
        engine_from_onnx(onnx_path, tmp_path / "prefill.engine", wrong, RANGES)
    text = str(caught.value)
    assert "prefill.onnx is not the graph that the manifest describes" in text
    assert "input x is fp16, expected fp32" in text
    assert "input x has shape [-1, -1, 8], expected ['batch', 8]" in text
    assert "output y is not in the manifest" in text


@builds
def test_a_profile_that_tensorrt_refuses(tmp_path: Path) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)
    build = tensorrt_builder.network_from_onnx(onnx_path, "tensorrt-rtx")
    shapes = profile_from_spec(spec, RANGES)
    shapes["x"] = dataclasses.replace(shapes["x"], max=[1, 1, 8])
    with pytest.raises(IaptError, match=r"refuses the optimisation profile: .*MIN<=OPT<=MAX"):
        tensorrt_builder._configure(build, BuildOptions(), shapes)


def test_noise_is_dropped_from_tensorrts_messages() -> None:
    messages = [
        "Thread context has not been set! Using global log stream.",
        "ModelImporter.cpp:142: --- Begin node ---\nNode name: /model/Det",
        "ModelImporter.cpp:151: ERROR: no kernel",
        "[checkMacros.cpp::catchCudaError::250] (CUDA driver version is insufficient for CUDA runtime version)",
        "ERROR: no kernel",
    ]
    assert readable_lines(messages) == ["ERROR: no kernel"]


# --- options and targets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(target="openvino"), "target 'openvino' is no TensorRT target; expected tensorrt-rtx or tensorrt"),
        (BuildOptions(compute_capability="9.0"), "'9.0' is not supported; .*GPUs of 9.0 need the target tensorrt"),
        (BuildOptions(compute_capability="6.1"), "'6.1' is not supported; use portable or one of 7.5, 8.0"),
        (BuildOptions(target="tensorrt", compute_capability="8.9"), "builds for the GPU of the machine it runs on"),
        (BuildOptions(refit=True, version_compatible=True), "tensorrt-rtx has no version_compatible, refit; leave it"),
        (BuildOptions(timing_cache=Path("t")), "tensorrt-rtx has no timing_cache"),
        (BuildOptions(hardware_compatibility="ampere+"), "tensorrt-rtx has no hardware_compatibility"),
        (
            BuildOptions(target="tensorrt", hardware_compatibility="hopper"),
            r"'hopper' is not known; use ampere\+ or same-compute-capability",
        ),
    ],
)
def test_options_that_a_target_lacks(options: BuildOptions, message: str) -> None:
    with pytest.raises(IaptError, match=message):
        check_options(options)


def test_tensorrt_builds_only_where_a_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_path, spec = tiny_prefill(tmp_path)
    monkeypatch.setattr(tensorrt_builder, "load_tensorrt", lambda target: _module_without_builder())
    monkeypatch.setattr(tensorrt_builder, "find_driver", lambda: Driver(problem="no NVIDIA driver found"))
    with pytest.raises(
        NotRunnableError, match=r"on the GPU that runs them, and no NVIDIA driver found; .*tensorrt-rtx"
    ):
        engine_from_onnx(onnx_path, tmp_path / "p.engine", spec, RANGES, BuildOptions(target="tensorrt"))
    monkeypatch.setattr(tensorrt_builder, "find_driver", lambda: Driver(gpus=(Gpu("H200", "9.0", 1),)))
    with pytest.raises(
        NotRunnableError, match="tensorrt cannot start a build: it gives no reason; see iapt-export doc"
    ):
        engine_from_onnx(onnx_path, tmp_path / "p.engine", spec, RANGES, BuildOptions(target="tensorrt"))


def _module_without_builder() -> types.SimpleNamespace:
    class Logger:
        ERROR, INTERNAL_ERROR = 1, 0

    def fail(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    return types.SimpleNamespace(ILogger=Logger, Builder=fail)


def test_what_only_tensorrt_can_do_reaches_its_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"known")
    options = BuildOptions(
        target="tensorrt",
        refit=True,
        version_compatible=True,
        hardware_compatibility="ampere+",
        timing_cache=cache,
    )
    check_options(options)
    calls: list[object] = []
    config = types.SimpleNamespace(
        add_optimization_profile=lambda profile: 0,
        clear_flag=lambda flag: calls.append(f"no {flag}"),
        set_flag=calls.append,
        create_timing_cache=lambda known: known.decode() + " timings",
        set_timing_cache=lambda cache, ignore_mismatch: calls.append((cache, ignore_mismatch)),
        get_timing_cache=lambda: types.SimpleNamespace(serialize=lambda: b"known and new"),
    )
    tensorrt_builder._save_timing_cache(tensorrt_builder._configure(_recording_build(config), options, {}), options)
    assert calls == ["no TF32", "VERSION_COMPATIBLE", "REFIT", ("known timings", False)]
    assert config.hardware_compatibility_level == "AMPERE_PLUS"
    assert cache.read_bytes() == b"known and new"
    monkeypatch.setattr(tensorrt_builder, "find_driver", lambda: Driver(gpus=(Gpu("H200", "9.0", 1),)))
    assert tensorrt_builder._built_for(options) == "9.0"


def _recording_build(config: types.SimpleNamespace) -> tensorrt_builder.Build:
    """A build over a stand-in for TensorRT whose enumeration members are their own names."""
    flags = types.SimpleNamespace(TF32="TF32", REFIT="REFIT", VERSION_COMPATIBLE="VERSION_COMPATIBLE")
    levels = types.SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS")
    trt = types.SimpleNamespace(BuilderFlag=flags, HardwareCompatibilityLevel=levels)
    builder = types.SimpleNamespace(
        create_builder_config=lambda: config, create_optimization_profile=lambda: types.SimpleNamespace()
    )
    return tensorrt_builder.Build(trt, None, builder, None, None)


@builds
def test_the_stand_ins_names_exist_in_the_real_api() -> None:
    assert {"TF32", "REFIT", "VERSION_COMPATIBLE"} <= set(tensorrt_rtx.BuilderFlag.__members__)
    assert set(tensorrt_builder.HARDWARE_LEVELS.values()) <= set(tensorrt_rtx.HardwareCompatibilityLevel.__members__)
    assert {"create_timing_cache", "set_timing_cache", "get_timing_cache"} <= set(dir(tensorrt_rtx.IBuilderConfig))


def test_a_gpu_that_an_older_version_does_not_know() -> None:
    trt = types.SimpleNamespace(ComputeCapability=types.SimpleNamespace(SM89=1), __version__="1.3")
    assert tensorrt_builder._capability(trt, "8.9") == 1
    with pytest.raises(IaptError, match=r"compute capability 12.1 is not known to the installed version 1.3; upgrade"):
        tensorrt_builder._capability(trt, "12.1")
