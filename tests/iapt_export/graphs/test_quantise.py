"""Weights in 8 and 4 bits: what is replaced, what stays, how near the results are, and what a target may ask for."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from iapt_export.building.layout import served_graphs
from iapt_export.building.plan import TargetPlan, onnx_variant, plan_targets
from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import VALUES, Rounding
from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.passes.quantise_weights import QuantiseWeightsPass
from iapt_export.graphs.save import save_graphs
from tests.families import tiny_family
from tests.graphs import run_onnx, specs_for, worst
from tests.iapt_export.graphs.test_passes import operators, parse
from tests.iapt_export.graphs.test_serve_passes import two_steps
from tests.tiny import tiny_gpt2, tiny_llama
from trainers.decoder.quantise import quantise
from trainers.decoder.rounded import rounded_weights

WIDTH = 64
LIMITS = {8: 0.02, 4: 0.25}
"""Of one product of random weights: rounding to 1/127 and to 1/7 of each block's largest value, and of activations."""


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("block", VALUES["block"])
@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_hold_the_matrix_to_half_a_step(bits: int, block: int) -> None:
    weight = random(2 * block, 6)
    blocks = quantise(weight, bits, block)
    assert blocks.values.shape == (6, 2, block * bits // 8)
    assert (blocks.values.dtype, blocks.scales.dtype) == (np.uint8, np.float32)
    values = blocks.values
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(6, 2, block)
    restored = (values.astype(np.float32) - 2 ** (bits - 1)) * blocks.scales.reshape(6, -1)[..., None]
    assert np.array_equal(restored.reshape(6, -1).T, blocks.restored())
    error = np.abs(restored.reshape(6, -1).T - weight)
    steps = np.repeat(np.abs(blocks.scales.reshape(6, -1)), block, axis=1).T
    # the largest value of a block may lie one step outside of a range that is not symmetric
    assert (error <= steps * 1.001).all() and np.mean(error <= steps * 0.501) > 0.9


OUTPUTS = 70
LINEAR = f"g (float[n, {WIDTH}] x, float[{WIDTH}, {OUTPUTS}] t) => (float[n, {OUTPUTS}] y)\n"
PRODUCT = LINEAR + "{ a = MatMul (x, w)\n b = MatMul (x, t)\n y = Add (a, b) }"
BIASED = LINEAR + "{ a = Gemm (x, w, c)\n b = MatMul (x, t)\n y = Add (a, b) }"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("text", [PRODUCT, BIASED], ids=["product", "with bias"])
def test_named_matrices_are_quantised_and_inputs_are_not(text: str, bits: int) -> None:
    weights = {"w": random(WIDTH, OUTPUTS), "c": random(OUTPUTS, seed=1)}
    feeds = {"x": random(3, WIDTH, seed=2), "t": random(WIDTH, OUTPUTS, seed=3)}
    wanted = run_onnx(ir.to_proto(parse(text, **weights)).SerializeToString(), feeds)["y"]
    model = parse(text, **weights)
    done = QuantiseWeightsPass({"w": bits}, 32)
    assert done(model).modified and done.note == f"1 products and lookups in {bits} bits"
    assert operators(model) == ["MatMulNBits", "MatMul", "Add"]
    assert "w" not in model.graph.initializers
    error = worst(run_onnx(ir.to_proto(model).SerializeToString(), feeds)["y"], wanted)
    assert 0 < error < LIMITS[bits]


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (LINEAR + "{ a = Gemm (x, w)\n y = Add (a, a) }", {"w": random(WIDTH, OUTPUTS)}),
        (LINEAR + "{ a = MatMul (x, w)\n y = Add (a, a) }", {"w": random(1, WIDTH, OUTPUTS)}),
        (LINEAR + "{ y = MatMul (x, t) }", {}),
        ("g (int64[n] i) => (float[n, 64] y)\n{ y = Gather (w, i) }", {"w": random(64, 64)}),
    ],
    ids=["a router", "experts", "an input", "a table"],
)
def test_what_has_no_bits_stays(text: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(text, **weights)
    before = operators(model)
    done = QuantiseWeightsPass({"another": 8}, 32)
    assert not done(model).modified
    assert operators(model) == before and done.note == "no weight of the backbone is rounded"
    assert all(np.array_equal(model.graph.initializers[name].const_value.numpy(), weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("nodes", "operator"),
    [
        ("a = Gemm <alpha = 2.0> (x, w)\n y = Add (a, a)", "Gemm"),
        ("a = MatMul (x, w)\n b = ReduceSum (w)\n y = Add (a, b)", "ReduceSum"),
        ("e = Gather (w, i)\n y = MatMul (x, w)", "MatMul"),
    ],
    ids=["a factor", "another use", "rows and columns"],
)
def test_a_weight_that_something_else_reads_is_refused(nodes: str, operator: str) -> None:
    model = parse(LINEAR.replace("float[n", "int64[n] i, float[n", 1) + f"{{ {nodes} }}", w=random(WIDTH, OUTPUTS))
    said = f"^w cannot be stored in 4 bits: {operator} reads it, and only .* read blocks; build for onnxruntime:fp32"
    with pytest.raises(IaptError, match=said):
        QuantiseWeightsPass({"w": 4}, 32)(model)


def test_one_matrix_of_weights_with_other_bits_is_refused() -> None:
    model = parse(LINEAR + "{ y = MatMul (x, w) }", w=random(WIDTH, OUTPUTS))
    model.graph.initializers["w"].name = "q.transposed + k.transposed"
    with pytest.raises(IaptError, match=r"^q and k stand in one matrix and would be stored in 8 and 0 bits, where 0"):
        QuantiseWeightsPass({"q": 8}, 32)(model)
    assert QuantiseWeightsPass({"q": 8, "k": 8}, 32)(model).modified


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    text = (
        "g (int64[n] i) => (float[n, 96] logits)\n"
        "{ x = Gather (e, i)\n t = Transpose <perm = [1, 0]> (e)\n logits = MatMul (x, t) }"
    )
    table = random(96, WIDTH)
    model = parse(text, e=table)
    QuantiseWeightsPass({"e": 8}, 32)(model)
    assert operators(model) == ["GatherBlockQuantized", "MatMulNBits"]
    ids = np.array([3, 95, 0])
    made = run_onnx(ir.to_proto(model).SerializeToString(), {"i": ids})["logits"]
    assert worst(made, table[ids] @ table.T) < LIMITS[8]
    save_graphs({"tied": model}, tmp_path)
    stored = (tmp_path / "weights.data").stat().st_size
    assert stored < 1.5 * table.size, "two shapes of the same bytes have one place"


def test_four_bits_leave_eight_to_products_that_narrow_and_to_both_ends() -> None:
    bits = rounded_weights(tiny_family("granite"), Rounding(4))
    layer = {name.removeprefix("model.layers.1."): count for name, count in bits.items() if ".layers.1." in name}
    assert layer == {
        **dict.fromkeys(("self_attn.q_proj.weight", "self_attn.o_proj.weight"), 4),
        **dict.fromkeys(("self_attn.k_proj.weight", "self_attn.v_proj.weight"), 8),
        **dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), 4),
        "mlp.down_proj.weight": 8,
    }
    assert (bits["model.embed_tokens.weight"], bits["lm_head.weight"]) == (8, 8)


@pytest.mark.parametrize(("make", "bits"), [(tiny_llama, 8), (tiny_gpt2, 4)], ids=["llama int8", "gpt2 int4"])
def test_a_quantised_backbone_stays_near(make: Any, bits: int, tmp_path: Path) -> None:
    model = make(**({"n_layer": 1} if make is tiny_gpt2 else {"num_hidden_layers": 1}))
    export_graphs(
        model, [], tmp_path, dtype="fp32", opset=23, names=("serve",), serving=Serving(24, rounding=Rounding(bits))
    )
    nodes = [node.op_type for node in onnx.load(tmp_path / "serve.onnx", load_external_data=False).graph.node]
    assert "MatMulNBits" in nodes and "GatherBlockQuantized" in nodes
    assert not {"MatMul", "Gemm"} & set(nodes)
    two_steps(model, tmp_path / "serve.onnx", limit={8: 0.05, 4: 0.6}[bits])


def test_quantised_targets_compute_in_fp32_and_have_graphs_of_their_own() -> None:
    plans = plan_targets(["onnxruntime:int4", "tensorrt-rtx:fp16"], None, None)
    assert plans[0] == TargetPlan("onnxruntime", "int4", 23)
    assert [(plan.graph_dtype, plan.rounding) for plan in plans] == [("fp32", Rounding(4)), ("fp16", None)]
    assert onnx_variant(plans) == "int4-opset23"
    assert list(served_graphs(specs_for(tiny_llama(), []))) == ["serve"]


def test_a_target_without_a_type_of_weights_says_who_has_it() -> None:
    said = r"int4 weights are for onnxruntime and tensorrt-rtx; for tensorrt use one of fp32, fp16, bf16$"
    with pytest.raises(IaptError, match=said):
        plan_targets(["tensorrt:int4"], None, None)


def test_unknown_types_are_refused_with_the_known_ones() -> None:
    with pytest.raises(IaptError, match=r"dtype 'int2' .* use one of fp32, fp16, bf16, int8, int4"):
        plan_targets(["onnxruntime:int2"], None, None)


def test_without_onnxruntime_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("onnxruntime"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(IaptError, match=r"int8 and int4 need ONNX Runtime's quantiser.*pip install -e '\.\[cpu\]"):
        quantise(random(WIDTH, 4), 8, 32)
