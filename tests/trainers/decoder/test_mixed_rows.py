"""A batch whose rows are of different methods: each row gets exactly what it gets alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.families import tiny_family
from tests.tiny import ARCHITECTURES, padded, tiny_llama
from trainers.decoder.attention import use_own_attention
from trainers.decoder.generate import decode, greedy, prefill
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import Method, Part, Rows, rows_of
from trainers.methods.configs import (
    METHOD_CONFIGS,
    ADePTConfig,
    DePTConfig,
    IAPTConfig,
    LAMPConfig,
    LoPAConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from trainers.methods.forms import new_method

CONFIGS = [
    IAPTConfig(bottleneck=8, prompt_length=4),
    PromptTuningConfig(prompt_length=6),
    PrefixTuningConfig(prompt_length=3),
    PrefixTuningConfig(prompt_length=2, projection=True, projection_width=8),
    ADePTConfig(prompt_length=5, bottleneck=4, decode_offset=True),
    DePTConfig(prompt_length=2, rank=2, max_length=4),
    LoPAConfig(prompt_length=3, rank=2),
    LAMPConfig(init_length=10, rank=4, window=5),
    LoRAConfig(rank=2, target_modules=("q_proj", "v_proj", "up_proj")),
]
LENGTHS = [4, 9, 6, 5, 3, 8, 7, 2, 6, 5]
"""Instruction tokens of one row for each configuration, and of one row that belongs to none."""
NOBODY = len(CONFIGS)


def methods_for(model: Any) -> list[Method]:
    """One method for each configuration, far from where it starts."""
    torch.manual_seed(11)
    methods = []
    for config in CONFIGS:
        if isinstance(config, LoRAConfig) and model.config.model_type == "gpt2":
            config = LoRAConfig(rank=2, target_modules=("c_attn", "c_proj"))
        method = new_method(config, sizes_of(model))
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        methods.append(method.eval().requires_grad_(False))
    return methods


def mixed(methods: list[Method], owners: list[int]) -> Rows:
    """Rows whose owner is the method of that number."""
    return Rows(
        *(
            Part(method, method.weights(), torch.tensor([owner == number for owner in owners]))
            for number, method in enumerate(methods)
            if number in owners
        )
    )


def alone(model: Any, methods: list[Method], owner: int, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
    """What a row gets by itself, without padding: logits ``[V]`` and greedy tokens."""
    row = ids[mask.bool()][None]
    rows = rows_of(methods[owner] if owner < len(methods) else None)
    logits, _ = prefill(model, rows, row, torch.ones_like(row))
    tokens, _ = greedy(model, rows, row, torch.ones_like(row), max_new_tokens=5)
    return logits[0], tokens[0]


def test_every_method_is_here() -> None:
    assert {type(config) for config in CONFIGS} == set(METHOD_CONFIGS.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_gets_what_it_gets_alone(name: str, side: str) -> None:
    model = ARCHITECTURES[name]()
    methods = methods_for(model)
    ids, mask = padded(LENGTHS, side)
    owners = [*range(len(CONFIGS)), NOBODY]
    rows = mixed(methods, owners)
    assert rows.num_slots == 6
    logits, _ = prefill(model, rows, ids, mask)
    tokens, _ = greedy(model, rows, ids, mask, max_new_tokens=5)
    for row, owner in enumerate(owners):
        wanted, wanted_tokens = alone(model, methods, owner, ids[row], mask[row])
        assert (logits[row] - wanted).abs().max() < 1e-5 * wanted.abs().max(), f"row {row}"
        assert tokens[row] == wanted_tokens, f"row {row}"


@pytest.mark.parametrize("owners", [[0, 1, 2, 0], [2, 8, 8, NOBODY], [NOBODY, 4, 4, 1], [8, NOBODY, NOBODY, 8]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tenant_may_have_several_rows(owners: list[int], side: str) -> None:
    model = tiny_llama()
    methods = methods_for(model)
    ids, mask = padded(LENGTHS[:4], side)
    logits, _ = prefill(model, mixed(methods, owners), ids, mask)
    for row, owner in enumerate(owners):
        wanted, _ = alone(model, methods, owner, ids[row], mask[row])
        assert (logits[row] - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_of_nobody_is_the_plain_backbone(name: str) -> None:
    """Also where all rows are nobody's, in prefill and in the steps after it."""
    model = ARCHITECTURES[name]()
    methods = methods_for(model)
    ids, mask = padded([4, 9], "left")
    nobody = Rows(*(Part(method, method.weights(), torch.zeros(2, dtype=torch.bool)) for method in methods))
    logits, cache = prefill(model, nobody, ids, mask)
    plain, plain_cache = prefill(model, Rows(), ids, mask)
    assert (logits - plain).abs().max() < 1e-5 * plain.abs().max()
    token, one = torch.tensor([7, 8]), mask.new_ones(2, 1)
    step = decode(model, nobody, token, torch.cat([nobody.slot_mask(mask), mask, one], dim=1), cache)
    wanted = decode(model, Rows(), token, torch.cat([mask, one], dim=1), plain_cache)
    assert (step - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert nobody.slot_mask(mask).sum() == 0


def test_the_neighbouring_row_does_not_matter() -> None:
    """Another tenant in the neighbouring row, other weights, other tokens: this row's logits stay."""
    model = tiny_llama()
    methods = methods_for(model)
    ids, mask = padded([6, 6])
    seen = []
    for other in (1, 2, 8, NOBODY):
        ids = ids.clone()
        ids[1] = (ids[1] + 17) % 300 + 2
        seen.append(prefill(model, mixed(methods, [0, other]), ids, mask)[0][0])
    assert all((logits - seen[0]).abs().max() < 1e-5 * seen[0].abs().max() for logits in seen)


def test_the_comparison_sees_a_wrong_owner() -> None:
    """Rows of two tenants exchanged are far outside the tolerance above."""
    model = tiny_llama()
    methods = methods_for(model)
    ids, mask = padded([6, 6])
    right, wrong = (prefill(model, mixed(methods, owners), ids, mask)[0] for owners in ([0, 1], [1, 0]))
    assert ((right - wrong).abs().amax(dim=1) > 1e-2 * right.abs().max()).all()


def test_slots_that_a_row_does_not_use_are_masked() -> None:
    methods = methods_for(tiny_llama())
    _, mask = padded([3, 3, 3, 3])
    rows = mixed(methods, [0, 1, 8, NOBODY])
    assert rows.mixed and not rows_of(methods[0]).mixed
    assert rows.slot_mask(mask).tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [0] * 6, [0] * 6]
    assert rows_of(methods[0]).slot_mask(mask).tolist() == [[1] * 4] * 4
    assert read_instruction(tiny_llama(), rows, *padded([3, 3, 3, 3])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "linears"),
    [
        ("qwen2_moe", ("up_proj", "down_proj", "shared_expert_gate")),
        ("deepseek_v3", ("q_a_proj", "kv_b_proj")),
        ("deepseek_v2", ("kv_a_proj_with_mqa", "kv_b_proj")),
    ],
)
def test_linears_that_see_no_rows_are_changed_by_row(family: str, linears: tuple[str, ...]) -> None:
    """A shared expert gets all rows' tokens in one list, latents are one head of many entries; PEFT is right."""
    length, generator = 6, torch.Generator().manual_seed(3)
    ids = torch.randint(5, 300, (3, length), generator=generator)
    model = tiny_family(family)
    stock = peft.get_peft_model(tiny_family(family), peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(linears)))
    methods = []
    for name in ("default", "second"):
        if name not in stock.peft_config:
            stock.add_adapter(name, stock.peft_config["default"])
        method = new_method(LoRAConfig(rank=2, alpha=4, target_modules=linears), sizes_of(model)).eval()
        for path, parameter in method.named_parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
            linear, _, side = path.replace("__", ".").rpartition(".")
            for layer in range(2):
                place = f"base_model.model.model.layers.{layer}.{linear}.lora_{side}.{name}.weight"
                stock.get_parameter(place).data.copy_(parameter.data[layer])
        methods.append(method.requires_grad_(False))
    use_own_attention(model)
    first, second = (method.weights() for method in methods)
    by_row = {name: torch.cat([first[name], second[name], first[name]]) for name in first}
    rows = Rows(Part(methods[0], by_row, torch.tensor([True, True, False])))
    logits, _ = prefill(model, rows, ids, torch.ones_like(ids))
    for row, name in enumerate(("default", "second", None)):
        with torch.no_grad(), nullcontext() if name else stock.disable_adapter():
            stock.set_adapter(name or "default")
            wanted = stock.eval()(input_ids=ids[row : row + 1]).logits[0, -1]
        assert (logits[row] - wanted).abs().max() < 1e-5 * wanted.abs().max(), name
    assert (logits[0] - logits[2]).abs().max() > 0.01 * logits.abs().max(), "adapters matter"
