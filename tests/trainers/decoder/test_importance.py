"""How much inputs count, held against a computation by hand; scales that are chosen by it, against a slow search."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from iapt_export.contract.low_bits import DEQUANTISED, QUANTISED, Rounding
from tests.families import tiny_family
from tests.tiny import save_tiny_backbone, tiny_gpt2, tiny_llama
from trainers.decoder import quantise as module
from trainers.decoder.backbone import load_backbone
from trainers.decoder.importance import (
    importance_of,
    load_importance,
    round_as_exported,
    save_importance,
    uses_importance,
)
from trainers.decoder.quantise import PLACES, quantise, require_quantiser
from trainers.decoder.rounded import round_weights, rounded_weights
from trainers.decoder.stored import load_mapped, outline_of
from trainers.decoder.streamed import streamed


def drawn(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix ``[K, N]`` with outliers, and how much its inputs count: some a thousand times as much as others."""
    draw = np.random.default_rng(inputs)
    return draw.standard_t(3, (inputs, outputs)).astype(np.float32), (10 ** draw.uniform(0, 3, inputs)).astype("f4")


def errors(weight: np.ndarray, restored: np.ndarray, importance: np.ndarray, block: int) -> np.ndarray:
    """Each block's weighted error, ``[G, N]``."""
    every = (weight - restored).astype(np.float64) ** 2 * importance[:, None]
    return np.add.reduceat(every, range(0, len(weight), block))


@pytest.mark.parametrize("block", [32, 64])
def test_scales_are_the_best_of_those_that_are_tried(block: int) -> None:
    weight, importance = drawn(72, 5)  # the last block is not full
    plain, made = (quantise(weight, 4, block, given) for given in (None, importance))
    least = errors(weight, plain.restored(), importance, block)
    for group, column in np.ndindex(least.shape):
        inside = slice(group * block, (group + 1) * block)
        values, counts = weight[inside, column].astype(np.float64), importance[inside].astype(np.float64)
        best = (0.0, 0.0)
        for place in PLACES:
            whole = np.clip(np.round(values / (values[np.abs(values).argmax()] / place)), -8, 7)
            a, b = (counts * whole * values).sum(), (counts * whole * whole).sum()
            best = max(best, (a * a / b, a / b))
        whole = np.clip(np.round(values / best[1]), -8, 7)
        error = (counts * (values - whole * best[1]) ** 2).sum()
        least[group, column] = min(error, least[group, column])
    np.testing.assert_allclose(errors(weight, made.restored(), importance, block), least, rtol=1e-4)
    before = errors(weight, plain.restored(), importance, block)
    assert least.sum() < 0.8 * before.sum()


def test_whoever_rounds_parts_of_a_matrix_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = drawn(160, 301)
    whole = quantise(weight, 4, 32, importance)
    parts = [quantise(np.ascontiguousarray(part), 4, 32, importance) for part in np.split(weight, [77], axis=1)]
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    for values, scales in (
        [np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "scales")],
        [getattr(quantise(weight, 4, 32, importance), name) for name in ("values", "scales")],
    ):
        np.testing.assert_array_equal(values, whole.values)
        np.testing.assert_array_equal(scales, whole.scales)


def test_what_4_bits_hold_exactly_stays_exact() -> None:
    """As of a checkpoint in Q4_0; and a block of zeros, and one whose inputs that count are zeros, are no numbers."""
    draw = np.random.default_rng(0)
    whole = draw.integers(-8, 8, (96, 6))
    whole[::32] = -8  # so that the scale is known
    weight = (whole * draw.uniform(0.01, 1, 6).astype(np.float16)).astype(np.float32)
    weight[:32, 0] = 0
    importance = draw.uniform(0, 1, 96).astype(np.float32)
    plain, made = quantise(weight, 4, 32), quantise(weight, 4, 32, importance)
    np.testing.assert_array_equal(made.restored(), weight)
    np.testing.assert_array_equal(made.scales, plain.scales)
    nothing = quantise(weight + np.float32(0.1), 4, 32, np.zeros(96, np.float32))
    np.testing.assert_array_equal(nothing.values, quantise(weight + np.float32(0.1), 4, 32).values)


def test_the_quantiser_leaves_the_programs_log_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's module makes the whole program log from INFO on when it is imported."""
    name = "onnxruntime.quantization.matmul_nbits_quantizer"
    require_quantiser()
    monkeypatch.delattr(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(logging.root, "handlers", [])
    before = logging.root.level
    assert before != logging.INFO and require_quantiser() is sys.modules[name]
    assert logging.root.handlers == [] and logging.root.level == before


def test_8_bits_stay_as_they_are() -> None:
    weight, importance = drawn(64, 8)
    np.testing.assert_array_equal(quantise(weight, 8, 32, importance).values, quantise(weight, 8, 32).values)


def test_importance_is_the_mean_square_of_what_random_tokens_feed() -> None:
    model = tiny_llama(num_hidden_layers=1, max_position_embeddings=40)
    found = importance_of(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 40), generator=draw)
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        read = model.model.layers[0].input_layernorm(states[0])
    for name, inputs in {"model.layers.0.self_attn.q_proj.weight": read, "lm_head.weight": states[-1]}.items():
        np.testing.assert_allclose(found[name], inputs.square().mean((0, 1)).numpy(), rtol=1e-5)
    layer = "model.layers.0.self_attn"
    np.testing.assert_array_equal(found[f"{layer}.k_proj.weight"], found[f"{layer}.q_proj.weight"])
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], found["lm_head.weight"])  # they are one
    assert all(not each._forward_pre_hooks for each in model.modules())


def test_a_table_that_is_no_head_counts_its_entries_the_same() -> None:
    model = tiny_llama(tie_word_embeddings=False, num_hidden_layers=1)
    found, rounding = importance_of(model), Rounding(4, head=4, narrow=4)
    assert "lm_head.weight" in found and "model.embed_tokens.weight" not in found
    by_it, plain = tiny_llama(tie_word_embeddings=False, num_hidden_layers=1), model
    round_as_exported(by_it, rounding)
    round_weights(plain, rounding)
    for name, weight in plain.named_parameters():
        assert torch.equal(by_it.get_parameter(name), weight) == (name not in found), name


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe"])
def test_every_matrix_of_4_bits_of_other_families_has_one(name: str) -> None:
    model = tiny_gpt2() if name == "gpt2" else tiny_family(name)
    found = importance_of(model)
    rounded = rounded_weights(model, Rounding(4, head=4, narrow=4))
    without = {"transformer.wpe.weight"} if name == "gpt2" else {"model.embed_tokens.weight"}
    assert rounded.keys() - found.keys() == without, "tables that are only looked up"
    for weight in rounded.keys() & found.keys():
        layer = model.get_submodule(weight.removesuffix(".weight"))
        inputs = layer.nx if isinstance(layer, Conv1D) else model.get_parameter(weight).shape[1]
        assert found[weight].shape == (inputs,) and found[weight].dtype == np.float32, weight


def test_a_backbone_in_its_files_gives_the_same(tmp_path: Path) -> None:
    stored = load_mapped(str(save_tiny_backbone(tmp_path, tiny_llama().to(torch.bfloat16))))
    assert stored is not None
    made = outline_of(stored, "fp32")
    assert made is not None
    loaded = load_backbone(str(tmp_path), dtype="fp32")
    found, wanted = (importance_of(model, cache=True) for model in (streamed(made.model), loaded.model))
    assert found.keys() == wanted.keys()
    for name, each in found.items():
        np.testing.assert_allclose(each, wanted[name], rtol=1e-5, err_msg=name)


def test_inputs_that_are_no_numbers_say_nothing() -> None:
    model = tiny_llama(num_hidden_layers=2)
    torch.nn.init.constant_(model.model.layers[0].mlp.down_proj.weight, torch.inf)
    found = importance_of(model)
    assert "model.layers.0.mlp.down_proj.weight" in found and "model.layers.1.mlp.up_proj.weight" not in found


def test_only_what_was_used_is_kept(tmp_path: Path) -> None:
    found = {"a": np.arange(3, dtype=np.float32), "b": np.ones(2, np.float32)}
    save_importance(found, {"a", "c"}, tmp_path)
    kept = load_importance(tmp_path)
    assert kept.keys() == {"a"} and np.array_equal(kept["a"], found["a"])
    assert load_importance(tmp_path / "older") == {}


def test_4_bits_of_onnx_runtime_use_it_and_nothing_else_does() -> None:
    model = tiny_llama(hidden_size=64)
    assert [name for name, how in QUANTISED.items() if uses_importance(model, how)] == ["int4"]
    assert not any(uses_importance(model, how) for how in (*DEQUANTISED.values(), None))
