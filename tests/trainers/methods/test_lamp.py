"""LAMP as we read it: its size, its equations written out, its start, and the constant that is shipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from iapt_export.contract.errors import IaptError
from tests.tiny import padded, tiny_llama, tiny_tokenizer
from tests.trainers.methods_tiny import (
    LENGTHS,
    count,
    greedy_by_hand,
    greedy_tokens,
    last_logits,
    real_rows,
    trained,
)
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import LAMPConfig, PromptTuningConfig
from trainers.methods.lamp import LAMP
from trainers.methods.prompt_tuning import PromptTuning, initial_prompt

FIELDS: dict[str, Any] = {"init_length": 12, "rank": 5, "window": 3}


def lamp(model: Any, seed: int = 0) -> LAMP:
    return trained(LAMP, LAMPConfig(**FIELDS), model, seed)


def prompt_by_hand(method: LAMP) -> np.ndarray:
    """Token by token: each takes up the others as far as they are alike, then windows are averaged."""
    u, q, v = (method.get_parameter(name).detach().double().numpy() for name in ("left", "singular", "right"))
    tokens = [u[i] * q for i in range(len(u))]
    square = sum(float(token @ token) for token in tokens)
    mixed = [token + sum((token @ other) * other for other in tokens) / square for token in tokens]
    rows = [row @ v for row in mixed]
    window = method.config.window
    return np.stack([sum(rows[i : i + window]) / window for i in range(0, len(rows), window)])


def test_parameter_count() -> None:
    """s r + r + r d, which fits the "about 7,000" of a public summary; see docs/methods.md."""
    assert count(LAMP, LAMPConfig(init_length=100, rank=8), Sizes(768, 12)) == 6_952


def test_definition_written_out() -> None:
    method = lamp(tiny_llama())
    prompt = method.soft_prompt(method.weights()).detach()[0]
    assert prompt.shape == (4, 32)
    np.testing.assert_allclose(prompt.numpy(), prompt_by_hand(method), atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_generates_as_the_prompt_before_the_input(side: str) -> None:
    model = tiny_llama()
    method = lamp(model)
    ids, mask = padded(LENGTHS, side)
    prompt = torch.from_numpy(prompt_by_hand(method)).float()
    table = model.get_input_embeddings().weight
    expected = [greedy_by_hand(model, prompt, lambda row, _: table[row], row) for row in real_rows(ids, mask)]
    assert greedy_tokens(model, method, ids, mask) == expected
    assert greedy_tokens(model, method.deployed(), ids, mask) == expected


def test_constant_equals_live() -> None:
    model = tiny_llama()
    method = lamp(model)
    constant = method.deployed()
    ids, mask = padded(LENGTHS)
    assert isinstance(constant, PromptTuning) and constant.config == PromptTuningConfig(prompt_length=4)
    assert torch.equal(last_logits(model, constant, ids, mask), last_logits(model, method, ids, mask))


def test_starts_near_the_averages_of_real_tokens() -> None:
    """The interaction multiplies each kept direction of the decomposed prompt by one to two."""
    model = tiny_llama()
    config = LAMPConfig(**{**FIELDS, "rank": 12})
    method = LAMP(config, sizes_of(model))
    method.start(model, tiny_tokenizer(), [7, 8, 9])
    initial = initial_prompt(config, 12, model, tiny_tokenizer(), [7, 8, 9])
    assert initial is not None
    weights = method.weights()
    rebuilt = (weights["left"][0] * weights["singular"][0]) @ weights["right"][0]
    torch.testing.assert_close(rebuilt, initial, atol=1e-5, rtol=1e-5)
    before = initial.unflatten(0, (4, 3)).mean(dim=1) @ weights["right"][0].T  # [P, R] along each direction
    after = method.soft_prompt(weights)[0] @ weights["right"][0].T
    firm = before.abs() > 1e-4
    ratio = (after / before)[firm].detach()
    assert float(ratio.min()) > 0.99 and float(ratio.max()) < 2.01


def test_random_start_is_of_the_size_it_names() -> None:
    method = LAMP(LAMPConfig(rank=32, init="random"), Sizes(32, 3))
    before = method.get_parameter("left").detach().clone()
    method.start(tiny_llama(), tiny_tokenizer(), [7])
    assert torch.equal(method.get_parameter("left"), before)
    weights = method.weights()
    rebuilt = (weights["left"][0] * weights["singular"][0]) @ weights["right"][0]
    assert float(rebuilt.std()) == pytest.approx(0.02, rel=0.1)


def test_prompt_of_zeros_stays_finite() -> None:
    method = lamp(tiny_llama())
    method.get_parameter("singular").data.zero_()
    method.soft_prompt(method.weights()).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in method.parameters() if parameter.grad is not None)


def test_rank_above_the_width_is_an_error() -> None:
    with pytest.raises(IaptError, match="rank=33 is more than the backbone's hidden width of 32"):
        LAMP(LAMPConfig(rank=33), Sizes(32, 3))
