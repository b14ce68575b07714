"""DePT: its size, its equation written out, its deployed table, and that padding does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import padded, tiny_gpt2, tiny_llama
from tests.trainers.methods_tiny import (
    LENGTHS,
    count,
    greedy_by_hand,
    greedy_tokens,
    last_logits,
    logits_by_hand,
    real_rows,
    trained,
)
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import rows_of
from trainers.methods.configs import DePTConfig
from trainers.methods.dept import DePT


def dept(model: Any, seed: int = 0, **fields: Any) -> DePT:
    """Five offsets: fewer than the longest row's tokens, more than the shortest's."""
    return trained(DePT, DePTConfig(**{"prompt_length": 4, "rank": 3, "max_length": 5, **fields}), model, seed)


def embed_by_hand(method: DePT, model: Any) -> Any:
    left, right = (method.get_parameter(name).detach().numpy() for name in ("left", "right"))
    config = method.config

    def embed(ids: list[int], instruction: int) -> Tensor:
        rows = []
        for place, token in enumerate(ids):
            row = model.get_input_embeddings().weight[token].numpy()
            if place < min(instruction, config.max_length):
                row = row + config.alpha / config.rank**0.5 * sum(left[place, r] * right[r] for r in range(config.rank))
            rows.append(torch.from_numpy(row))
        return torch.stack(rows).float()

    return embed


@pytest.mark.parametrize(("length", "rank", "positions"), [(40, 45, 256), (60, 30, 256), (80, 15, 256), (60, 24, 512)])
def test_parameter_count(length: int, rank: int, positions: int) -> None:
    """s d + r (S + d): every published setting for T5-base costs what 100 soft tokens cost."""
    config = DePTConfig(prompt_length=length, rank=rank, max_length=positions)
    assert count(DePT, config, Sizes(768, 12)) == 76_800


def test_starts_as_prompt_tuning() -> None:
    method = DePT(DePTConfig(), sizes_of(tiny_llama()))
    embeddings = torch.randn(2, 5, 32)
    mask = torch.ones(2, 5, dtype=torch.long)
    assert torch.equal(method.embed(method.weights(), mask, embeddings, mask), embeddings)
    assert float(method.get_parameter("left").detach().abs().max()) > 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_definition_written_out(make: Any, side: str) -> None:
    """The same on either side, since the one by hand has no padding."""
    model = make()
    method = dept(model)
    ids, mask = padded(LENGTHS, side)
    logits = last_logits(model, method, ids, mask)
    for row, tokens in enumerate(real_rows(ids, mask)):
        embeddings = embed_by_hand(method, model)(tokens, len(tokens))
        expected = logits_by_hand(model, method.get_parameter("prompt").detach(), embeddings)[-1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


def test_scale_divides_by_the_root_of_the_rank() -> None:
    assert dept(tiny_llama(), rank=4, alpha=6.0).scale == 3.0


@pytest.mark.parametrize("side", ["right", "left"])
def test_generated_tokens_have_no_offset(side: str) -> None:
    """More offsets than tokens, so that a response within reach of them would show."""
    model = tiny_llama()
    method = dept(model, max_length=16)
    ids, mask = padded(LENGTHS, side)
    prompt, embed = method.get_parameter("prompt").detach(), embed_by_hand(method, model)
    expected = [greedy_by_hand(model, prompt, embed, row) for row in real_rows(ids, mask)]
    assert not method.in_decode
    assert greedy_tokens(model, method, ids, mask) == expected
    assert greedy_tokens(model, method.deployed(), ids, mask) == expected


def test_training_gives_responses_no_offset() -> None:
    model = tiny_llama()
    method = dept(model, max_length=16)
    ids, mask = padded([8])
    instruction_mask = mask.clone()
    instruction_mask[:, 5:] = 0
    with torch.no_grad():
        output = read_instruction(model, rows_of(method), ids, mask, instruction_mask=instruction_mask)
    embeddings = embed_by_hand(method, model)(ids[0].tolist(), 5)
    expected = logits_by_hand(model, method.get_parameter("prompt").detach(), embeddings)
    torch.testing.assert_close(output.logits[0, 4:], expected, atol=1e-4, rtol=1e-4)


def test_deployed_is_a_table_of_offsets() -> None:
    table = dept(tiny_llama()).deployed()
    assert {name: tuple(tensor.shape) for name, tensor in table.named_parameters()} == {
        "prompt": (4, 32),
        "offset": (5, 32),
    }
