"""The passes of ``serve.onnx``: what they take away, where they do nothing and why, and that the logits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.installed import Installed
from iapt_export.graphs.ops.serving_ops import register_schemas
from iapt_export.graphs.passes.flatten_heads import FlattenHeadsPass
from iapt_export.graphs.passes.rotary_in_attention import RotaryInAttentionPass
from iapt_export.graphs.table import graph_specs
from tests.bundles import random_method
from tests.graphs import Arrays, run_onnx, worst
from tests.iapt_export.graphs.test_passes import operators, parse
from tests.tiny import tiny_gpt2, tiny_llama, tiny_qwen2, tiny_qwen3
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import PrefixTuningConfig

POSITIONS = 24
LENGTHS = [5, 3]
LIMIT = 2e-5
"""fp32 rounding through a tiny layer; a position that is off by one differs by more than 1e-2."""
HEADS = "<perm = [0, 2, 1, 3]>"


def lean(text: str, **weights: np.ndarray) -> ir.Model:
    """A model after `FlattenHeadsPass`, with inferred shapes as the exporter leaves them."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(parse(text, **weights))))
    ir.passes.Sequential(FlattenHeadsPass(), ir.passes.common.RemoveUnusedNodesPass())(model)
    return model


def shape(*sizes: int) -> np.ndarray:
    return np.array(sizes, np.int64)


ROTARY = (
    "g (float[2, 3, 8] x, float[2, 3, 2] c, float[2, 3, 2] s) => (float[2, 3, 8] y)\n{"
    f"a = Reshape (x, four)\n b = Transpose {HEADS} (a)\n r = RotaryEmbedding <num_heads = 2> (b, c, s)\n"
    f"d = Transpose {HEADS} (r)\n y0 = Reshape (d, three)\n y = Relu (y0) }}"
)
SIZES_OF_TWO_HEADS = {"four": shape(2, 3, 2, 4), "three": shape(2, 3, 8)}


def test_heads_stay_flat_around_a_rotary_embedding() -> None:
    source = np.random.default_rng(0)
    x = source.normal(size=(2, 3, 8)).astype(np.float32)
    angles = source.normal(size=(2, 3, 2)).astype(np.float32)
    feeds = {"x": x, "c": np.cos(angles), "s": np.sin(angles)}
    model = lean(ROTARY, **SIZES_OF_TWO_HEADS)
    assert operators(model) == ["RotaryEmbedding", "Relu"]
    before = ir.to_proto(parse(ROTARY, **SIZES_OF_TWO_HEADS)).SerializeToString()
    made = run_onnx(ir.to_proto(model).SerializeToString(), feeds)["y"]
    assert np.array_equal(made, run_onnx(before, feeds)["y"])


def test_heads_that_are_not_rotated_need_no_nodes() -> None:
    text = ROTARY.replace("r = RotaryEmbedding <num_heads = 2> (b, c, s)", "r = Identity (b)")
    assert operators(lean(text.replace("r = Identity (b)\n", "").replace("(r)", "(b)"), **SIZES_OF_TWO_HEADS)) == [
        "Relu"
    ]


@pytest.mark.parametrize(
    "text",
    [
        ROTARY.replace(f"d = Transpose {HEADS} (r)", "d = Transpose <perm = [0, 1, 2, 3]> (r)"),
        ROTARY.replace("d = Transpose", "q = Relu (r)\n d = Transpose").replace("(r)\n y0", "(q)\n y0"),
        "g (float[2, 8] x) => (float[8, 2] y)\n{ a = Reshape (x, w)\n b = Reshape (a, v)\n y = Relu (b) }",
        "g (float[2, 3, 4] x) => (float[3, 4, 2] y)\n"
        "{ a = Transpose <perm = [1, 2, 0]> (x)\n b = Identity (a)\n y = Relu (b) }",
    ],
    ids=["not transposed back", "something between", "another shape", "a single transposition"],
)
def test_other_nodes_stay(text: str) -> None:
    weights = {**SIZES_OF_TWO_HEADS, "w": shape(4, 4), "v": shape(8, 2)}
    before = parse(text, **weights)
    assert sorted(operators(lean(text, **weights))) == sorted(operators(before))


def attention(angles: str, *, width: int = 16, between: str = "", kind: str = "") -> ir.Model:
    """One attention whose query and key are rotated; ``angles`` makes ``a [B, T, K/2]`` of ``position_ids``."""
    register_schemas()
    cache = f"float[b, 1, c, {width}]"
    text = (
        f"g (int64[b, t] position_ids, float[b, t, {width}] q, float[b, t, {width}] k, {cache} pk, {cache} pv, "
        f"int32[b] lengths, int32 total) => (float[b, t, {width}] y, {cache} nk, {cache} nv)\n"
        f"{{ u = Unsqueeze (position_ids, two)\n p = Cast <to = 1> (u)\n {angles}\n c = Cos (a)\n s = Sin (a)\n"
        f"q1 = RotaryEmbedding <num_heads = 1{kind}> (q, c, s)\n k0 = RotaryEmbedding <num_heads = 1> (k, c, s)\n"
        f"{between or 'k1 = Identity (k0)'}\n y, nk, nv = com.microsoft.GroupQueryAttention "
        "<num_heads = 1, kv_num_heads = 1, scale = 0.25, local_window_size = -1> (q1, k1, k, pk, pv, lengths, total) }"
    )
    frequencies = (0.5 ** np.arange(width // 2)).astype(np.float32)
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>\n' + text)
    weights = {"f": frequencies, "two": shape(2), "one": np.array([1], np.int64)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    model = ir.from_proto(proto)
    ir.passes.common.IdentityEliminationPass()(model)
    return model


PLAIN = "a = Mul (p, f)"
LONGEST = "m = ReduceMax (p)\n n = Div (p, m)\n a = Mul (n, f)"


def test_attention_rotates_queries_and_keys_itself() -> None:
    source = np.random.default_rng(0)
    feeds: Arrays = {name: source.normal(size=(2, 3, 16)).astype(np.float32) for name in ("q", "k")} | {
        name: np.zeros((2, 1, 8, 16), np.float32) for name in ("pk", "pv")
    }
    feeds |= {"position_ids": np.tile(np.arange(3), (2, 1)), "lengths": np.array([2, 1], np.int32)}
    feeds["total"] = np.array(3, np.int32)
    wanted = run_onnx(ir.to_proto(attention(PLAIN)).SerializeToString(), feeds)
    model = attention(PLAIN)
    rotary_pass = RotaryInAttentionPass(8)
    assert rotary_pass(model).modified and rotary_pass.reason == ""
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model) == ["GroupQueryAttention"]
    made = run_onnx(ir.to_proto(model).SerializeToString(), feeds)
    assert worst(made["nk"], wanted["nk"]) < LIMIT
    assert worst(made["y"][0], wanted["y"][0]) < LIMIT
    assert worst(made["y"][1, :2], wanted["y"][1, :2]) < LIMIT
    # in a later step each row is rotated by its own position
    step = {name: feeds[name][:, :1] for name in ("q", "k")} | {"pk": wanted["nk"], "pv": wanted["nv"]}
    step |= {"position_ids": np.array([[3], [2]]), "lengths": np.array([3, 2], np.int32)}
    step["total"] = np.array(4, np.int32)
    wanted = run_onnx(ir.to_proto(attention(PLAIN)).SerializeToString(), step)
    assert worst(run_onnx(ir.to_proto(model).SerializeToString(), step)["y"], wanted["y"]) < LIMIT


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: attention(LONGEST), "its cosines depend on positions through ReduceMax"),
        (lambda: attention(PLAIN, width=8), "heads are 8 wide, and GroupQueryAttention rotates multiples of 16"),
        (lambda: attention(PLAIN, between="k1 = Relu (k0)"), "1 of 1 attentions do not follow a rotary embedding"),
        (lambda: attention(PLAIN, kind=", interleaved = 1"), "queries and keys are rotated differently"),
        (lambda: attention(PLAIN, kind=", rotary_embedding_dim = 8"), "only a part of each head is rotated"),
        (lambda: lean(ROTARY, **SIZES_OF_TWO_HEADS), "the graph has no GroupQueryAttention"),
    ],
    ids=["looks at other positions", "narrow heads", "something between", "interleaved", "partial", "no attention"],
)
def test_other_rotary_embeddings_stay_and_the_pass_says_why(model: Any, reason: str) -> None:
    graph = model()
    before = operators(graph)
    rotary_pass = RotaryInAttentionPass(8)
    assert not rotary_pass(graph).modified
    assert rotary_pass.reason.startswith(reason)
    assert operators(graph) == before


def served(model: Any, methods: list[Installed], folder: Path, num_positions: int | None) -> Path:
    folder.mkdir()
    export_graphs(model, methods, folder, dtype="fp32", opset=23, names=("serve",), serving=Serving(num_positions))
    return folder / "serve.onnx"


def two_steps(model: Any, path: Path, limit: float = LIMIT) -> None:
    """Hold reading prompts of `LENGTHS` tokens, and one token more, against PyTorch."""
    sizes = sizes_of(model)
    source = np.random.default_rng(0)
    ids = source.integers(2, sizes.vocab_size, (len(LENGTHS), max(LENGTHS) + 1))
    ends = np.array(LENGTHS, np.int32)
    past = {
        tensor.name: np.zeros((2, sizes.num_kv_heads, POSITIONS, sizes.head_dim), np.float32)
        for tensor in graph_specs([], sizes, "fp32")["serve"].inputs
        if tensor.name.startswith("past")
    }
    logits = []
    for length in (max(LENGTHS), 1):
        place = np.tile(np.arange(length), (2, 1)) if length > 1 else ends[:, None].astype(np.int64)
        last = ends - 1 if length > 1 else ends
        made = run_onnx(
            path,
            {
                "input_ids": np.take_along_axis(ids, place, 1),
                "position_ids": place,
                "seqlens_k": last,
                "total_sequence_length": np.array(last.max() + 1, np.int32),
                **past,
            },
        )
        logits.append(made["logits"][:, 0])
        past = {name: made[name.replace("past_key_values", "present")] for name in past}
    wanted = []
    for row, end in enumerate(LENGTHS):
        with torch.no_grad():
            wanted.append(model(torch.from_numpy(ids[row : row + 1, : end + 1])).logits[0, -2:].numpy())
    assert worst(np.stack(logits), np.stack(wanted, axis=1)) < limit


@pytest.mark.parametrize(
    ("make", "fields", "rotated"),
    [
        (tiny_llama, {"num_attention_heads": 2, "num_key_value_heads": 1}, True),
        (tiny_llama, {}, False),  # heads of eight
        (tiny_qwen2, {"num_attention_heads": 2, "num_key_value_heads": 1}, True),  # biases
        (tiny_qwen3, {}, True),
        (tiny_gpt2, {"n_layer": 1}, False),  # learned positions
    ],
    ids=["llama", "llama with narrow heads", "qwen2", "qwen3", "gpt2"],
)
def test_backbones_are_served_as_pytorch_runs_them(
    make: Any, fields: dict[str, Any], rotated: bool, tmp_path: Path
) -> None:
    fields = fields if make is tiny_gpt2 else {"num_hidden_layers": 1, **fields}
    model = make(**fields)
    path = served(model, [], tmp_path / "lean", POSITIONS)
    two_steps(model, path)
    nodes = list(ir.load(path).graph)
    (rotary,) = {node.attributes.get_int("do_rotary", 0) for node in nodes if node.op_type == "GroupQueryAttention"}
    assert rotary == rotated
    left = [node.op_type for node in nodes]
    packed = [node for node in nodes if node.op_type == "GroupQueryAttention" and node.inputs[1] is None]
    assert len(packed) == (1 if rotated and make is not tiny_qwen3 else 0), "products alone stand before the attention"
    assert left.count("RotaryEmbedding") == (2 if make is tiny_llama and not rotated else 0)
    assert left.count("Transpose") <= 1, "none but for a tied embedding at the head"
    apart = [node for node in nodes if node.op_type == "Reshape" and len(node.outputs[0].shape or ()) == 4]
    assert len(apart) == (2 if make is tiny_qwen3 else 0), "only a normalisation of each head needs the heads apart"


def test_a_prefix_between_embedding_and_attention_keeps_the_embedding(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    method = random_method(0, PrefixTuningConfig(prompt_length=3), sizes_of(model))
    path = served(model, [Installed("prefix_tuning", method)], tmp_path / "prefix", POSITIONS)
    assert [node.op_type for node in ir.load(path).graph].count("RotaryEmbedding") == 2
