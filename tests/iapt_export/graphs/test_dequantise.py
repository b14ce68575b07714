"""Weights behind DequantizeLinear: how they are rounded, what reads them, and that both sides have the same ones."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from transformers.pytorch_utils import Conv1D

from iapt_export.building.plan import plan_targets
from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import DEQUANTISED, VALUES, Rounding
from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.passes.dequantise_weights import FACTORS, RESTORED, STEPS, DequantiseWeightsPass
from iapt_export.graphs.passes.fold_transposes import TRANSPOSED
from iapt_export.graphs.save import save_graphs
from iapt_export.graphs.weights import WEIGHTS
from tests.graphs import run_onnx, worst
from tests.iapt_export.graphs.test_passes import operators, parse
from tests.thorough import default_for
from tests.tiny import tiny_gpt2, tiny_llama
from trainers.decoder.rounded import RoundedWeights, round_weights, rounded_weights
from trainers.decoder.scaled import GRIDS, LEAST_SCALE, scale_of_all, scaled
from validation.sides.fp4 import with_kernels_for_fp4

WIDTH, OUTPUTS = 64, 70
HALF_STEPS = {"int8": 0.5, "int4": 2.0, "fp8": 16.0, "fp4": 1.2}
"""In scales: of INT4 a block's largest value may be cut off by a fifth of seven steps, of FP4 by a tenth and by FP8's
rounding of the scale; the largest numbers of FP8 are 32 apart. fp16 adds to it."""
STORED = [("int8", 8), ("int4", 4), ("fp8", 8), ("nvfp4", 4)]
TYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
TYPES["nvfp4"] = ir.DataType.FLOAT4E2M1
EACH = pytest.mark.parametrize(("dtype", "bits"), STORED, ids=[dtype for dtype, _ in STORED])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def run_restored(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """A graph's one output, of products with the matrices as they are restored: ONNX Runtime would put MatMulNBits in
    their place, which rounds inputs too."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    proto = ir.to_proto(model)
    with_kernels_for_fp4(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def dequantised(path: Path) -> dict[str, np.ndarray]:
    """What is made of each rounded weight of a graph, ``[N, K]``, by its name: by ONNX Runtime, or, where that has no
    kernel, by onnx's reference."""
    graph, found = onnx.load(path).graph, {}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    for name in [name for name in makers if name.endswith(RESTORED) and not name.endswith(f"{STEPS}{RESTORED}")]:
        nodes, held = part_of(name, makers, tensors)
        if nodes[-1].op_type not in ("DequantizeLinear", "Cast") or name.endswith(f"{FACTORS}{RESTORED}"):
            continue
        output = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None)
        model = helper.make_model(
            helper.make_graph(nodes, "g", [], [output], held), opset_imports=[helper.make_opsetid("", 23)]
        )
        model.ir_version = 11
        blocked = next(node for node in nodes if node.input[0].endswith(STEPS))
        axis = next(field.i for field in blocked.attribute if field.name == "axis")
        if len(nodes) == 1:
            array = run_onnx(model.SerializeToString(), {})[name]
        else:
            (array,) = ReferenceEvaluator(model).run(None, {})
        found[blocked.input[0].removesuffix(STEPS)] = array if axis else array.T
    return found


def part_of(name: str, makers: dict[str, Any], tensors: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The nodes and constants that make a value, in order."""
    if name in tensors:
        return [], [tensors[name]]
    parts = [part_of(each, makers, tensors) for each in makers[name].input]
    return [*(node for nodes, _ in parts for node in nodes), makers[name]], [one for _, held in parts for one in held]


@pytest.mark.parametrize("block", VALUES["block"])
@EACH
def test_blocks_hold_a_matrix_and_no_scale_is_nothing(dtype: str, bits: int, block: int) -> None:
    rounding = dataclasses.replace(DEQUANTISED[dtype], block=block)
    kind, size = rounding.stored_as(bits), rounding.block_for(bits)
    rows = random(6, 2 * block)
    rows[1] = 0
    made = scaled(rows, bits, rounding)
    grid, whole = GRIDS[kind], made.whole or 1.0
    assert made.values.dtype == grid.dtype and (made.whole is not None) == (kind == "fp4")
    assert made.values.shape == rows.shape and made.scales.shape == (6, 2 * block // size)
    values, scales = made.values.astype(np.float32), made.scales.astype(np.float32) * whole
    assert values.min() >= grid.low and values.max() <= grid.high
    least = 2.0**-9 * whole if kind == "fp4" else LEAST_SCALE
    assert (scales[1] == least).all() and (scales > 0).all() and not made.restored_rows()[1].any()
    steps = np.repeat(scales, size, axis=1)
    assert (np.abs(made.restored_rows() - rows) <= HALF_STEPS[kind] * steps * 1.15).all()
    assert np.array_equal(scaled(rows[2:4], bits, rounding, made.whole).values.astype("f"), values[2:4]), (
        "rows have nothing to do with each other"
    )


@EACH
def test_the_largest_numbers_of_fp16_stay_finite(dtype: str, bits: int) -> None:
    rows = random(2, WIDTH)
    rows[0, 3], rows[0, 4], rows[1, 40] = 65504, -65504, -65504
    restored = scaled(rows, bits, DEQUANTISED[dtype]).restored_rows()
    assert np.isfinite(restored).all()
    for place in ((0, 3), (0, 4), (1, 40)):  # seven of the largest steps are an eighth less than eight
        wanted = rows[place].astype(np.float32)
        assert worst(restored[place], wanted) < {"int8": 1e-3, "int4": 0.126, "fp8": 1e-3, "nvfp4": 0.07}[dtype]


@pytest.mark.parametrize("dtype", DEQUANTISED)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_numbers_that_fp16_lacks_are_refused_with_the_weights_name(value: float, dtype: str) -> None:
    array = random(WIDTH, OUTPUTS)
    array[0, 0] = value
    model = parse(PRODUCT, w=array)
    DequantiseWeightsPass({"w": DEQUANTISED[dtype].bits}, DEQUANTISED[dtype])(model)
    with pytest.raises(
        IaptError, match=r"^w: a matrix has NaN or numbers above 65504, .*; build for tensorrt-rtx:bf16$"
    ):
        model.graph.initializers[f"w{STEPS}"].const_value.numpy()


def test_of_four_bits_the_nearer_of_several_scales_is_taken() -> None:
    rows = random(512, WIDTH)
    for dtype in ("int4", "nvfp4"):
        rounding = DEQUANTISED[dtype]
        grid = GRIDS[rounding.stored_as(4)]
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(GRIDS, rounding.stored_as(4), dataclasses.replace(grid, tried=(1.0,)))
            plain = np.square(scaled(rows, 4, rounding).restored_rows() - rows).sum()
        assert np.square(scaled(rows, 4, rounding).restored_rows() - rows).sum() < 0.95 * plain, dtype


@pytest.mark.parametrize(
    ("least", "largest", "expected"),
    [
        (-1.0, 2688.0, 1.0),
        (-2688.9, 1.0, 1.0),  # fp16 has 2688 and 2690 there
        (-2690.0, 1.0, 2.0),
        (0.0, 0.0, 2.0**-15),
        (0.0, 1e-4, 2.0**-15),
        (-65504.0, 0.0, 32.0),
        (math.nan, math.nan, 2.0**-15),
        (-math.inf, 1.0, 2.0**-15),
    ],
)
def test_the_scale_of_all_reaches_the_largest_with_the_largest(least: float, largest: float, expected: float) -> None:
    assert scale_of_all(least, largest) == expected


def test_fp4_is_exact_in_whatever_order_it_is_multiplied() -> None:
    """No engine has run: of value, scale and the scale of all, fp16 rounds no product."""
    made = scaled(random(512, WIDTH) * np.float16(0.03), 4, DEQUANTISED["nvfp4"])
    assert made.whole is not None
    values = made.values.astype(np.float16).reshape(*made.scales.shape, -1)
    scales, whole = made.scales.astype(np.float16)[..., None], np.float16(made.whole)
    wanted = made.restored_rows().astype(np.float16).reshape(values.shape)
    assert len(np.unique(scales)) > 8 and np.abs(wanted).max() > 0.05
    for order in (values * (scales * whole), (values * scales) * whole, (values * whole) * scales):
        assert order.dtype == np.float16 and np.array_equal(order, wanted)


LINEAR = f"g (float16[n, {WIDTH}] x, float16[{WIDTH}, {OUTPUTS}] t) => (float16[n, {OUTPUTS}] y)\n"
PRODUCT = LINEAR + "{ a = MatMul (x, w)\n b = MatMul (x, t)\n y = Add (a, b) }"
BIASED = LINEAR + "{ a = Gemm (x, w, c)\n b = MatMul (x, t)\n y = Add (a, b) }"


@EACH
@pytest.mark.parametrize("text", [PRODUCT, BIASED], ids=["product", "with bias"])
def test_named_matrices_are_stored_in_few_bits_and_inputs_are_not(text: str, dtype: str, bits: int) -> None:
    rounding = DEQUANTISED[dtype]
    weights = {"w": random(WIDTH, OUTPUTS), "c": random(OUTPUTS, seed=1)}
    feeds = {"x": random(3, WIDTH, seed=2), "t": random(WIDTH, OUTPUTS, seed=3)}
    rounded = {**weights, "w": scaled(weights["w"].T, bits, rounding).restored_rows().T.astype(np.float16)}
    wanted = run_onnx(ir.to_proto(parse(text, **rounded)).SerializeToString(), feeds)["y"]
    model = parse(text, **weights)
    done = DequantiseWeightsPass({"w": bits}, rounding)
    assert done(model).modified and done.note == f"1 weights in {bits} bits"
    made_by = ["DequantizeLinear", "DequantizeLinear", "Cast"] if dtype == "nvfp4" else ["DequantizeLinear"]
    assert operators(model)[: len(made_by) + 1] == [*made_by, text[len(LINEAR) + 6 :].split(" ", 1)[0]]
    assert "w" not in model.graph.initializers and model.graph.initializers[f"w{STEPS}"].dtype == TYPES[dtype]
    assert worst(run_restored(model, feeds), wanted) < 2e-3


@EACH
@pytest.mark.parametrize("is_tied", [False, True], ids=["alone", "tied"])
def test_a_table_is_stored_once_as_its_readers_want_it(is_tied: bool, dtype: str, bits: int, tmp_path: Path) -> None:
    head = "t = Transpose <perm = [1, 0]> (e)\n logits = MatMul (z, t)" if is_tied else "logits = MatMul (z, h)"
    text = f"g (int64[n, 2] i) => (float16[n, 2, 96] logits)\n{{ x = Gather (e, i)\n z = Tanh (x)\n {head} }}"
    table, other = random(96, WIDTH), random(WIDTH, 96, seed=1)
    model = parse(text, e=table, **({} if is_tied else {"h": other}))
    for value in (node.outputs[0] for node in model.graph if node.op_type == "Gather"):
        value.shape, value.type = ir.Shape(["n", 2, WIDTH]), ir.TensorType(ir.DataType.FLOAT16)
    DequantiseWeightsPass({"e": bits}, DEQUANTISED[dtype])(model)
    found = operators(model)
    while found[1] in ("DequantizeLinear", "Cast"):
        found.pop(0)
    expected = ["Gather", "Transpose", "Tanh", "MatMul"] if is_tied else ["Gather", "Tanh", "MatMul"]
    assert found[1:] == expected
    assert list(model.graph.initializers[f"e{STEPS}"].shape) == ([WIDTH, 96] if is_tied else [96, WIDTH])
    restored = scaled(table, bits, DEQUANTISED[dtype]).restored_rows()
    ids = np.array([[3, 95], [0, 7]])
    made = run_restored(model, {"i": ids})
    assert worst(made, np.tanh(restored[ids]) @ (restored.T if is_tied else other.astype(np.float32))) < 2e-3
    save_graphs({"tied": model}, tmp_path)
    held = onnx.load(tmp_path / "tied.onnx")
    assert next(t for t in held.graph.initializer if t.name == f"e{STEPS}").raw_data.__len__() == table.size * bits // 8
    assert held.ir_version >= (11 if dtype == "nvfp4" else 10), "the first that has the type"


@pytest.mark.parametrize(
    ("nodes", "operator"),
    [
        ("a = MatMul (x, w)\n b = ReduceSum (w)\n y = Add (a, b)", "ReduceSum"),
        ("e = Gather (w, i)\n y = MatMul (x, w)", "MatMul"),
        ("a = Gemm <transB = 1> (x, w)\n y = MatMul (x, w)", "Gemm"),
    ],
    ids=["another use", "rows and columns", "turned in the product"],
)
def test_a_weight_whose_blocks_are_not_known_is_refused(nodes: str, operator: str) -> None:
    model = parse(LINEAR.replace("float16[n", "int64[n] i, float16[n", 1) + f"{{ {nodes} }}", w=random(WIDTH, OUTPUTS))
    said = f"^w cannot be stored in 4 bits: {operator} reads it, and blocks go along .*; build for tensorrt-rtx:fp16"
    with pytest.raises(IaptError, match=said):
        DequantiseWeightsPass({"w": 4}, DEQUANTISED["int4"])(model)


def test_weights_of_another_type_are_a_defect() -> None:
    model = parse(LINEAR.replace("float16", "float") + "{ y = MatMul (x, w) }", w=random(WIDTH, OUTPUTS).astype("f"))
    with pytest.raises(ir.passes.PreconditionError, match="w and 0 more weights are not fp16"):
        DequantiseWeightsPass({"w": 4}, DEQUANTISED["int4"])(model)


ROUNDINGS = {
    **DEQUANTISED,
    "int4,block=64,narrow=4": Rounding(4, "integers", block=64, narrow=4),
    "int4,block=128,head=4": Rounding(4, "integers", block=128, head=4),
    "fp8,block=64": Rounding(8, "floats", block=64),
    "nvfp4,head=4,narrow=4": Rounding(4, "floats", head=4, narrow=4),
}


@pytest.mark.parametrize("name", default_for(("int4", "nvfp4").__contains__, ROUNDINGS))
@pytest.mark.parametrize(
    "make", default_for(lambda make: make is tiny_llama, [tiny_llama, tiny_gpt2]), ids=["llama", "gpt2"]
)
def test_pytorch_gets_the_weights_that_onnx_runtime_restores(make: Any, name: str, tmp_path: Path) -> None:
    """Bit for bit, from a model in fp32, whose graph is traced in fp16; and so read one at a time."""
    rounding = ROUNDINGS[name]
    width = rounding.block
    tied = {"tie_word_embeddings": rounding.head == 8 or rounding.grid == "floats"}
    sizes = {"hidden_size": width, "intermediate_size": width + 16, "num_hidden_layers": 1}
    model = make(**tied, **({"n_layer": 1, "n_embd": width} if make is tiny_gpt2 else sizes))
    half, names = copy.deepcopy(model).half(), ("serve_prefill", "serve_decode")
    export_graphs(half, [], tmp_path, dtype="fp16", opset=23, names=names, serving=Serving(None, 24, rounding))
    bits, before = rounded_weights(model, rounding), model.state_dict()
    read = RoundedWeights(model, rounding, {name: tensor.clone() for name, tensor in before.items()}.__getitem__)
    round_weights(model, rounding)
    for graph in names:
        held = dequantised(tmp_path / f"{graph}.onnx")
        of = {name.removeprefix(WEIGHTS).removesuffix(TRANSPOSED): array for name, array in held.items()}
        assert of and set(of) <= set(bits)
        for name, array in of.items():
            module = model.get_submodule(name.rpartition(".")[0])
            rows = module.weight.T if isinstance(module, Conv1D) else module.weight  # [N, K]
            assert np.array_equal(array.astype(np.float32), rows.detach().numpy()), name
            assert torch.equal(read(name), model.get_parameter(name)), name
    untouched = [name for name, tensor in model.named_parameters() if name not in bits]
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in untouched)


def test_matrices_without_whole_blocks_stay() -> None:
    model = tiny_llama(num_hidden_layers=1)  # 32 wide, 48 in the middle
    assert rounded_weights(model, Rounding(8)).keys() - rounded_weights(model, Rounding(8, "integers")).keys() == {
        "model.layers.0.mlp.down_proj.weight"
    }


@pytest.mark.parametrize(
    ("rounding", "sizes", "told"),
    [
        (
            Rounding(4, block=128),
            {"hidden_size": 64},
            "block=128 does not divide the 64 inputs of model.embed_tokens, wh",
        ),
        (Rounding(4, block=64), {"hidden_size": 96}, "block=64 does not divide the 96 inputs of model.embed_tokens,"),
        (
            Rounding(4, "integers", block=64),
            {"hidden_size": 64, "intermediate_size": 96},
            "block=64 does not divide the 96 inputs of model.layers.0.mlp.down_proj, which would stay as it is; give a",
        ),
        (Rounding(4, "integers", head=4), {}, "head=4: this backbone's head is its embedding, a table that an engine"),
    ],
)
def test_what_would_store_more_and_not_less_is_refused(rounding: Rounding, sizes: dict[str, int], told: str) -> None:
    model = tiny_llama(num_hidden_layers=1, **sizes)
    for ask in (rounded_weights, round_weights):
        with pytest.raises(IaptError, match=f"^{told}"):
            ask(model, rounding)


def test_targets_with_few_bits_compute_in_fp16_and_have_graphs_of_their_own() -> None:
    few, many = plan_targets(["tensorrt-rtx:int4", "onnxruntime:int4"], None, None)
    assert (few.graph_dtype, few.rounding, few.variant) == (
        "fp16",
        Rounding(4, "integers"),
        "dequantised-int4-opset23",
    )
    assert many.variant == "int4-opset23"
