"""ADePT: its size, its equation written out, its folded table, and which tokens it offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
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
from trainers.decoder.method import Part, Rows, rows_of
from trainers.methods.adept import ADePT, TokenTable
from trainers.methods.configs import ADePTConfig


def adept(model: Any, seed: int = 0, **fields: Any) -> ADePT:
    return trained(ADePT, ADePTConfig(**{"prompt_length": 4, "bottleneck": 6, **fields}), model, seed)


def folded(method: ADePT, model: Any) -> TokenTable:
    return method.folded(model.get_input_embeddings().weight)


def offset_by_hand(method: ADePT, model: Any, token: int) -> np.ndarray:
    """The embedding of one token with its offset, sum by sum."""
    a, a_bias, b, b_bias = (
        method.get_parameter(name).detach().numpy() for name in ("down_weight", "down_bias", "up_weight", "up_bias")
    )
    embedding = model.get_input_embeddings().weight[token].numpy()
    hidden = [max(0.0, sum(embedding * a[:, r]) + a_bias[r]) for r in range(a.shape[1])]
    return embedding + sum(hidden[r] * b[r] for r in range(len(hidden))) + b_bias


def embed_by_hand(method: ADePT, model: Any, decode_offset: bool) -> Any:
    def embed(ids: list[int], instruction: int) -> Tensor:
        plain = model.get_input_embeddings().weight
        rows = [
            torch.from_numpy(offset_by_hand(method, model, token)).float()
            if place < instruction or decode_offset
            else plain[token]
            for place, token in enumerate(ids)
        ]
        return torch.stack(rows)

    return embed


def test_parameter_count() -> None:
    """The published example for T5-base: s d + 2 d r + r + d."""
    assert count(ADePT, ADePTConfig(prompt_length=60, bottleneck=19), Sizes(768, 12)) == 76_051


def test_starts_as_prompt_tuning() -> None:
    model = tiny_llama()
    method = ADePT(ADePTConfig(), sizes_of(model))
    embeddings = torch.randn(2, 5, 32)
    mask = torch.ones(2, 5, dtype=torch.long)
    assert torch.equal(method.embed(method.weights(), mask, embeddings, mask), embeddings)
    assert float(method.get_parameter("down_weight").detach().abs().max()) > 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_definition_written_out(make: Any, side: str) -> None:
    model = make()
    method = adept(model)
    ids, mask = padded(LENGTHS, side)
    prompt = method.get_parameter("prompt").detach()
    logits = last_logits(model, method, ids, mask)
    for row, tokens in enumerate(real_rows(ids, mask)):
        expected = logits_by_hand(model, prompt, embed_by_hand(method, model, False)(tokens, len(tokens)))[-1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decode_offset", [False, True])
def test_generated_tokens_are_offset_where_the_setting_says_so(decode_offset: bool) -> None:
    model = tiny_llama()
    method = adept(model, decode_offset=decode_offset)
    ids, mask = padded(LENGTHS, "left")
    embed = embed_by_hand(method, model, decode_offset)
    prompt = method.get_parameter("prompt").detach()
    expected = [greedy_by_hand(model, prompt, embed, row) for row in real_rows(ids, mask)]
    assert method.in_decode == decode_offset
    assert greedy_tokens(model, method, ids, mask) == expected
    assert greedy_tokens(model, folded(method, model), ids, mask) == expected


def test_the_setting_matters() -> None:
    model = tiny_llama()
    ids, mask = padded(LENGTHS)
    both = [greedy_tokens(model, adept(model, decode_offset=value), ids, mask) for value in (False, True)]
    assert [row[0] for row in both[0]] == [row[0] for row in both[1]]
    assert both[0] != both[1]


@pytest.mark.parametrize("decode_offset", [False, True])
def test_training_offsets_responses_as_serving_does(decode_offset: bool) -> None:
    """Teacher-forced logits equal those of a generation by hand."""
    model = tiny_llama()
    method = adept(model, decode_offset=decode_offset)
    ids, mask = padded([8])
    instruction_mask = mask.clone()
    instruction_mask[:, 5:] = 0
    with torch.no_grad():
        output = read_instruction(model, rows_of(method), ids, mask, instruction_mask=instruction_mask)
    embeddings = embed_by_hand(method, model, decode_offset)(ids[0].tolist(), 5)
    expected = logits_by_hand(model, method.get_parameter("prompt").detach(), embeddings)
    torch.testing.assert_close(output.logits[0, 4:], expected, atol=1e-4, rtol=1e-4)


def test_tied_head_keeps_its_table() -> None:
    model = tiny_llama()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = model.get_input_embeddings().weight.clone()
    method = adept(model, decode_offset=True)
    ids, mask = padded(LENGTHS)
    greedy_tokens(model, method, ids, mask)
    greedy_tokens(model, folded(method, model), ids, mask)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, before)


def test_rows_are_read_out_of_a_bank() -> None:
    model = tiny_llama()
    modules = [folded(adept(model, seed, decode_offset=True), model) for seed in range(2)]
    bank = torch.stack([module.get_parameter("table").detach() for module in modules])
    prompts = torch.stack([module.get_parameter("prompt").detach() for module in modules])
    row = torch.tensor([1, 0, 1])
    rows = Rows(Part(modules[0], {"prompt": prompts[row], "table": bank, "table_row": row}))
    ids, mask = padded(LENGTHS)
    expected = [greedy_tokens(model, modules[tenant], ids, mask)[place] for place, tenant in enumerate(row.tolist())]
    assert greedy_tokens(model, rows, ids, mask) == expected


def test_embeddings_keep_their_type() -> None:
    model = tiny_llama()
    method = folded(adept(model), model)
    ids, mask = padded(LENGTHS)
    embeddings = model.get_input_embeddings()(ids).bfloat16()
    assert method.embed(method.weights(), ids, embeddings, mask).dtype == torch.bfloat16
