"""Graphs on disk: each large tensor once, small ones inside, and nothing that onnx itself would refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from iapt_export.contract.errors import IaptError
from iapt_export.graphs.save import ALIGNMENT, INLINE_BYTES, save_graphs
from tests.graphs import run_onnx

LARGE = np.arange(INLINE_BYTES // 4 + 1, dtype=np.float32)
SIZE = len(LARGE)


def graph(**weights: np.ndarray) -> ir.Model:
    """``y = x + w1 + w2 ...`` over vectors."""
    lines, value = [], "x"
    for number, name in enumerate(weights):
        last = "y" if number + 1 == len(weights) else f"v{number}"
        lines.append(f" {last} = Add ({value}, {name})")
        value = last
    text = '<ir_version: 10, opset_import: ["": 20]>\ng (float[n] x) => (float[n] y)\n{\n' + "\n".join(lines) + "\n}"
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(model)


def places(path: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }


def test_a_tensor_of_two_graphs_is_written_once_whatever_its_name(tmp_path: Path) -> None:
    written: list[int] = []
    models = {"prefill": graph(w=LARGE, other=LARGE + 1), "decode": graph(also=LARGE.copy())}
    save_graphs(models, tmp_path, written.append)
    assert written == [LARGE.nbytes] * 2
    prefill, decode = places(tmp_path / "prefill.onnx"), places(tmp_path / "decode.onnx")
    assert decode["also"] == prefill["w"] != prefill["other"]
    assert {int(place["offset"]) % ALIGNMENT for place in prefill.values()} == {0}
    assert {place["location"] for place in (*prefill.values(), *decode.values())} == {"weights.data"}
    assert (tmp_path / "weights.data").stat().st_size == ALIGNMENT + LARGE.nbytes
    x = np.ones(SIZE, np.float32)
    assert np.array_equal(run_onnx(tmp_path / "prefill.onnx", {"x": x})["y"], 2 * LARGE + 2)
    assert np.array_equal(run_onnx(tmp_path / "decode.onnx", {"x": x})["y"], LARGE + 1)


def test_equal_bytes_have_one_place_and_keep_their_types_and_shapes(tmp_path: Path) -> None:
    zeros = np.zeros(SIZE + 1, np.float32)
    model = graph(a=zeros)
    model.graph.register_initializer(ir.Value(name="b", const_value=ir.tensor(zeros.view(np.int32), name="b")))
    model.graph.register_initializer(ir.Value(name="c", const_value=ir.tensor(zeros.reshape(2, -1), name="c")))
    save_graphs({"g": model}, tmp_path)
    assert len({place["offset"] for place in places(tmp_path / "g.onnx").values()}) == 1
    tensors = onnx.load(tmp_path / "g.onnx").graph.initializer
    read = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}
    assert {name: array.dtype.name for name, array in read.items()} == {"a": "float32", "b": "int32", "c": "float32"}
    assert read["c"].shape == (2, len(zeros) // 2)


@pytest.mark.parametrize(("size", "is_inside"), [(INLINE_BYTES // 4, True), (INLINE_BYTES // 4 + 1, False)])
def test_only_small_tensors_stand_in_the_graph(tmp_path: Path, size: int, is_inside: bool) -> None:
    save_graphs({"g": graph(w=np.ones(size, np.float32))}, tmp_path)
    assert (places(tmp_path / "g.onnx")["w"] == {}) == is_inside
    assert ((tmp_path / "weights.data").stat().st_size == 0) == is_inside


def test_a_graph_may_be_larger_than_protobuf_can_hold(tmp_path: Path) -> None:
    """2 GiB is protobuf's limit; a file of a thousandth of its weights' size shows that the limit is never met."""
    weights = {f"w{number}": np.full(1 << 20, number, np.float32) for number in range(4)}
    save_graphs({"g": graph(**weights)}, tmp_path)
    assert (tmp_path / "weights.data").stat().st_size == sum(array.nbytes for array in weights.values())
    assert (tmp_path / "g.onnx").stat().st_size < 1024


def test_a_graph_that_onnx_refuses_is_not_shipped(tmp_path: Path) -> None:
    model = graph(w=LARGE)
    model.graph.node(0).op_type = "Addition"
    with pytest.raises(IaptError, match=r"g\.onnx does not pass onnx's own checks: "):
        save_graphs({"g": model}, tmp_path)


def test_a_graph_whose_types_do_not_fit_is_not_shipped(tmp_path: Path) -> None:
    model = graph(w=LARGE)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    with pytest.raises(IaptError, match=r"g\.onnx does not pass onnx's own checks: "):
        save_graphs({"g": model}, tmp_path)


def test_the_writer_names_itself_and_no_version(tmp_path: Path) -> None:
    """A version here would change every graph's bytes, and with them every engine, at each release."""
    save_graphs({"g": graph(w=LARGE)}, tmp_path)
    model = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    assert (model.producer_name, model.producer_version) == ("iapt-export", "")
