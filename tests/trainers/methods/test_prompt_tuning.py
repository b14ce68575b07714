"""Prompt tuning: against stock PEFT, against inputs put together by hand, and what a prompt starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import padded, tiny_gpt2, tiny_llama, tiny_tokenizer
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
from trainers.methods.configs import PromptTuningConfig
from trainers.methods.prompt_tuning import PromptTuning, initial_prompt


def prompt_tuning(model: Any, seed: int = 0) -> PromptTuning:
    return trained(PromptTuning, PromptTuningConfig(prompt_length=4), model, seed)


def test_parameter_count() -> None:
    assert count(PromptTuning, PromptTuningConfig(prompt_length=100), Sizes(768, 12)) == 76_800


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_equals_stock_peft(make: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, the library whose adapters these are")
    model = make()
    method = prompt_tuning(model)
    ids, mask = padded(LENGTHS)
    with torch.no_grad():
        ours = read_instruction(model, rows_of(method), ids, mask).logits
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(method.get_parameter("prompt").detach())
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits
    real = torch.cat([torch.ones(3, 4, dtype=torch.long), mask], dim=1) == 1
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_generates_as_the_prompt_before_the_input(side: str) -> None:
    model = tiny_llama()
    method = prompt_tuning(model)
    ids, mask = padded(LENGTHS, side)
    prompt, table = method.get_parameter("prompt").detach(), model.get_input_embeddings().weight
    logits = last_logits(model, method, ids, mask)
    for row, tokens in enumerate(real_rows(ids, mask)):
        expected = logits_by_hand(model, prompt, table[tokens])[-1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
    generated = [greedy_by_hand(model, prompt, lambda row, _: table[row], row) for row in real_rows(ids, mask)]
    assert greedy_tokens(model, method, ids, mask) == generated


def test_initial_prompt_of_words_repeats_them_after_the_first_token_of_instructions() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    words = tokenizer("a dull film", add_special_tokens=False)["input_ids"]
    config = PromptTuningConfig(init_text="a dull film")
    length = 2 * len(words) + 1
    prompt = initial_prompt(config, length, model, tokenizer, [7, 8])
    table = model.get_input_embeddings().weight
    assert prompt is not None and torch.equal(prompt, table[[7, *(words * 3)[1:length]]])


def test_initial_prompt_without_words_repeats_the_instruction() -> None:
    model = tiny_llama()
    prompt = initial_prompt(PromptTuningConfig(init_text=""), 5, model, tiny_tokenizer(), [7, 8])
    assert prompt is not None and torch.equal(prompt, model.get_input_embeddings().weight[[7, 8, 7, 8, 7]])


def test_initial_prompt_of_the_vocabulary_and_of_noise() -> None:
    model = tiny_llama()
    table = model.get_input_embeddings().weight
    method = PromptTuning(PromptTuningConfig(init="vocabulary"), sizes_of(model))
    method.start(model, tiny_tokenizer(), [7, 8])
    prompt = method.get_parameter("prompt").detach()
    assert torch.equal(prompt[0], table[7])
    assert all((table == row).all(dim=1).any() for row in prompt)
    noise = PromptTuning(PromptTuningConfig(init="random", prompt_length=500), sizes_of(model))
    before = noise.get_parameter("prompt").detach().clone()
    noise.start(model, tiny_tokenizer(), [7, 8])
    assert torch.equal(noise.get_parameter("prompt"), before)
    assert float(before.std()) == pytest.approx(0.02, rel=0.05)
