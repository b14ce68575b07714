"""ONNX Runtime on a GPU, rehearsed over a played one: what stands in its memory, what travels, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines.cuda.memory import DeviceArray
from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.loading import on_device
from engines.serving.session import Request, Session
from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.manifest import BundleManifest, TargetSpec
from tests.bundles import PROMPTS, TENANTS, TinyBuild, run, tokens_of
from tests.engines.fake_gpu import FakeCuda, GpuSession, play_gpu_build

REQUESTS = [Request(TENANTS[n % 3], prompt, max_new_tokens=4 + n) for n, prompt in enumerate(PROMPTS)]


@pytest.fixture
def bundle(engine_bundle: Path) -> Path:
    """Of graphs of standard operators over a cache in place."""
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 25):
        pytest.skip("needs ONNX Runtime 1.25 or newer, which has TensorScatter")
    return engine_bundle


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return play_gpu_build(monkeypatch)


def opened(bundle: Path, **settings: Any) -> Session:
    return Session.open(bundle, verify=False, **settings)


def test_the_same_tokens_with_the_cache_in_the_gpus_memory(bundle: Path, tiny_build: TinyBuild, cuda: FakeCuda) -> None:
    with opened(tiny_build.bundle) as session:
        wanted = tokens_of(session, REQUESTS)
    with opened(bundle, device="cuda") as session:
        assert isinstance(session.stepper, InPlaceStepper)
        assert all(isinstance(buffer, DeviceArray) for buffer in session.stepper.buffers.values())
        assert tokens_of(session, REQUESTS) == wanted
        buffers, pinned = len(session.stepper.buffers), len(cuda.pinned)
    assert (len(cuda.live), cuda.streams) == (0, 0), "the GPU's memory was not given back"
    assert (buffers, pinned) == (4, 1)
    sessions = GpuSession.last[-2:]
    assert [each.asked for each in sessions] == [[("CUDAExecutionProvider", {"use_tf32": "0"})]] * 2
    travelled = {name.partition(".")[0] for each in sessions for name in each.uploads}
    assert "past_key_values" not in travelled and "input_ids" in travelled
    outputs = {(name.partition(".")[0], device) for each in sessions for name, device in each.bound_outputs}
    assert outputs == {("present", "cuda"), ("logits", "cpu")}


def test_tenants_weights_travel_once(bundle: Path, cuda: FakeCuda) -> None:
    with opened(bundle, device="cuda") as session:
        tokens_of(session, REQUESTS)
    uploads = [name for each in GpuSession.last for name in each.uploads]
    assert uploads.count("input_ids") > 10
    weights = {f"{method.name}.{weight.name}" for method in session.manifest.methods for weight in method.weights}
    assert weights and {name: uploads.count(name) for name in weights} == dict.fromkeys(weights, 1)


def test_portable_graphs_run_too(tiny_build: TinyBuild, cuda: FakeCuda) -> None:
    with opened(tiny_build.bundle) as session:
        wanted = tokens_of(session, REQUESTS)
    with opened(tiny_build.bundle, device="cuda") as session:
        assert not session.stepper.in_place, "fp32 has no attention of ONNX Runtime's own on a GPU"
        assert "serve" not in session.target.graphs
        assert tokens_of(session, REQUESTS) == wanted


def test_which_graphs_a_device_gets(tiny_build: TinyBuild, cuda: FakeCuda) -> None:
    target = BundleManifest.load(tiny_build.bundle).target()

    def graphs(dtype: str, device: str) -> set[str]:
        return set(on_device(TargetSpec(**{**vars(target), "dtype": dtype}), device).graphs)

    assert "serve" in graphs("fp16", "cuda") and "serve" in graphs("bf16", "cuda") and "serve" in graphs("int8", "cpu")
    assert graphs("fp32", "cuda") == set(target.graphs) - {"serve"}
    served = TargetSpec(**{**vars(target), "dtype": "int8", "graphs": {"serve": target.graphs["serve"]}})
    with pytest.raises(
        IaptError, match=r"target onnxruntime:int8 has no graphs that run on cuda; use --device cpu, or"
    ):
        on_device(served, "cuda")


def test_a_written_array_on_the_host_is_copied_in_each_call(bundle: Path, cuda: FakeCuda) -> None:
    """As a comparison that looks inside a graph has it: what the GPU read in the call before is stale."""
    manifest = BundleManifest.load(bundle)
    spec = manifest.target().graphs["serve_decode"]
    runner = OnnxRuntimeRunner(bundle / spec.path, spec, device="cuda")
    with runner:
        shapes = {"batch": 1}
        feeds = {
            tensor.name: np.zeros([shapes.get(str(size), size) for size in tensor.shape], np.dtype(np.float32))
            if tensor.dtype == "fp32"
            else np.zeros([shapes.get(str(size), size) for size in tensor.shape], tensor.dtype)
            for tensor in spec.inputs
        }
        into = {name.replace("past_key_values", "present"): a for name, a in feeds.items() if "past" in name}
        for _ in range(2):
            runner.infer(feeds, into)
    (session,) = GpuSession.last
    assert session.uploads.count("past_key_values.0.key") == 2


def test_a_provider_that_falls_back_is_refused(bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuSession, "falls_back", True)
    with pytest.raises(NotRunnableError) as caught:
        opened(bundle, device="cuda").activate()
    assert str(caught.value) == (
        "ONNX Runtime's CUDAExecutionProvider does not load here and it would run on the CPU instead: the GPU's "
        "driver, or a library of CUDA or cuDNN, is missing; 'iapt-export doctor' says which"
    )
    assert (len(cuda.live), cuda.streams) == (0, 0)


@pytest.mark.parametrize("command", ["validate", "bench", "generate"])
def test_cuda_is_refused_before_any_work(tiny_build: TinyBuild, command: str) -> None:
    words = {"generate": ["--tenant", TENANTS[0], "--prompt", "yes?"]}.get(command, [])
    outcome = run(command, tiny_build.bundle, "--device", "cuda", *words)
    assert outcome.code != 0
    assert outcome.err.count("\n") == 1 and "device 'cuda' is not available: this ONNX Runtime offers" in outcome.err


def test_a_build_is_refused_before_any_work(tiny_build: TinyBuild, tmp_path: Path) -> None:
    outcome = run(*tiny_build.arguments(tmp_path / "bundle"), "--device", "cuda")
    assert outcome.code != 0 and "device 'cuda' is not available" in outcome.err
    assert not (tmp_path / "bundle").exists()
