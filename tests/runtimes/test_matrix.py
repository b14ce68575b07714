"""What compares other runtimes is checked itself, without them (`make test-runtimes` runs them)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.runtimes import run_graph
from tests.runtimes.matrix import LIMIT, READERS, TENANTS, Row, difference
from tests.runtimes.run_graph import RUNTIMES, TOOLS, read_tensors, write_tensors
from trainers.methods.configs import METHOD_CONFIGS

ARRAYS = {
    "logits": np.array([[1.0, -4.0]], np.float32),
    "ids": np.array([3, 5]),
    "flag": np.array(True),
    "none": np.zeros((0, 2), np.float32),
}


def test_tensors_survive_the_way_to_another_program(tmp_path: Path) -> None:
    write_tensors(tmp_path, ARRAYS)
    back = read_tensors(tmp_path)
    assert list(back) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape) and np.array_equal(back[name], array)
    assert {item["name"]: item["dtype"] for item in json.loads((tmp_path / "tensors.json").read_text())} == {
        "logits": "float32",
        "ids": "int64",
        "flag": "bool",
        "none": "float32",
    }


def test_a_difference_is_the_worst_of_all_outputs() -> None:
    wanted = {"logits": np.array([1.0, -4.0]), "present": np.array([2.0, 0.0])}
    assert difference(wanted, wanted) == 0
    assert difference({**wanted, "present": np.array([2.0, 0.5])}, wanted) == 0.25
    assert difference({**wanted, "logits": np.array([1.0, -3.0])}, wanted) == 0.25
    with pytest.raises(ValueError, match=r"logits is \(0,\), expected \(2,\)"):
        difference({**wanted, "logits": np.zeros(0)}, wanted)
    with pytest.raises(ValueError, match=r"present is missing"):
        difference({"logits": wanted["logits"]}, wanted)


@pytest.mark.parametrize(
    ("found", "limit", "shown"),
    [
        (LIMIT, LIMIT, "1.0e-05 | pass |"),
        (1.1e-5, LIMIT, "1.1e-05 | FAIL |"),
        (float("nan"), LIMIT, "nan | FAIL |"),
        (0.0, 0, "0 | pass |"),
        (1e-9, 0, "1.0e-09 | FAIL |"),
        (None, LIMIT, "– | FAIL reason |"),
    ],
)
def test_verdicts(found: float | None, limit: float, shown: str) -> None:
    row = Row("Runtime", "1.0", "graph", found, limit, "reason" if found is None else "")
    assert str(row) == f"| Runtime | 1.0 | graph | {shown}" and row.passed == ("pass" in shown)


def test_every_reader_has_a_program_and_pins() -> None:
    programs = {*RUNTIMES, *TOOLS, "onnxruntime-web"}
    assert {name.removesuffix("-oldest") for name in READERS} == programs
    for reader in READERS.values():
        assert all("==" in pin or "@" in pin for pin in reader.pins), reader
    assert {type(config) for config in TENANTS.values()} == set(METHOD_CONFIGS.values())


def test_the_program_runs_a_graph(tmp_path: Path) -> None:
    import onnx

    text = '<ir_version: 10, opset_import: ["": 23]>\ng (float[n] x) => (float[n] y) { y = Add (x, x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "graph.onnx")
    x = np.array([1.5, -2.0], np.float32)
    write_tensors(tmp_path / "in", {"x": x})
    (tmp_path / "in" / "graph.txt").write_text(str(tmp_path / "graph.onnx"))
    for runtime in ("onnxruntime", "reference"):
        run_graph.main(runtime, tmp_path / "in", tmp_path / runtime)
        assert np.array_equal(read_tensors(tmp_path / runtime)["y"], 2 * x)
        assert (tmp_path / runtime / "version.txt").read_text()
