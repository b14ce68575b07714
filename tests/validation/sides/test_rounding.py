"""int8 and int4 held to fp32's limits: rounded weights on both sides, activations rounded on none."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import iapt_export
from iapt_export.contract.low_bits import QUANTISED, Rounding
from iapt_export.contract.manifest import BundleManifest, GraphSpec, TensorSpec
from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.passes.fold_transposes import TRANSPOSED
from iapt_export.graphs.passes.pack_projections import JOIN
from iapt_export.graphs.passes.quantise_weights import BLOCKS, ROWS, SCALES
from tests.bundles import METHOD, MIXED, NEW_TOKENS, NUM_LAYERS, TinyBuild, save_tiny_adapter
from tests.families import tiny_family
from tests.iapt_export.graphs.test_serve_passes import two_steps
from tests.thorough import default_for
from tests.tiny import save_tiny_backbone, tiny_gpt2, tiny_llama
from tests.validation.faults import FAULTS, Fault
from trainers.decoder.backbone import load_backbone
from trainers.decoder.importance import IMPORTANCE_FILE, importance_of, load_importance, uses_importance
from trainers.decoder.quantise import ACCURACY_LEVEL, quantise
from trainers.decoder.rounded import rounded_weights
from trainers.methods.configs import ADePTConfig, LoRAConfig
from validation.judging.compare import BRIEF_STEPS, Settings
from validation.judging.metrics import relative
from validation.judging.result import Report
from validation.locating.sources import stored_weight
from validation.sides.nibbles import split_products
from validation.sides.rounding import round_weights
from validation.sides.taps import TappedGraph, TappedRunner
from validation.validate import validate_bundle

LORA = LoRAConfig(rank=2, target_modules=("q_proj", "down_proj"))
ADEPT = ADePTConfig(prompt_length=5, bottleneck=4)
QUICK = Settings(0, NEW_TOKENS, depth="quick", peft_check=False)
DTYPES = tuple(QUANTISED)
Plant = Callable[[Path, pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> Callable[..., TinyBuild]:
    """Bundles with quantised weights, each built once."""
    root = tmp_path_factory.mktemp("quantised")
    backbones = {NUM_LAYERS: tiny_build.model}

    @functools.cache
    def made(dtype: str, *methods: Any, layers: int = NUM_LAYERS, **fields: Any) -> TinyBuild:
        if layers not in backbones:
            backbones[layers] = save_tiny_backbone(root / f"model-{layers}", tiny_llama(num_hidden_layers=layers))
        folder = backbones[layers]
        fingerprint = load_backbone(str(folder)).fingerprint
        place = root / f"bundle-{made.cache_info().currsize}"
        adapters = {
            name: save_tiny_adapter(place / "adapters" / name, seed, fingerprint, method, num_layers=layers)
            for seed, (name, method) in enumerate(methods)
        }
        build = TinyBuild(folder, adapters, root / "cache", place / "bundle")
        # what rounding costs so small and random a model is beyond the limits, which were measured on a real one
        request = build.request(build.bundle, targets=(f"onnxruntime:{dtype}",), prove=False, **fields)
        iapt_export.build(request)
        return build

    return made


def validate(build: TinyBuild, bundle: Path, settings: Settings = QUICK) -> Report:
    return validate_bundle(bundle, BundleManifest.load(bundle), load_backbone(str(build.model)), settings)


@pytest.mark.parametrize(
    ("dtype", "methods", "fields"),
    default_for(
        lambda case: case[0] == "int8",
        [
            ("int8", tuple(MIXED.items()), {"tenants": "1:5:8"}),
            ("int4", (("lora", LORA), ("adept", ADEPT)), {"fold_embeddings": True, "layers": 1}),
            ("int4", (("lora", LORA),), {"merge_lora": True, "past": "1:64:160", "layers": 1}),
        ],
    ),
    ids=["int8, five methods", "int4, LoRA and folded ADePT", "int4, merged LoRA"],
)
def test_quantised_graphs_are_as_near_as_fp32_ones(build: Any, dtype: str, methods: Any, fields: Any) -> None:
    made = build(dtype, *methods, **fields)
    assert (made.bundle / IMPORTANCE_FILE).is_file() == (dtype == "int4")
    report = validate(made, made.bundle)
    rounded, exact, *_ = report.targets
    assert (rounded.dtype, exact.dtype, exact.status) == (dtype, "fp32", "pass")
    assert exact.name == f"onnxruntime with {dtype} weights, otherwise"
    worst = {
        target.name: max(check.measured.get("relative", 0.0) for check in target.checks) for target in report.targets
    }
    assert worst[exact.name] < 1e-4 < 1e-2 < worst[rounded.name], "weights, and activations, were rounded"
    (tokens,) = [check for check in exact.checks if check.stage == "greedy tokens"]
    assert tokens.measured["identical"] == 1.0 and tokens.limits == {"identical": 1.0, "answered": 1.0}


def test_a_cache_in_8_bits_is_compared_as_it_is_served_and_as_it_was(build: Any) -> None:
    made = build("int8", ("lora", LORA), layers=1, past="1:64:160", quantise="cache=8")
    rounded, exact = validate(made, made.bundle).targets
    assert exact.name == "onnxruntime with int8 (cache=8) weights, otherwise" and exact.status == "pass"
    worst = {
        target.dtype: max(check.measured["relative"] for check in target.checks if check.stage.endswith("cache"))
        for target in (rounded, exact)
    }
    assert worst["fp32"] < 1e-5 < 2e-3 < worst["int8"] < 0.1, "of one layer: its inputs and scales alone are rounded"


def exported(model: Any, rounding: Rounding, folder: Path) -> None:
    """``serve.onnx`` as a build writes it, with what its 4 bits were rounded by."""
    importance = importance_of(model) if uses_importance(model, rounding) else {}
    serving = Serving(24, rounding=rounding, importance=importance)
    export_graphs(model, [], folder, dtype="fp32", opset=23, names=("serve",), serving=serving)
    assert bool(load_importance(folder)) == (4 in (rounding.bits, rounding.head, rounding.narrow))


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_fills_no_blocks_stays_and_so_does_its_head(tied: bool, tmp_path: Path) -> None:
    """48 inputs are a block and a half, which products take and lookups do not."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
    model = tiny_llama(num_hidden_layers=1, hidden_size=48, tie_word_embeddings=tied, **heads)
    exported(model, QUANTISED["int8"], tmp_path)
    named = rounded_weights(model, QUANTISED["int8"])
    assert "model.layers.0.mlp.up_proj.weight" in named and "model.embed_tokens.weight" not in named
    assert ("lm_head.weight" in named) == (not tied)
    round_weights(model, QUANTISED["int8"], load_importance(tmp_path))
    (tmp_path / "unrounded.onnx").write_bytes(TappedGraph(tmp_path / "serve.onnx").with_outputs([]).SerializeToString())
    two_steps(model, tmp_path / "unrounded.onnx")


ROUNDINGS = {
    **QUANTISED,
    "int4,block=64,narrow=4": Rounding(4, block=64, narrow=4),
    "int4,block=128,head=4": Rounding(4, block=128, head=4),
    "int8,block=128": Rounding(8, block=128),
}


@pytest.mark.parametrize("name", default_for(("int4", "int4,block=64,narrow=4").__contains__, ROUNDINGS))
@pytest.mark.parametrize(
    "make", default_for(lambda make: make is tiny_llama, [tiny_llama, tiny_gpt2]), ids=["llama", "gpt2"]
)
def test_pytorch_gets_the_weights_that_the_graph_stores(make: Any, name: str, tmp_path: Path) -> None:
    rounding = ROUNDINGS[name]
    width = rounding.block  # the llama's second product has a block that is not full
    sizes = {"hidden_size": width, "intermediate_size": width * 3 // 2, "num_hidden_layers": 1}
    model = make(**({"n_layer": 1, "n_embd": width} if make is tiny_gpt2 else sizes))
    exported(model, rounding, tmp_path)
    before = copy.deepcopy(model)
    round_weights(model, rounding, load_importance(tmp_path))
    changes = [
        relative(new.detach().numpy(), old.detach().numpy())
        for new, old in zip(model.parameters(), before.parameters(), strict=True)
        if new.dim() == 2
    ]
    assert (
        # in 4 bits, a block's largest value may be cut off, where its input counts little
        all(2e-3 < change < {8: 0.01, 4: 0.43}[rounding.bits] for change in changes)
        and max(changes) > 1 / 2**rounding.bits / 2
    )
    graph = TappedGraph(tmp_path / "serve.onnx")
    stored = [
        {field.name: field.i for field in node.attribute}
        for node in graph.nodes
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    ]
    assert {fields["block_size"] for fields in stored} == {rounding.block}
    assert {fields["bits"] for fields in stored} == {rounding.bits, rounding.head, rounding.narrow}
    (tmp_path / "unrounded.onnx").write_bytes(graph.with_outputs([]).SerializeToString())
    two_steps(model, tmp_path / "unrounded.onnx")


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_8_bits_is_the_sum_of_two_of_4(bias: bool, tmp_path: Path) -> None:
    """Two products with one weight, as a head beside drafts has; an odd number of blocks, whose last is not full."""
    draw = np.random.default_rng(0)
    matrix, x = draw.normal(size=(150, 24)).astype(np.float32), draw.normal(size=(3, 150)).astype(np.float32)
    blocks, offset = quantise(matrix, 8, 32), draw.normal(size=24).astype(np.float32)
    fields = {"K": 150, "N": 24, "bits": 8, "block_size": 32, "accuracy_level": ACCURACY_LEVEL}
    further = ["", "", "bias"] if bias else []
    nodes = [
        helper.make_node("MatMulNBits", [name, "w.blocks", "w.scales", *further], [f"{name}.y"], name, **fields)
        for name in ("a", "b")
    ]
    for node in nodes:
        node.domain = "com.microsoft"
    values = {"w.blocks": blocks.values, "w.scales": blocks.scales, "bias": offset}
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", 150]) for name in ("a", "b")],
        [helper.make_tensor_value_info(f"{name}.y", onnx.TensorProto.FLOAT, ["B", 24]) for name in ("a", "b")],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "products.onnx")
    tensors = [
        [TensorSpec(f"{name}{end}", "fp32", ["B", size]) for name in ("a", "b")]
        for end, size in (("", 150), (".y", 24))
    ]
    tapped = TappedGraph(tmp_path / "products.onnx")
    runner = TappedRunner(tmp_path / "products.onnx", GraphSpec("products.onnx", *tensors), tapped, [])
    with runner:
        made = runner.infer({"a": x, "b": -x})
    wanted = x.astype(np.float64) @ blocks.restored() + bias * offset
    np.testing.assert_allclose(made["a.y"], wanted, atol=1e-4)
    np.testing.assert_allclose(made["b.y"], 2 * bias * offset - wanted, atol=1e-4)
    split = tapped.with_outputs([])
    assert sorted(split_products(split, tapped.initializer)) == [
        f"w.blocks.{part}" for part in ("high", "high_scales", "low", "zeros")
    ]
    assert [node.op_type for node in split.graph.node] == ["MatMulNBits", "MatMulNBits", "Add"] * 2
    assert [node.op_type for node in tapped.nodes] == ["MatMulNBits"] * 2, (
        "who looks into the graph sees what is served"
    )


@pytest.mark.parametrize("dtype", default_for("int4".__eq__, DTYPES))
@pytest.mark.parametrize("family", default_for("qwen2_moe".__eq__, ["qwen2_moe", "granite"]))
def test_routers_stay_and_shared_experts_and_scaled_heads_do_not(family: str, dtype: str, tmp_path: Path) -> None:
    """One reads its router and its shared expert in the same way; the other's head is not the last node."""
    model, rounding = tiny_family(family), QUANTISED[dtype]
    exported(model, rounding, tmp_path)
    graph = TappedGraph(tmp_path / "serve.onnx")
    rounded = rounded_weights(model, rounding)
    shared = "model.layers.1.mlp.shared_expert.up_proj.weight"
    assert family != "qwen2_moe" or (shared in rounded and "model.layers.1.mlp.gate.weight" not in rounded)
    stored = {name for name in graph.weights if name.endswith((BLOCKS, ROWS))}
    parts = {part for name in stored for part in name.removesuffix(BLOCKS).removesuffix(ROWS).split(JOIN)}
    assert {part.removesuffix(TRANSPOSED) for part in parts} == set(rounded)
    before = copy.deepcopy(model)
    round_weights(model, rounding, load_importance(tmp_path))
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old) == (name not in rounded), name
    (tmp_path / "unrounded.onnx").write_bytes(graph.with_outputs([]).SerializeToString())
    two_steps(model, tmp_path / "unrounded.onnx")


@pytest.mark.parametrize(
    ("rounding", "count"), [(Rounding(4), 8), (Rounding(4, block=64, narrow=4), 6)], ids=["int4", "block=64,narrow=4"]
)
def test_a_stored_weight_is_read_as_the_kernels_do(rounding: Rounding, count: int, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1, hidden_size=64, intermediate_size=80)
    exported(model, rounding, tmp_path)
    round_weights(model, rounding, load_importance(tmp_path))
    graph = TappedGraph(tmp_path / "serve.onnx")
    names = [name for name in graph.weights if name.endswith(BLOCKS)]
    assert len(names) == count, "seven products and the tied embedding; queries, keys and values in one if bits are"
    for name in names:
        parts = [
            model.get_parameter(part.removesuffix(".transposed")).detach().numpy()
            for part in name.removesuffix(BLOCKS).split(JOIN)
        ]
        right = np.concatenate(parts)
        np.testing.assert_array_equal(stored_weight(graph, name), right.T if "transposed" in name else right)


def weight(ending: str, change: Callable[[np.ndarray], None]) -> Plant:
    """Change what stands for layer 1's up-projection."""

    def plant(bundle: Path, _: pytest.MonkeyPatch) -> None:
        model = onnx.load(bundle / "serve.onnx")
        name = f"model.layers.1.mlp.up_proj.weight.transposed{ending}"
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        array = numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(model, bundle / "serve.onnx")

    return plant


def one_bit(values: np.ndarray) -> None:
    values[0, 0, 0] ^= 1


def one_percent(scales: np.ndarray) -> None:
    scales *= np.float32(1.01)


QUANTISED_FAULTS = (
    *(fault for fault in FAULTS if fault.name.startswith("serve:")),
    Fault("one bit of a stored weight", weight(BLOCKS, one_bit), 0, 1, "weight", "up_proj.output", "1 of 1536"),
    Fault("scales 1 % too large", weight(SCALES, one_percent), 0, 1, "weight", "up_proj.output", "1.01"),
)


@pytest.mark.parametrize("dtype", default_for("int4".__eq__, DTYPES))
@pytest.mark.parametrize(
    "fault",
    default_for(lambda fault: fault.source == "weight", QUANTISED_FAULTS),
    ids=lambda fault: fault.name,
)
def test_small_faults_are_caught_and_located(
    build: Any, fault: Fault, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    made = build(dtype, *((name, METHOD) for name in ("alpha", "beta", "gamma")))
    bundle = Path(shutil.copytree(made.bundle, tmp_path / "bundle"))
    fault.plant(bundle, monkeypatch)
    record_property("planted", f"{fault.name}, {dtype}")
    rounded, exact = validate(made, bundle).targets
    assert exact.status == "fail"
    record_property("caught", fault.name)
    for target in (exact, rounded) if rounded.status == "fail" else (exact,):
        assert target.bisection is not None and target.bisection.finding is not None, target.bisection
        found = target.bisection.finding
        assert (found.step, found.layer, found.source) == (fault.step, fault.layer, fault.source), found
        assert fault.evidence in found.evidence, found
    record_property("located", fault.name)


def test_what_did_not_fail_is_looked_into_once(build: Any) -> None:
    made = build("int4", *((name, METHOD) for name in ("alpha", "beta", "gamma")))
    rounded, exact = validate(made, made.bundle, dataclasses.replace(QUICK, bisect=True)).targets
    assert rounded.bisection is None and exact.bisection is not None
    assert exact.bisection.finding is None and exact.bisection.num_steps == BRIEF_STEPS
    assert max(error for *_, error in exact.bisection.errors) < 1e-4
