"""The cache in 8 bits: what the graph keeps, what it attends to, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from iapt_export.contract.graphs import PAST, PRESENT, VERIFY
from iapt_export.contract.low_bits import Rounding
from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.ops.serving_ops import ATTENTION, MICROSOFT
from iapt_export.graphs.passes.quantise_cache import QuantiseCachePass
from tests.families import FAMILIES, IN_PLACE, tiny_family
from tests.graphs import Arrays, run_onnx, worst
from tests.thorough import default_for
from trainers.decoder.importance import LARGEST, ROOM, importance_of, load_importance
from trainers.decoder.insertion import sizes_of

HEADS, KV_HEADS, WIDTH, CAPACITY = 4, 2, 16, 12
ROUNDED = Rounding(8, cache=8)


def attention(scales: Arrays) -> bytes:
    """One attention of the serving graph, its cache in 8 bits."""
    kinds = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}
    inputs = [tensor(name, "FLOAT", [1, "T", heads * WIDTH]) for name, heads in kinds.items()]
    buffers = [tensor(f"rest_{n}", "FLOAT", [1, KV_HEADS, CAPACITY, WIDTH]) for n in range(2)]
    lengths = [tensor("seqlens_k", "INT32", [1]), tensor("total_sequence_length", "INT32", [])]
    fields = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    node = ir.node(ATTENTION, [*inputs, *buffers, *lengths], fields, domain=MICROSOFT, num_outputs=3)
    for value, name in zip(node.outputs, ("mixed", "present.0.key", "present.0.value"), strict=True):
        value.name, value.dtype = name, ir.DataType.FLOAT
    opsets = {"": 23, MICROSOFT: 1}
    graph = ir.Graph([*inputs, *buffers, *lengths], node.outputs, nodes=[node], opset_imports=opsets, name="one")
    changed = QuantiseCachePass(scales)(ir.Model(graph, ir_version=10)).model
    return ir.to_proto(changed).SerializeToString()


def tensor(name: str, dtype: str, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))


def test_attention_reads_and_writes_whole_numbers_with_the_scales_of_their_heads() -> None:
    draw = np.random.default_rng(0)
    scales = {
        f"{PAST}0.{part}": np.repeat(np.array(of_heads, np.float32), WIDTH)
        for part, of_heads in (("key", (0.02, 0.05)), ("value", (0.03, 0.01)))
    }
    new, past = 1, 5
    states = {
        name: draw.normal(size=(1, new, heads * WIDTH)).astype(np.float32)
        for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
    }
    before = draw.integers(-127, 128, size=(2, 1, KV_HEADS, CAPACITY, WIDTH)).astype(np.int8)
    lengths = {"seqlens_k": np.array([past], np.int32), "total_sequence_length": np.array(past + new, np.int32)}
    made = run_onnx(attention(scales), states | {"rest_0": before[0], "rest_1": before[1]} | lengths)
    wanted = []
    for part, kept in zip(("key", "value"), before, strict=True):
        own = scales[f"{PAST}0.{part}"].reshape(1, KV_HEADS, 1, WIDTH)
        rounded = np.clip(np.rint(states[part].reshape(1, KV_HEADS, 1, WIDTH) / own), -128, 127)
        assert np.array_equal(made[f"{PRESENT}0.{part}"][:, :, past : past + 1], rounded.astype(np.int8))
        assert np.array_equal(made[f"{PRESENT}0.{part}"][:, :, :past], kept[:, :, :past])
        wanted.append(np.concatenate([kept[:, :, :past], rounded], axis=2) * own)
    key, value = (torch.from_numpy(each).float().repeat_interleave(HEADS // KV_HEADS, 1) for each in wanted)
    query = torch.from_numpy(states["query"]).reshape(1, HEADS, 1, WIDTH)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert worst(made["mixed"].reshape(1, HEADS, 1, WIDTH), mixed) < 1e-5


def test_a_buffer_without_scales_is_an_error() -> None:
    with pytest.raises(ir.passes.PreconditionError, match=r"past_key_values\.0\.value have no scales"):
        attention({f"{PAST}0.key": np.ones(KV_HEADS * WIDTH, np.float32)})


def test_scales_hold_twice_what_random_tokens_have_and_are_one_a_head() -> None:
    model = tiny_family("llama")
    sizes, found = sizes_of(model), importance_of(model, cache=True)
    names = {f"{PAST}{layer}.{part}" for layer in range(sizes.num_layers) for part in ("key", "value")}
    assert {name for name in found if name.startswith(PAST)} == names
    assert {name for name in importance_of(model) if name.startswith(PAST)} == set()
    ids = torch.randint(0, sizes.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
    for part, states in (("key", cache.layers[1].keys), ("value", cache.layers[1].values)):
        largest = states.abs().amax((0, 2, 3)).numpy()
        assert np.allclose(found[f"{PAST}1.{part}"], np.repeat(ROOM * largest / LARGEST, sizes.head_dim), rtol=1e-6)


IN_PLACE_FAMILIES = [name for name, (expected, _, _) in FAMILIES.items() if expected == IN_PLACE]


@pytest.mark.parametrize("name", default_for(lambda name: name == "gemma3_text", IN_PLACE_FAMILIES))
def test_what_a_family_keeps_is_what_it_kept_rounded(name: str, tmp_path: Path) -> None:
    model = tiny_family(name)
    sizes, capacity, length = sizes_of(model), 24, 10
    graphs = {}
    for bits in (32, 8):
        rounding = dataclasses.replace(ROUNDED, cache=bits)
        folder = tmp_path / str(bits)
        folder.mkdir()
        serving = Serving(capacity, rounding=rounding, importance=importance_of(model, cache=bits == 8))
        export_graphs(model, [], folder, dtype="fp32", opset=23, names=("serve",), serving=serving)
        graphs[bits] = folder / "serve.onnx"
    scales = load_importance(tmp_path / "8")
    draw = np.random.default_rng(0)
    ids = draw.integers(2, sizes.vocab_size, size=(2, length + 1))
    places = np.broadcast_to(np.arange(length + 1), ids.shape)
    made = {}
    for bits, path in graphs.items():
        kind = np.int8 if bits == 8 else np.float32
        cache = {
            f"{PAST}{layer}.{part}": np.zeros((2, sizes.num_kv_heads, capacity, width), kind)
            for layer in range(sizes.num_layers)
            for part, width in zip(("key", "value"), sizes.cache_widths, strict=True)
        }
        read = run_onnx(path, step(ids[:, :length], places[:, :length], length) | cache)
        cache = {each.replace(PRESENT, PAST): array for each, array in read.items() if each.startswith(PRESENT)}
        made[bits] = read, run_onnx(path, step(ids[:, length:], places[:, length:], length + 1) | cache)
    for part in ("key", "value"):  # of the first layer, whose input is the same
        scale = scales[f"{PAST}0.{part}"].reshape(sizes.num_kv_heads, 1, -1)
        for (kept, exact), entries in zip(zip(made[8], made[32], strict=True), (length, length + 1), strict=True):
            exact_part = exact[f"{PRESENT}0.{part}"][:, :, :entries]
            assert np.abs(exact_part / scale).max() < 127, "nothing is cut off"
            assert np.abs(kept[f"{PRESENT}0.{part}"][:, :, :entries] - exact_part / scale).max() < 0.501
    for rounded, exact in zip(made[8], made[32], strict=True):
        error = worst(rounded["logits"], exact["logits"])
        assert 1e-5 < error < 0.25, error  # 0.21 where experts are chosen, 0.15 elsewhere


def step(ids: np.ndarray, places: np.ndarray, entries: int) -> Arrays:
    return {
        "input_ids": np.ascontiguousarray(ids, np.int64),
        "position_ids": np.ascontiguousarray(places, np.int64),
        "seqlens_k": np.full(len(ids), entries - 1, np.int32),
        "total_sequence_length": np.array(entries, np.int32),
    }


def test_a_step_with_drafts_goes_on_over_whole_numbers(tmp_path: Path) -> None:
    model = tiny_family("llama")
    serving = Serving(24, rounding=ROUNDED, drafts=2, importance=importance_of(model, cache=True))
    specs = export_graphs(model, [], tmp_path, dtype="fp32", opset=23, names=("serve", VERIFY), serving=serving)
    caches = [each for each in specs[VERIFY].outputs if each.name.startswith(PRESENT)]
    assert {each.dtype for each in caches} == {"int8"} and len(caches) == 3 * 2 * sizes_of(model).num_layers
