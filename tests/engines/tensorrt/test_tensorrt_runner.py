from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engines.cuda import memory as cuda_memory
from engines.cuda.driver import Driver, Gpu, find_driver
from engines.cuda.memory import CudaStream, load_cuda
from engines.runner import Arrays
from engines.tensorrt import runner as tensorrt_runner
from engines.tensorrt.builder import engine_from_onnx
from engines.tensorrt.engine_info import EngineInfo, EngineTensor, profile_from_spec
from engines.tensorrt.runner import TensorRTRunner, check_gpu, check_version, load_info
from iapt_export.contract.errors import BundleError, IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from tests.engines.fake_gpu import FakeContext, FakeCuda, Status, fake_tensorrt
from tests.engines.tiny_onnx import RANGES, tiny_prefill

ADA = Gpu("NVIDIA RTX 4090", "8.9", 24 << 30)
HOPPER = Gpu("NVIDIA H200", "9.0", 141 << 30)
VERSION = "1.7.1.116"


def _spec(dtype: str) -> GraphSpec:
    return GraphSpec(
        "engines/tensorrt-rtx/prefill.engine",
        [
            TensorSpec("x", dtype, ["batch", "sequence", 8]),
            TensorSpec("tenant_index", "int64", ["batch"]),
            TensorSpec("generator_weight", dtype, ["tenants_iapt", 8, 8]),
        ],
        [TensorSpec("y", dtype, ["batch", "sequence", 8])],
    )


def _info(spec: GraphSpec, size_bytes: int = 4) -> EngineInfo:
    return EngineInfo(
        target="tensorrt-rtx",
        runtime_version=VERSION,
        compute_capability="portable",
        source_sha256="",
        sha256="",
        size_bytes=size_bytes,
        seconds=0.1,
        inputs=[EngineTensor(tensor.name, tensor.dtype, [-1]) for tensor in spec.inputs],
        outputs=[],
        profiles=[profile_from_spec(spec, RANGES)],
    )


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "prefill.engine"
    path.write_bytes(b"plan")
    _info(_spec("fp16")).save(path)
    return path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A machine with an RTX 4090, played on the host."""
    fake = FakeCuda()
    monkeypatch.setattr(cuda_memory, "load_cuda", lambda: fake)
    monkeypatch.setattr(tensorrt_runner, "find_driver", lambda: Driver(gpus=(ADA,), cuda_version="13.0"))
    _use(monkeypatch, FakeContext("float16"))
    return fake


def _use(monkeypatch: pytest.MonkeyPatch, context: FakeContext | None, version: str = VERSION) -> None:
    monkeypatch.setattr(tensorrt_runner, "load_tensorrt", lambda target: fake_tensorrt(version, context))


def _feeds(batch: int = 3, sequence: int = 4, dtype: object = np.float16) -> Arrays:
    source = np.random.default_rng(0)
    return {
        "x": source.standard_normal((batch, sequence, 8)).astype(dtype),  # type: ignore[arg-type]
        "tenant_index": np.arange(batch) % 2,
        "generator_weight": source.standard_normal((2, 8, 8)).astype(dtype),  # type: ignore[arg-type]
    }


def _expected(feeds: Arrays) -> np.ndarray:
    weight = feeds["generator_weight"][feeds["tenant_index"]]
    return (feeds["x"].astype(np.float32) @ weight.astype(np.float32)).astype(feeds["x"].dtype)


# --- running, on a stand-in for the GPU


def test_inputs_reach_the_engine_and_outputs_come_back(engine: Path, cuda: FakeCuda) -> None:
    feeds = _feeds()
    with TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner:
        outputs = runner.infer(feeds)
    assert list(outputs) == ["y"]
    assert outputs["y"].dtype == np.float16
    np.testing.assert_array_equal(outputs["y"], _expected(feeds))


def test_bf16_arrays(engine: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, FakeContext("bfloat16"))
    feeds = _feeds(dtype=ml_dtypes.bfloat16)
    with TensorRTRunner(engine, _spec("bf16"), "tensorrt-rtx") as runner:
        outputs = runner.infer(feeds)
    assert outputs["y"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(outputs["y"], _expected(feeds))


def test_arrays_need_not_be_contiguous(engine: Path, cuda: FakeCuda) -> None:
    feeds = _feeds()
    feeds["x"] = np.asfortranarray(feeds["x"])
    with TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner:
        np.testing.assert_array_equal(runner.infer(feeds)["y"], _expected(feeds))


def test_outputs_of_one_call_survive_the_next(engine: Path, cuda: FakeCuda) -> None:
    with TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner:
        first = runner.infer(_feeds())["y"]
        kept = first.copy()
        runner.infer(_feeds(2, 3))
        np.testing.assert_array_equal(first, kept)


def test_arrays_stay_on_the_gpu(engine: Path, cuda: FakeCuda) -> None:
    """Inputs and outputs that live there do not travel; a read-only array on the host does once."""
    feeds: dict[str, Any] = _feeds()
    wanted = _expected(feeds)
    feeds["generator_weight"].flags.writeable = False
    with TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner:
        cuda.uploads = 0
        for _ in range(2):
            room = np.zeros_like(wanted)
            assert runner.infer(feeds, {"y": room})["y"] is room
            np.testing.assert_array_equal(room, wanted)
        assert cuda.uploads == 2 * len(feeds) - 1
        feeds["generator_weight"] = feeds["generator_weight"] * 2
        np.testing.assert_array_equal(runner.infer(feeds)["y"], _expected(feeds))
        source, target = (runner.zeros("fp16", (4, *wanted.shape[1:])) for _ in range(2))
        source[:3] = runner.infer({**feeds, "x": source[1:]}, {"y": target[:3]})["y"]
        assert not np.array(source).any()
        with pytest.raises(ValueError, match="y: an array that an engine reads or writes must have no gaps"):
            runner.infer(feeds, {"y": target[:3, :2]})
    assert not cuda.live


def test_runners_share_what_they_upload(engine: Path, cuda: FakeCuda) -> None:
    feeds, stream = _feeds(), CudaStream()
    feeds["generator_weight"].flags.writeable = False
    one, other = (TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx", stream=stream) for _ in range(2))
    with one, other:
        results = [runner.infer(feeds)["y"] for runner in (one, other)]
        assert cuda.uploads == 2 * len(feeds) - 1 and cuda.streams == 1
        one.deactivate()
        one.deactivate()
        results.append(other.infer(feeds)["y"])
    for result in results:
        np.testing.assert_array_equal(result, _expected(feeds))
    assert not cuda.live and not cuda.streams


def test_buffers_grow_and_are_reused(engine: Path, cuda: FakeCuda) -> None:
    with TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner:
        runner.infer(_feeds(2, 4))
        runner.infer(_feeds(1, 2))
        assert cuda.allocations == 4
        runner.infer(_feeds(2, 8))
        assert cuda.allocations == 6  # x and y only
        assert len(cuda.live) == 4


def test_deactivation_gives_everything_back(engine: Path, cuda: FakeCuda) -> None:
    runner = TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx")
    runner.activate()
    runner.activate()
    runner.infer(_feeds())
    runner.deactivate()
    runner.deactivate()
    assert cuda.live == {}
    assert cuda.streams == 0
    with pytest.raises(IaptError, match="the runner is not active; use it in a with block or call activate"):
        runner.infer(_feeds())


@pytest.mark.parametrize(
    ("batch", "sequence", "message"),
    [(5, 4, "batch is 5, the engine takes 1 to 4"), (1, 17, "sequence is 17, the engine takes 1 to 16; build with a")],
)
def test_sizes_outside_the_profile(engine: Path, cuda: FakeCuda, batch: int, sequence: int, message: str) -> None:
    with (
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner,
        pytest.raises(IaptError, match=message),
    ):
        runner.infer(_feeds(batch, sequence))


def test_a_wrong_input(engine: Path, cuda: FakeCuda) -> None:
    with (
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner,
        pytest.raises(IaptError, match="input x is float32, expected float16"),
    ):
        runner.infer(_feeds(dtype=np.float32))


def test_a_run_that_fails(engine: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, FakeContext("float16", fails=True))
    with (
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner,
        pytest.raises(IaptError, match="TensorRT fails to run: it gives no reason"),
    ):
        runner.infer(_feeds())


def test_a_size_that_depends_on_values(engine: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, FakeContext("float16", open_sizes=True))
    with (
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner,
        pytest.raises(IaptError, match="the size of output y depends on the inputs' values; expected"),
    ):
        runner.infer(_feeds())


def test_a_gpu_that_is_full(engine: Path, cuda: FakeCuda) -> None:
    cuda.memory_bytes = 8
    with (
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx") as runner,
        pytest.raises(IaptError, match="cudaMalloc fails with cudaErrorMemoryAllocation; use a smaller batch"),
    ):
        runner.infer(_feeds())
    assert cuda.live == {}


def test_an_engine_that_tensorrt_refuses(engine: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, None)
    with pytest.raises(
        NotRunnableError, match=r"cannot open .*: Error Code 1: the plan is of another GPU; build the en"
    ):
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx").activate()
    assert cuda.streams == 0


# --- where an engine cannot run


def test_no_driver(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, None)
    problem = "no NVIDIA driver found: libcuda.so.1 is missing"
    monkeypatch.setattr(tensorrt_runner, "find_driver", lambda: Driver(problem=problem))
    with pytest.raises(NotRunnableError) as caught:
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx").activate()
    assert str(caught.value) == (
        "tensorrt-rtx engines do not run here: no NVIDIA driver found: libcuda.so.1 is missing; this engine needs an "
        "NVIDIA GPU of compute capability 8.0, 8.6, 8.9, 12.0 or 12.1 and its driver, 580 or newer. "
        "'iapt-export doctor' shows what this machine has"
    )


def test_a_gpu_that_the_engine_was_not_built_for() -> None:
    info = _info(_spec("fp16"))
    check_gpu(info, Driver(gpus=(ADA,)), 0)
    with pytest.raises(NotRunnableError, match=r"NVIDIA H200 \(compute capability 9.0\) cannot run this engine"):
        check_gpu(info, Driver(gpus=(HOPPER,)), 0)
    with pytest.raises(NotRunnableError, match=r"needs an NVIDIA GPU of compute capability 12.0 and its driver"):
        check_gpu(dataclasses.replace(info, compute_capability="12.0"), Driver(gpus=(ADA,)), 0)
    with pytest.raises(NotRunnableError, match="GPU 3 does not exist, this machine has 1; choose a lower one"):
        check_gpu(info, Driver(gpus=(ADA,)), 3)


def test_another_version_of_tensorrt(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, None, version="1.8.0.1")
    with pytest.raises(
        NotRunnableError, match=r"built by tensorrt-rtx 1\.7\.1\.116, installed is 1\.8\.0\.1, .*install"
    ):
        TensorRTRunner(engine, _spec("fp16"), "tensorrt-rtx").activate()


def test_a_version_compatible_engine_runs_on_newer_versions() -> None:
    info = dataclasses.replace(_info(_spec("fp16")), target="tensorrt", runtime_version="11.0.0.1")
    check_version(dataclasses.replace(info, version_compatible=True), "11.10.0.1")
    with pytest.raises(NotRunnableError, match="engines open only in the version that built them"):
        check_version(dataclasses.replace(info, version_compatible=True), "10.14.0.1")
    with pytest.raises(NotRunnableError, match=r"install 11\.0\.0\.1, or build the engine again here"):
        check_version(info, "11.10.0.1")


def test_missing_and_truncated_engines(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.engine is missing; copy or build"):
        load_info(tmp_path / "absent.engine")
    engine.write_bytes(b"pl")
    with pytest.raises(BundleError, match="has 2 bytes, expected 4: it is truncated; copy or build it again"):
        load_info(engine)


def test_an_engine_beside_anothers_record(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    onnx_path, spec = tiny_prefill(tmp_path)
    path = tmp_path / "prefill.engine"
    info = engine_from_onnx(onnx_path, path, spec, RANGES)
    dataclasses.replace(info, runtime_version="1.6.0.1").save(path)
    with pytest.raises(
        BundleError, match=r"was built by tensorrt-rtx .*, its record says 1\.6\.0\.1; copy or build both"
    ):
        load_info(path)


def test_a_real_engine_is_refused_in_words_without_a_driver(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    if not find_driver().problem:
        pytest.skip("this machine has a GPU, where the engine would run")
    onnx_path, spec = tiny_prefill(tmp_path)
    engine_from_onnx(onnx_path, tmp_path / "prefill.engine", spec, RANGES)
    with (
        pytest.raises(NotRunnableError, match="tensorrt-rtx engines do not run here: "),
        TensorRTRunner(tmp_path / "prefill.engine", spec, "tensorrt-rtx"),
    ):
        pass


@pytest.mark.gpu
def test_a_real_engine_agrees_with_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from engines.onnxruntime.runner import OnnxRuntimeRunner

    onnx_path, spec = tiny_prefill(tmp_path, "fp32")
    info = engine_from_onnx(onnx_path, tmp_path / "prefill.engine", spec, RANGES)
    try:
        check_gpu(info, find_driver(), 0)
    except NotRunnableError as error:
        pytest.skip(str(error))
    feeds = _feeds(dtype=np.float32)
    with (
        TensorRTRunner(tmp_path / "prefill.engine", spec, "tensorrt-rtx") as gpu,
        OnnxRuntimeRunner(onnx_path, spec) as cpu,
    ):
        np.testing.assert_allclose(gpu.infer(feeds)["y"], cpu.infer(feeds)["y"], rtol=1e-4, atol=1e-5)


# --- CUDA


def test_missing_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(cuda_memory.importlib, "import_module", fail)
    with pytest.raises(
        NotRunnableError, match=r"bindings do not load \(No module .*\); try: pip install cuda-bindings"
    ):
        load_cuda()


def test_a_cuda_call_that_fails(cuda: FakeCuda) -> None:
    cuda.cudaSetDevice = lambda device: (Status.cudaErrorInvalidDevice,)  # type: ignore[method-assign]
    with pytest.raises(IaptError, match="cudaSetDevice fails with cudaErrorInvalidDevice; see nvidia-smi and iapt-exp"):
        CudaStream(7).open()


def test_the_real_bindings_offer_what_is_called() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    called = [name for name in vars(FakeCuda) if name.startswith("cuda")]
    assert [name for name in called if not hasattr(runtime, name)] == []


def test_empty_arrays_have_an_address(cuda: FakeCuda) -> None:
    stream = CudaStream()
    stream.open()
    assert stream.upload("empty", np.empty((0, 4))) > 0
    stream.close()
    assert cuda.live == {}
