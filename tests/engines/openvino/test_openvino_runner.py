"""The OpenVINO runner: the contract of every runner, on a graph of a few nodes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.openvino.runner import OpenVINORunner, load_openvino
from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec, TensorSpec

TEXT = """<ir_version: 10, opset_import: ["": 23]>
g (float[n, 3] x, float[n, 3] y, int64[n] nobody) => (float[n, 3] total, float[n, 3] squared) {
    total = Add (x, y)
    squared = Mul (x, x)
}"""
SPEC = GraphSpec(
    "graph.onnx",
    [TensorSpec("x", "fp32", ["n", 3]), TensorSpec("y", "fp32", ["n", 3]), TensorSpec("nobody", "int64", ["n"])],
    [TensorSpec("total", "fp32", ["n", 3]), TensorSpec("squared", "fp32", ["n", 3])],
)
X, Y = (np.arange(6, dtype=np.float32).reshape(2, 3) + start for start in (0.5, 10.25))
FEEDS = {"x": X, "y": Y, "nobody": np.zeros(2, np.int64), "other": np.zeros(1)}


@pytest.fixture
def runner(tmp_path: Path) -> OpenVINORunner:
    pytest.importorskip("openvino")
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "graph.onnx")
    return OpenVINORunner(tmp_path / "graph.onnx", SPEC)


def test_outputs_come_by_name_and_own_their_memory(runner: OpenVINORunner) -> None:
    with runner:
        first = runner.infer(FEEDS)
        second = runner.infer({**FEEDS, "x": X[:1], "y": Y[:1], "nobody": np.zeros(1, np.int64)})
    assert list(first) == ["total", "squared"]
    assert np.array_equal(first["total"], X + Y) and np.array_equal(first["squared"], X * X)
    assert np.array_equal(second["total"], (X + Y)[:1])


def test_outputs_are_written_where_they_are_wanted(runner: OpenVINORunner) -> None:
    with runner:
        place = runner.zeros("fp32", (2, 3))
        made = runner.infer(FEEDS, {"total": place})
    assert made["total"] is place and np.array_equal(place, X + Y)
    assert np.array_equal(made["squared"], X * X)


def test_bad_inputs_are_listed(runner: OpenVINORunner) -> None:
    with pytest.raises(IaptError, match=r"graph\.onnx: the runner is not active"):
        runner.infer(FEEDS)
    with runner, pytest.raises(IaptError, match=r"input x is float64, expected float32; input y is missing"):
        runner.infer({"x": X.astype(np.float64), "nobody": FEEDS["nobody"]})


def test_a_file_that_openvino_refuses(runner: OpenVINORunner) -> None:
    runner.path.write_bytes(b"no graph")
    with pytest.raises(IaptError, match=r"OpenVINO refuses .*graph\.onnx: .+") as caught:
        runner.activate()
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(NotRunnableError) as caught:
        load_openvino()
    assert str(caught.value) == "OpenVINO is not installed; try: pip install -e '.[openvino]'"
