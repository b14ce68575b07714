"""``verify.onnx``: several tokens a row in one step give, to the last bit, what one step for each gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from iapt_export.contract.low_bits import Rounding
from iapt_export.graphs.export import PASSES_FILE, Serving, export_graphs
from iapt_export.graphs.installed import Installed
from tests.bundles import random_method
from tests.graphs import Arrays, run_onnx, stacked_feeds, worst
from tests.thorough import default_for
from tests.tiny import tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import ADePTConfig, IAPTConfig, LoRAConfig

DRAFTS = 3
CAPACITY = 24
LENGTHS = np.array([6, 9, 3])
"""Entries of each row before the step."""

THOROUGH = pytest.mark.thorough


def exported(model: Any, methods: list[Installed], folder: Path, bits: int | None = None) -> Path:
    serving = Serving(CAPACITY + 1, rounding=Rounding(bits) if bits else None, drafts=DRAFTS)
    names = ("serve", "verify")
    specs = export_graphs(model, methods, folder, dtype="fp32", opset=23, names=names, serving=serving)
    graph = onnx.load(folder / "verify.onnx").graph
    assert [value.name for value in graph.input] == [tensor.name for tensor in specs["verify"].inputs]
    assert [value.name for value in graph.output] == [tensor.name for tensor in specs["verify"].outputs]
    return folder


def both(model: Any, folder: Path, weights: Arrays) -> tuple[Arrays, list[Arrays]]:
    """The step of all tokens, and as many steps of one."""
    sizes, source = sizes_of(model), np.random.default_rng(0)
    shape = (len(LENGTHS), sizes.num_kv_heads, CAPACITY, sizes.head_dim)
    past: Arrays = {
        f"past_key_values.{layer}.{part}": source.normal(size=shape).astype(np.float32)
        for layer in range(sizes.num_layers)
        for part in ("key", "value")
    }
    tokens = source.integers(2, sizes.vocab_size, (len(LENGTHS), DRAFTS + 1))

    def step(name: str, tokens: np.ndarray, before: int, past: Arrays) -> Arrays:
        ends = LENGTHS + before + tokens.shape[1]
        feeds = {
            "input_ids": tokens,
            "position_ids": (LENGTHS + before)[:, None] + np.arange(tokens.shape[1]),
            "seqlens_k": (ends - 1).astype(np.int32),
            "total_sequence_length": np.array(ends.max(), np.int32),
            "reads_instruction": np.array(False),
            **past,
            **weights,
        }
        taken = {value.name for value in onnx.load(folder / name, load_external_data=False).graph.input}
        return run_onnx(folder / name, {name: array for name, array in feeds.items() if name in taken})

    several = step("verify.onnx", tokens, 0, past)
    steps = []
    for place in range(DRAFTS + 1):
        steps.append(step("serve.onnx", tokens[:, place : place + 1], place, past))
        past = {name: steps[-1][name.replace("past_key_values", "present")] for name in past}
    return several, steps


def check(several: Arrays, steps: list[Arrays]) -> None:
    np.testing.assert_array_equal(several["logits"], np.concatenate([step["logits"] for step in steps], axis=1))
    for place, step in enumerate(steps):
        for name in [name for name in step if name.startswith("present")]:
            made = several[name if place == DRAFTS else f"{name}.{place}"]
            np.testing.assert_array_equal(made, step[name], err_msg=f"{name} after {place}")


@pytest.mark.parametrize(
    ("model", "bits"),
    [
        pytest.param(lambda: tiny_llama(num_hidden_layers=4), None, id="llama"),  # of which three are traced
        pytest.param(lambda: tiny_llama(head_dim=16, num_hidden_layers=1), None, id="rotating", marks=THOROUGH),
        pytest.param(lambda: tiny_llama(head_dim=16, num_hidden_layers=1), 4, id="in 4 bits", marks=THOROUGH),
        pytest.param(lambda: tiny_mistral(sliding_window=5, num_hidden_layers=1), None, id="window"),
        pytest.param(lambda: tiny_qwen2(num_hidden_layers=1), 8, id="biases in 8 bits", marks=THOROUGH),
        pytest.param(lambda: tiny_qwen3(num_hidden_layers=1), None, id="normalised", marks=THOROUGH),
    ],
)
def test_a_step_of_several_tokens_equals_single_steps(model: Any, bits: int | None, tmp_path: Path) -> None:
    made = model()
    several, steps = both(made, exported(made, [], tmp_path, bits), {})
    check(several, steps)
    notes = json.loads((tmp_path / PASSES_FILE).read_text(encoding="utf-8"))["verify"]
    assert notes["OneByOne"] == f"{sizes_of(made).num_layers} attentions take 4 tokens one by one"


CONFIGS = (IAPTConfig(bottleneck=8), LoRAConfig(rank=2), ADePTConfig(prompt_length=3, bottleneck=2))


@pytest.mark.parametrize("config", default_for(lambda config: isinstance(config, LoRAConfig), CONFIGS))
def test_methods_that_act_on_generated_tokens_do_so_in_every_place(config: Any, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    tenants = [random_method(seed, config, sizes_of(model)) for seed in range(2)]
    item = Installed("method", tenants[0])
    exported(model, [item], tmp_path)
    weights: Arrays = {**stacked_feeds(tenants, "method"), "method.tenant_index": np.array([1, -1, 0])}
    several, steps = both(model, tmp_path, weights)
    check(several, steps)
    plain, _ = both(model, tmp_path, {**weights, "method.tenant_index": np.array([-1, -1, -1])})
    differs = [worst(several["logits"][row], plain["logits"][row]) > 1e-3 for row in range(3)]
    assert differs == [tenants[0].in_decode, False, tenants[0].in_decode]
