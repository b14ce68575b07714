"""LoPA: its size, its equations written out, that prompts may be sent, and what its encoder reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import padded, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.trainers.methods_tiny import (
    LENGTHS,
    greedy_by_hand,
    greedy_tokens,
    last_logits,
    real_rows,
    trained,
)
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import Part, Rows, rows_of
from trainers.methods.configs import LoPAConfig
from trainers.methods.lopa import LoPA, SentPrompt, lopa_shapes
from trainers.methods.prompt_tuning import initial_prompt


def lopa(model: Any, seed: int = 0, **fields: Any) -> LoPA:
    return trained(LoPA, LoPAConfig(**{"prompt_length": 4, "rank": 3, **fields}), model, seed)


def prompt_by_hand(method: LoPA, model: Any, ids: list[int]) -> Tensor:
    """Z of one instruction without padding; the encoder is asked through the backbone's public output."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    x = states[-1][0, -1].double().numpy()
    weights = {name: tensor.detach().double().numpy() for name, tensor in method.named_parameters()}
    factor = {}
    for side in ("left", "right"):
        hidden = np.tanh(x @ weights[f"{side}_in_weight"] + weights[f"{side}_in_bias"])
        out = hidden @ weights[f"{side}_out_weight"] + weights[f"{side}_out_bias"]
        factor[side] = out.reshape(-1, method.config.rank)
    gate = np.zeros_like(weights["prompt"])
    for i in range(gate.shape[0]):
        for j in range(gate.shape[1]):
            gate[i, j] = 1 / (1 + np.exp(-sum(factor["left"][i] * factor["right"][j])))
    return torch.from_numpy(weights["prompt"] * gate).float()


@pytest.mark.parametrize(("rank", "number"), [(1, 4_759_050), (2, 7_393_300), (4, 12_661_800)])
def test_parameter_count(rank: int, number: int) -> None:
    """s d + 2 (h h + h) + (h s r + s r) + (h d r + d r), an encoder of width 1024 and a backbone of width 2560."""
    shapes = lopa_shapes(LoPAConfig(prompt_length=10, rank=rank), 1024, 2560)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == number


def test_parameters_are_what_the_shapes_say() -> None:
    model = tiny_llama()
    for width, hidden in ((0, 32), (7, 7)):
        method = lopa(model, head_width=width)
        shapes = {name: tuple(tensor.shape) for name, tensor in method.named_parameters()}
        assert shapes == LoPA.shapes(method.config, sizes_of(model))
        assert shapes["left_in_weight"] == (32, hidden) and shapes["right_out_weight"] == (hidden, 96)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("width", [0, 7])
def test_definition_written_out(make: Any, side: str, width: int) -> None:
    """The same on either side, since the one by hand has no padding."""
    model = make()
    method = lopa(model, head_width=width)
    ids, mask = padded(LENGTHS, side)
    prompts = method.prepare(method.weights(), model, ids, mask)["prompts"].detach()
    for row, tokens in enumerate(real_rows(ids, mask)):
        torch.testing.assert_close(prompts[row], prompt_by_hand(method, model, tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(prompts[0], prompts[1], atol=1e-2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_generates_as_the_prompt_before_the_input(side: str) -> None:
    model = tiny_llama()
    method = lopa(model)
    ids, mask = padded(LENGTHS, side)
    table = model.get_input_embeddings().weight
    expected = [
        greedy_by_hand(model, prompt_by_hand(method, model, row), lambda tokens, _: table[tokens], row)
        for row in real_rows(ids, mask)
    ]
    assert not method.in_decode
    assert greedy_tokens(model, method, ids, mask) == expected


def test_sent_prompts_equal_prompts_made_by_the_server() -> None:
    model = tiny_llama()
    method = lopa(model)
    ids, mask = padded(LENGTHS)
    sent = [prompt_by_hand(method, model, row) for row in real_rows(ids, mask)]
    deployed = method.deployed()
    rows = Rows(Part(deployed, {"prompts": torch.stack(sent)}))
    assert isinstance(deployed, SentPrompt) and deployed.weights() == {} and deployed.num_slots == 4
    assert hash(deployed.config) == hash(method.deployed().config)
    torch.testing.assert_close(
        last_logits(model, rows, ids, mask), last_logits(model, method, ids, mask), atol=1e-4, rtol=1e-4
    )
    assert greedy_tokens(model, rows, ids, mask) == greedy_tokens(model, method, ids, mask)


def test_encoder_reads_the_instruction_only() -> None:
    """In training the response follows, and must not be seen."""
    model = tiny_llama()
    method = lopa(model)
    ids, mask = padded([8, 6])
    instruction_mask = mask.clone()
    instruction_mask[:, 5:] = 0
    changed = ids.clone()
    changed[:, 5:] = 3
    encodings = [method.encode(model, tokens, instruction_mask) for tokens in (ids, changed)]
    torch.testing.assert_close(encodings[0], encodings[1])
    torch.testing.assert_close(encodings[0], method.encode(model, ids[:, :5], mask[:, :5]), atol=1e-5, rtol=1e-5)


def test_encoder_has_no_adapter() -> None:
    """The encoding is the plain backbone's also while the instruction is read with the adapter."""
    model = tiny_llama()
    method = lopa(model)
    ids, mask = padded(LENGTHS)
    before = method.encode(model, ids, mask)
    with torch.no_grad():
        read_instruction(model, rows_of(method), ids, mask)
    assert torch.equal(method.encode(model, ids, mask), before)


def test_starts_at_real_tokens() -> None:
    """Small heads leave the gate near one half, which halves twice the embeddings."""
    model = tiny_llama()
    method = LoPA(LoPAConfig(), sizes_of(model))
    method.start(model, tiny_tokenizer(), [7, 8, 9])
    initial = initial_prompt(method.config, 10, model, tiny_tokenizer(), [7, 8, 9])
    assert initial is not None
    prompts = method.prepare(method.weights(), model, *padded(LENGTHS))["prompts"].detach()
    torch.testing.assert_close(prompts, initial.expand(3, -1, -1), atol=0.05, rtol=0.05)
