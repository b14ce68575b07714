"""What every method owes the decoder, the trainer and the exporter: the same tests for all of them.

A method's own file has its equation written out, and what nobody else does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.thorough import default_for
from tests.tiny import padded, tiny_llama
from tests.trainers.methods_tiny import LENGTHS, gradients, last_logits, stacked, trained
from trainers.decoder.generate import decode, prefill
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import Method, Rows, Weights, rows_of
from trainers.methods.configs import (
    ADePTConfig,
    DePTConfig,
    DoRAConfig,
    IAPTConfig,
    LAMPConfig,
    LoPAConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    method_name,
)
from trainers.methods.forms import ADAPTER_METHODS, FORMS, form_name

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADEPT = ADePTConfig(prompt_length=4, bottleneck=6)
PREFIX = PrefixTuningConfig(prompt_length=4)
CASES: dict[str, Any] = {
    "IAPT": IAPTConfig(bottleneck=8),
    "IAPT, max pooling": IAPTConfig(bottleneck=8, pooling="max", activation="gelu", sharing="none"),
    "prompt tuning": PromptTuningConfig(prompt_length=4),
    "LAMP": LAMPConfig(init_length=12, rank=5, window=3),
    "prefix tuning": PREFIX,
    "prefix tuning, projection": dataclasses.replace(PREFIX, projection=True, projection_width=8),
    "DePT": DePTConfig(prompt_length=4, rank=3, max_length=5),
    "LoPA": LoPAConfig(prompt_length=4, rank=3),
    "ADePT": ADEPT,
    "ADePT on generated tokens": dataclasses.replace(ADEPT, decode_offset=True),
    "LoRA": LoRAConfig(rank=4, target_modules=SEVEN),
    "DoRA": DoRAConfig(rank=4, target_modules=SEVEN),
}
SHIPPED = ("LAMP", "prefix tuning, projection", "DePT", "ADePT", "ADePT on generated tokens")
"""Another module is shipped in their place. LoPA's takes prompts that its encoder made: see its own file."""
FORMS_UNDER_TEST = [*((case, False) for case in CASES), *((case, True) for case in SHIPPED)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def shallow() -> Any:
    """For graphs: a second layer is traced as the first one is."""
    return tiny_llama(num_hidden_layers=1)


def made(case: str, model: Any, seed: int = 0) -> Method:
    config = CASES[case]
    return trained(ADAPTER_METHODS[method_name(config)], config, model, seed)


def shipped(method: Method, model: Any) -> Method:
    """What a bundle has in its place."""
    return method.folded(model.get_input_embeddings().weight) if method.folded_form else method.deployed()


def tenants(case: str, model: Any, ships: bool) -> list[Method]:
    methods = [made(case, model, seed) for seed in range(3)]
    return [shipped(method, model) for method in methods] if ships else methods


def test_every_method_and_what_it_ships_are_under_test(model: Any) -> None:
    assert {method_name(config) for config in CASES.values()} == set(ADAPTER_METHODS)
    methods = {case: made(case, model) for case in CASES}
    others = {case: shipped(method, model) for case, method in methods.items() if not method.is_encoder}
    assert tuple(case for case, other in others.items() if other is not methods[case]) == SHIPPED
    assert {form_name(method) for method in (*methods.values(), *others.values())} == set(FORMS)


@pytest.mark.parametrize("case", CASES)
def test_its_tensors_are_what_its_shapes_say(model: Any, case: str) -> None:
    method = made(case, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in method.named_parameters()}
    assert list(shapes.items()) == list(method.shapes(method.config, sizes_of(model)).items())
    factors = set(method.learning_rate_factors())
    assert factors == set(shapes) if case == "prefix tuning, projection" else factors < set(shapes)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_tensor(model: Any, case: str) -> None:
    found = gradients(made(case, model), *padded(LENGTHS, "left"))
    assert all(0 < value < float("inf") for value in found.values()), found


def two_steps(model: Any, rows: Rows, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, V]`` after the instructions, and after one token ``[B]`` more."""
    ids, mask = padded(LENGTHS)
    first, cache = prefill(model, rows, ids, mask)
    total = torch.cat([rows.slot_mask(mask), mask, mask.new_ones(len(mask), 1)], dim=1)
    return first, decode(model, rows, tokens, total, cache)


@pytest.mark.parametrize(("case", "ships"), FORMS_UNDER_TEST)
def test_every_row_its_own_adapter(model: Any, case: str, ships: bool) -> None:
    methods = tenants(case, model, ships)
    tokens = torch.tensor([5, 6, 7])
    together = two_steps(model, stacked(methods), tokens)
    alone = [two_steps(model, rows_of(method), tokens) for method in methods]
    for row in range(len(methods)):
        for got, wanted in zip(together, alone[row], strict=True):
            torch.testing.assert_close(got[row], wanted[row], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], alone[0][0], atol=1e-2), "the tenants must tell"


@pytest.mark.parametrize("case", SHIPPED)
def test_what_is_shipped_equals_what_was_trained(model: Any, case: str) -> None:
    method = made(case, model)
    deployed = shipped(method, model)
    assert (deployed.num_slots, deployed.in_decode) == (method.num_slots, method.in_decode)
    assert hash(deployed.config) == hash(shipped(method, model).config)
    tokens = torch.tensor([5, 6, 7])
    pairs = zip(two_steps(model, rows_of(deployed), tokens), two_steps(model, rows_of(method), tokens), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    ids, mask = padded(LENGTHS, "left")
    torch.testing.assert_close(
        last_logits(model, deployed, ids, mask), last_logits(model, method, ids, mask), atol=1e-5, rtol=1e-5
    )


class Hooks(torch.nn.Module):
    """All that a method does to a graph's first layer."""

    def __init__(self, method: Method, model: Any) -> None:
        super().__init__()
        self.method, self.model = method, model

    def forward(self, weights: Weights, input_ids: Tensor, mask: Tensor) -> list[Tensor]:
        method, sizes = self.method, sizes_of(self.model)
        weights = method.prepare(weights, self.model, input_ids, mask)
        embeddings = self.model.get_input_embeddings()(input_ids)
        tokens = method.embed(weights, input_ids, embeddings, mask)
        slots = embeddings.new_zeros(embeddings.shape[0], method.num_slots, sizes.hidden_size)
        prompt = method.soft_prompt(weights)
        slots = slots if prompt is None else slots + prompt
        found = [tokens, method.slots(weights, 0, slots, tokens, mask)]
        if method.changes_cache:
            keys = embeddings.new_zeros(embeddings.shape[0], sizes.num_kv_heads, method.num_slots, sizes.head_dim)
            found += method.key_value(weights, 0, keys, keys)
        for name in method.linear_names:
            inputs, outputs = (embeddings.new_ones(*embeddings.shape[:2], size) for size in sizes.linears[name])
            found.append(method.project(weights, 0, name, inputs, outputs))
        return found


def check_traceable(method: Method, model: Any, weights: Weights, shared: tuple[str, ...] = ()) -> None:
    """A graph traced with one batch and length computes another; tensors in ``shared`` have no row axis."""
    ids, mask = padded(LENGTHS)
    batch, length = torch.export.Dim("B"), torch.export.Dim("T")
    hooks = Hooks(method, model)
    shapes = {name: {} if name in shared else {0: batch} for name in weights}
    axes = {0: batch, 1: length}
    program = torch.export.export(hooks, (weights, ids, mask), dynamic_shapes=(shapes, axes, axes))
    fewer = {name: tensor if name in shared else tensor[:1] for name, tensor in weights.items()}
    other = (fewer, ids[:1, :4].clone(), mask[:1, :4].clone())
    for got, wanted in zip(program.module()(*other), hooks(*other), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("case", "ships"), default_for(lambda form: form[0] in ("IAPT", "LoRA"), FORMS_UNDER_TEST))
def test_traceable(shallow: Any, case: str, ships: bool) -> None:
    methods = tenants(case, shallow, ships)
    weights = {name: tensor.detach() for name, tensor in stacked(methods).parts[0].weights.items()}
    check_traceable(methods[0], shallow, weights)


def test_one_adapter_for_all_rows_is_traceable(shallow: Any) -> None:
    method = made("prefix tuning", shallow)
    weights = {name: tensor.detach() for name, tensor in method.weights().items()}
    check_traceable(method, shallow, weights, shared=tuple(weights))


def test_a_bank_of_tables_is_traceable(shallow: Any) -> None:
    """Folded tables are not copied for each row: rows name theirs by number."""
    methods = tenants("ADePT", shallow, ships=True)
    weights = {name: tensor.detach() for name, tensor in stacked(methods).parts[0].weights.items()}
    bank = {**weights, "table_row": torch.tensor([2, 1, 0])}
    check_traceable(methods[0], shallow, bank, shared=("table",))


def test_sent_prompts_are_traceable(shallow: Any) -> None:
    check_traceable(made("LoPA", shallow).deployed(), shallow, {"prompts": torch.randn(3, 4, 32)})
