"""The runner contract on ONNX Runtime: named arrays in and out, and every reason why not."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import pytest

from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.runner import check_feeds
from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec, TensorSpec

KINDS = {"fp32": ("float", np.float32), "fp16": ("float16", np.float16), "bf16": ("bfloat16", ml_dtypes.bfloat16)}


def spec(dtype: str = "fp32") -> GraphSpec:
    inputs = [TensorSpec("x", dtype, ["batch", 3]), TensorSpec("rows", "int64", ["batch"])]
    return GraphSpec(
        "graph.onnx", inputs, [TensorSpec("y", dtype, [3, "batch"]), TensorSpec("again", "int64", ["batch"])]
    )


@pytest.fixture
def graph(tmp_path: Path) -> Any:
    """Writes a graph that transposes ``x [batch, 3]`` and hands ``rows`` back."""

    def write(dtype: str = "fp32") -> Path:
        kind = KINDS[dtype][0]
        model = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 21]>\n'
            f"turn ({kind}[batch, 3] x, int64[batch] rows) => ({kind}[3, batch] y, int64[batch] again)\n"
            "{\n y = Transpose <perm = [1, 0]> (x)\n again = Identity (rows)\n}"
        )
        path = tmp_path / "graph.onnx"
        onnx.save(model, path)
        return path

    return write


def feeds(dtype: str = "fp32", rows: int = 2) -> dict[str, np.ndarray]:
    x = np.arange(rows * 3).reshape(rows, 3).astype(KINDS[dtype][1])
    return {"x": x, "rows": np.arange(rows, dtype=np.int64)}


@pytest.mark.parametrize("dtype", KINDS)
def test_arrays_travel_in_their_type(graph: Any, dtype: str) -> None:
    with OnnxRuntimeRunner(graph(dtype), spec(dtype)) as runner:
        for rows in (1, 4):
            given = feeds(dtype, rows)
            made = runner.infer(dict(reversed(given.items())))
            assert list(made) == ["y", "again"]
            assert made["y"].dtype == given["x"].dtype and made["again"].dtype == np.int64
            assert np.array_equal(made["y"], given["x"].T) and np.array_equal(made["again"], given["rows"])


@pytest.mark.parametrize("dtype", KINDS)
def test_outputs_are_written_where_the_caller_says(graph: Any, dtype: str) -> None:
    """Also after other arrays, other sizes and other outputs: nothing of an earlier call is used again."""
    kind = KINDS[dtype][1]
    with OnnxRuntimeRunner(graph(dtype), spec(dtype)) as runner:
        room = runner.zeros(dtype, (3, 4))
        assert room.dtype == kind and not room.any()
        same = feeds(dtype, 4)
        for given, into in (
            (same, {"y": room}),
            (same, {"y": room}),
            (feeds(dtype, 2), {"y": np.empty((3, 2), kind), "again": np.empty(2, np.int64)}),
            (same, {"again": np.empty(4, np.int64)}),
            ({**same, "x": same["x"] * 2}, {"y": room, "again": np.empty(4, np.int64)}),
            ({**same, "z": np.zeros(1)}, {}),
        ):
            made = runner.infer(given, into)
            assert made.keys() == {"y", "again"} and all(made[name] is array for name, array in into.items())
            np.testing.assert_array_equal(made["y"], given["x"].T)
            np.testing.assert_array_equal(made["again"], given["rows"])
        same["x"][:] = 5  # read where it stands
        assert (runner.infer({**same}, {"y": room})["y"] == 5).all() and (room == 5).all()


def test_arrays_that_cannot_be_bound_are_refused(graph: Any) -> None:
    with OnnxRuntimeRunner(graph(), spec()) as runner:
        for given, into, error, text in (
            ({"rows": np.arange(2)}, {"y": np.empty((3, 2), np.float32)}, IaptError, "input x is missing"),
            (feeds(rows=2), {"y": np.empty((3, 4), np.float32)}, IaptError, "ONNX Runtime failed in graph.onnx"),
            (feeds(rows=2), {"y": np.empty((2, 3), np.float32).T}, ValueError, "C-contiguous"),
        ):
            with pytest.raises(error, match=text):
                runner.infer(given, into)
        assert np.array_equal(runner.infer(feeds())["y"], feeds()["x"].T)


def test_bf16_needs_no_onnx_package(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph("bf16")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with OnnxRuntimeRunner(path, spec("bf16")) as runner:
        assert runner.infer(feeds("bf16"))["y"].dtype == ml_dtypes.bfloat16


def test_life_of_a_runner(graph: Any) -> None:
    runner = OnnxRuntimeRunner(graph(), spec(), threads=1)
    inactive = r"graph\.onnx: the runner is not active; use it in a with block or call activate\(\)"
    with pytest.raises(IaptError, match=inactive):
        runner.infer(feeds())
    runner.activate()
    runner.activate()
    assert runner.infer(feeds())["y"].shape == (3, 2)
    runner.deactivate()
    runner.deactivate()
    with pytest.raises(IaptError, match=inactive):
        runner.infer(feeds())
    with runner:
        assert runner.infer(feeds())["y"].shape == (3, 2)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"x": None}, ["input x is missing"]),
        ({"x": np.zeros((2, 3), np.float16)}, ["input x is float16, expected float32"]),
        ({"rows": np.zeros(2, np.int32)}, ["input rows is int32, expected int64"]),
        ({"x": np.zeros((2, 3, 1), np.float32)}, ["input x has shape (2, 3, 1), expected ['batch', 3]"]),
        ({"x": np.zeros((2, 4), np.float32)}, ["input x has shape (2, 4), expected 3=3"]),
        ({"rows": np.zeros(5, np.int64)}, ["input rows has shape (5,), expected batch=2"]),
        (
            {"x": None, "rows": np.zeros((1, 1))},
            ["x is missing", "rows is float64", "(1, 1)"],
        ),
    ],
)
def test_bad_inputs_are_listed_together(graph: Any, changes: dict[str, Any], texts: list[str]) -> None:
    given = {name: array for name, array in {**feeds(), **changes}.items() if array is not None}
    with OnnxRuntimeRunner(graph(), spec()) as runner, pytest.raises(IaptError) as caught:
        runner.infer(given)
    assert str(caught.value).startswith("graph.onnx: ")
    for text in texts:
        assert text in str(caught.value)


def test_good_inputs_pass() -> None:
    check_feeds(spec(), feeds())


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there(graph: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(NotRunnableError) as caught:
        OnnxRuntimeRunner(graph(), spec(), device=device).activate()
    assert str(caught.value) == (
        f"device {device!r} is not available: this ONNX Runtime offers CPUExecutionProvider; "
        "use --device cpu, or install onnxruntime-gpu on a machine with an NVIDIA GPU"
    )


def test_onnx_runtime_is_not_installed(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotRunnableError, match="ONNX Runtime is not installed; try: pip install onnxruntime"):
        OnnxRuntimeRunner(path, spec()).activate()


def test_a_release_that_computes_wrongly_is_refused(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.0")
    with pytest.raises(NotRunnableError) as caught:
        OnnxRuntimeRunner(graph(), spec()).activate()
    assert str(caught.value) == (
        "ONNX Runtime 1.23.0 gives wrong answers: its Attention-23 is wrong where several query heads share a key head "
        "(logits off by 0.84 of the largest); expected 1.23.1 or newer: pip install --upgrade onnxruntime"
    )


@pytest.mark.parametrize("data", [b"", b"not a graph", None])
def test_a_file_that_is_no_graph(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "graph.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(IaptError) as caught:
        OnnxRuntimeRunner(path, spec()).activate()
    assert f"ONNX Runtime refuses {path}: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "Opset 24 is under development and support for this is limited.",
        "NOT_IMPLEMENTED : Could not find an implementation for TensorScatter(24) node with name ''",
    ],
)
def test_a_release_without_tensor_scatter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """What 1.23.1 and 1.24.1 say."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(IaptError, match=r"needs TensorScatter, which ONNX Runtime has from 1\.25 on; this is \d"):
        OnnxRuntimeRunner(tmp_path / "graph.onnx", spec()).activate()


def test_a_release_that_cannot_run_a_cache_in_8_bits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.26.0 loads such a graph, and fails at its first step."""
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    cached = dataclasses.replace(spec(), inputs=[*spec().inputs, TensorSpec("past_key_values.0.key", "int8", [1])])
    with pytest.raises(
        NotRunnableError, match=r"a cache in 8 bits needs ONNX Runtime 1\.27 or newer, and this is 1\.26"
    ):
        OnnxRuntimeRunner(tmp_path / "graph.onnx", cached).activate()
    with pytest.raises(IaptError, match=r"graph\.onnx"):
        OnnxRuntimeRunner(tmp_path / "graph.onnx", spec()).activate()
