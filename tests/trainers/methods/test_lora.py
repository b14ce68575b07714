"""LoRA: outputs and gradients against stock PEFT, against merged weights, and per row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iapt_export.contract.errors import IaptError
from tests.tiny import padded, tiny_gpt2, tiny_llama, tiny_qwen2
from tests.trainers.methods_tiny import LENGTHS, count, greedy_tokens, real_rows, trained
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.generate import prefill
from trainers.decoder.insertion import continue_from, read_instruction, sizes_of
from trainers.decoder.method import rows_of
from trainers.methods.configs import LoRAConfig
from trainers.methods.lora import LoRA, targets, tensor_name

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = [
    pytest.param(tiny_llama, LoRAConfig(rank=4), id="llama-qv"),
    pytest.param(tiny_llama, LoRAConfig(rank=4, alpha=3.0, target_modules=SEVEN), id="llama-seven"),
    pytest.param(tiny_qwen2, LoRAConfig(rank=4, rslora=True, target_modules=SEVEN), id="qwen2-rslora"),
    pytest.param(tiny_gpt2, LoRAConfig(rank=4, target_modules=("c_attn", "c_proj")), id="gpt2"),
]


def peft_model(make: Any, method: LoRA, path: str) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The same adapter in stock PEFT, in training mode, and its parameters by ``<layer>.<linear>.<side>``."""
    peft = pytest.importorskip("peft", reason="needs peft, the library that this must equal")
    config = method.config
    model = peft.get_peft_model(
        make(),
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            use_rslora=config.rslora,
            target_modules=list(config.target_modules),
            fan_in_fan_out=make is tiny_gpt2,
        ),
    )
    parameters = {}
    for name in method.linear_names:
        for layer in range(method.sizes.num_layers):
            module = model.base_model.model.get_submodule(f"{path}.{layer}.{name}")
            parameters[f"{layer}.{name}.A"] = module.lora_A["default"].weight
            parameters[f"{layer}.{name}.B"] = module.lora_B["default"].weight
            for side in "AB":
                own = method.get_parameter(tensor_name(name, side))[layer]
                parameters[f"{layer}.{name}.{side}"].data.copy_(own.detach())
    return model, parameters


def response_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every real token after the first two, as in training on a response."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_parameter_counts() -> None:
    """LLaMA-2 7B, from 2 R (M + N) per linear and layer."""
    linears = {f"self_attn.{name}": (4096, 4096) for name in SEVEN[:4]}
    linears |= {"mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008), "mlp.down_proj": (11008, 4096)}
    sizes = Sizes(4096, 32, linears=linears)
    assert count(LoRA, LoRAConfig(rank=8), sizes) == 4_194_304
    assert count(LoRA, LoRAConfig(rank=16, target_modules=SEVEN), sizes) == 39_976_960


@pytest.mark.parametrize(("make", "config"), CASES)
def test_outputs_and_gradients_equal_stock_peft(make: Any, config: LoRAConfig) -> None:
    model = make()
    method = trained(LoRA, config, model)
    theirs, parameters = peft_model(make, method, sizes_of(model).layers_path)
    ids, mask = padded([9, 6, 5])
    ours = read_instruction(model, rows_of(method), ids, mask).logits
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    real = mask == 1
    torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)
    response_loss(ours, ids, mask).backward()
    response_loss(expected, ids, mask).backward()
    compared = 0
    for name in method.linear_names:
        for side in "AB":
            gradient = method.get_parameter(tensor_name(name, side)).grad
            assert gradient is not None and gradient.abs().max() > 1e-6
            for layer in range(3):
                peft_gradient = parameters[f"{layer}.{name}.{side}"].grad
                torch.testing.assert_close(gradient[layer], peft_gradient, atol=1e-5, rtol=1e-3)
                compared += 1
    assert compared == sum(parameter.requires_grad for parameter in theirs.parameters())


def test_training_takes_the_path_of_stock_peft() -> None:
    """Five steps of AdamW from the same weights end at the same weights."""
    model = tiny_llama()
    torch.manual_seed(0)
    method = LoRA(LoRAConfig(rank=4), sizes_of(model))
    theirs, parameters = peft_model(tiny_llama, method, "model.layers")
    ids, mask = padded([9, 6, 5])
    pairs: list[tuple[Any, Any]] = [
        (method.parameters(), lambda: read_instruction(model, rows_of(method), ids, mask).logits),
        (parameters.values(), lambda: theirs(input_ids=ids, attention_mask=mask).logits),
    ]
    for trained_parameters, logits in pairs:
        optimiser = torch.optim.AdamW(list(trained_parameters), lr=1e-2)
        for _ in range(5):
            optimiser.zero_grad()
            response_loss(logits(), ids, mask).backward()
            optimiser.step()
    for key, parameter in parameters.items():
        layer, name = key[0], key[2:-2]
        own = method.get_parameter(tensor_name(name, key[-1]))[int(layer)]
        torch.testing.assert_close(own, parameter, atol=1e-4, rtol=1e-3)


def test_starts_at_the_plain_backbone_with_pefts_initial_values() -> None:
    model = tiny_llama()
    method = LoRA(LoRAConfig(rank=4), sizes_of(model))
    ids, mask = padded(LENGTHS)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask == 1]
        got = read_instruction(model, rows_of(method), ids, mask).logits[mask == 1]
    torch.testing.assert_close(got, expected)
    down = method.get_parameter("self_attn__q_proj__A")
    assert 0.9 * 32**-0.5 < down.abs().max() <= 32**-0.5
    assert not torch.equal(down[0], down[1])


@pytest.mark.parametrize(("make", "config"), CASES)
def test_merged_equals_unmerged(make: Any, config: LoRAConfig) -> None:
    model = make()
    method = trained(LoRA, config, model)
    ids, mask = padded(LENGTHS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = read_instruction(model, rows_of(method), ids, mask).logits[mask == 1]
    with method.merged(model):
        got = read_instruction(model, rows_of(None), ids, mask).logits[mask == 1]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain = read_instruction(model, rows_of(None), ids, mask).logits[mask == 1]
    assert (plain - expected).abs().max() > 0.1, "the adapter must change something, or equality says nothing"


def test_merging_puts_the_weights_back_after_an_error() -> None:
    model = tiny_llama()
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ZeroDivisionError), trained(LoRA, LoRAConfig(), model).merged(model):
        raise ZeroDivisionError
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_generated_tokens_are_treated_too() -> None:
    model = tiny_llama()
    method = trained(LoRA, LoRAConfig(rank=4, target_modules=SEVEN), model)
    ids, mask = padded(LENGTHS, "left")
    got = greedy_tokens(model, method, ids, mask)
    with method.merged(model), torch.no_grad():
        for row, tokens in enumerate(real_rows(ids, mask)):
            for token in got[row]:
                assert token == int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
                tokens.append(token)


def test_last_names_match_as_in_peft_and_full_names_too() -> None:
    sizes = sizes_of(tiny_gpt2())
    assert targets(("c_proj",), sizes) == ("attn.c_proj", "mlp.c_proj")
    assert targets(("attn.c_proj",), sizes) == ("attn.c_proj",)
    assert LoRA.shapes(LoRAConfig(rank=2, target_modules=("mlp.c_fc",)), sizes) == {
        "mlp__c_fc__A": (3, 2, 32),
        "mlp__c_fc__B": (3, 128, 2),
    }


def test_unknown_target_module() -> None:
    with pytest.raises(IaptError, match=r"target_modules q_proj: .* use some of c_attn, c_proj, c_fc$"):
        LoRA(LoRAConfig(target_modules=("q_proj", "c_fc")), sizes_of(tiny_gpt2()))
    with pytest.raises(IaptError, match="use some of none"):
        LoRA(LoRAConfig(), Sizes(8, 2))


def test_continuing_without_lora_is_another_function() -> None:
    """The decode step must carry the adapter: a plain step gives other logits."""
    model = tiny_llama()
    method = trained(LoRA, LoRAConfig(rank=4), model)
    ids, mask = padded([5])
    longer = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
    steps = []
    for rows in (rows_of(method), rows_of(None)):
        _, cache = prefill(model, rows_of(method), ids, mask)
        with torch.no_grad():
            steps.append(continue_from(model, rows, ids[:, :1], longer, cache).logits)
    assert (steps[0] - steps[1]).abs().max() > 0.01
