"""Prefix tuning: against stock PEFT, against a cache filled by hand, and what a prefix starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.tiny import padded, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer
from tests.trainers.methods_tiny import (
    LENGTHS,
    count,
    greedy_tokens,
    last_logits,
    real_rows,
    trained,
)
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import INITIAL_TEXT, PrefixTuningConfig
from trainers.methods.prefix_tuning import PrefixTuning, from_table, initial_prefix, to_table

CONFIG = PrefixTuningConfig(prompt_length=4)
PROJECTED = PrefixTuningConfig(prompt_length=4, projection=True, projection_width=8)
MODELS = [tiny_llama, tiny_qwen3, tiny_gpt2]


def logits_by_hand(model: Any, prefix: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Logits ``[t, V]`` of one row behind a cache that holds the prefix."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix.detach()):
        cache.update(key[None], value[None], layer)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0]


def test_parameter_count_is_the_papers() -> None:
    assert count(PrefixTuning, PrefixTuningConfig(), Sizes(768, 12, 12, 64)) == 2 * 12 * 20 * 768


def test_projection_has_the_tensors_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="needs peft, the library whose network this is")
    sizes = sizes_of(tiny_llama())
    width = sizes.num_kv_heads * sizes.head_dim
    encoder = peft.PrefixEncoder(
        peft.PrefixTuningConfig(
            num_virtual_tokens=4, token_dim=width, num_layers=3, encoder_hidden_size=8, prefix_projection=True
        )
    )
    ours = [tuple(shape) for shape in PrefixTuning.shapes(PROJECTED, sizes).values()]
    assert ours == [tuple(parameter.shape) for parameter in encoder.parameters()]
    method = trained(PrefixTuning, PROJECTED, tiny_llama())
    for theirs, own in zip(encoder.parameters(), method.parameters(), strict=True):
        theirs.data.copy_(own)
    prefix = method.weights()["prefix"]
    torch.testing.assert_close(to_table(prefix), encoder(torch.arange(4)[None]))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_a_cache_that_holds_the_prefix(make: Any, side: str) -> None:
    model = make()
    method = trained(PrefixTuning, CONFIG, model)
    ids, mask = padded(LENGTHS, side)
    got = last_logits(model, method, ids, mask)
    for row, tokens in enumerate(real_rows(ids, mask)):
        expected = logits_by_hand(model, method.get_parameter("prefix"), tokens)[-1]
        torch.testing.assert_close(got[row], expected, atol=1e-4, rtol=1e-4)


def test_generation_goes_on_behind_the_prefix() -> None:
    model = tiny_llama()
    method = trained(PrefixTuning, CONFIG, model)
    ids, mask = padded(LENGTHS, "left")
    got = greedy_tokens(model, method, ids, mask)
    for row, tokens in enumerate(real_rows(ids, mask)):
        for token in got[row]:
            assert token == int(logits_by_hand(model, method.get_parameter("prefix"), tokens)[-1].argmax())
            tokens.append(token)


def test_deployed_is_the_same_function_without_the_network() -> None:
    model = tiny_llama()
    method = trained(PrefixTuning, PROJECTED, model)
    deployed = method.deployed()
    assert list(dict(deployed.named_parameters())) == ["prefix"]
    assert deployed.config == CONFIG
    ids, mask = padded(LENGTHS)
    torch.testing.assert_close(last_logits(model, deployed, ids, mask), last_logits(model, method, ids, mask))
    assert deployed.deployed() is deployed


def test_table_and_prefix_are_each_others_inverse() -> None:
    sizes = Sizes(8, 3, num_kv_heads=2, head_dim=5)
    table = torch.randn(2, 4, 2 * 3 * 2 * 5)
    prefix = from_table(table, sizes)
    assert prefix.shape == (2, 3, 2, 2, 4, 5)
    assert torch.equal(to_table(prefix), table)
    # layer 1, values, head 0, third entry
    assert torch.equal(prefix[0, 1, 1, 0, 2], table[0, 2, 30:35])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("config", [CONFIG, PROJECTED])
def test_starts_as_if_a_real_text_stood_before_the_instruction(make: Any, config: PrefixTuningConfig) -> None:
    model, tokenizer = make(), tiny_tokenizer()
    ids, mask = padded([6])
    method = PrefixTuning(config, sizes_of(model))
    method.start(model, tokenizer, ids[0].tolist())
    text = tokenizer(INITIAL_TEXT, add_special_tokens=False)["input_ids"]
    before = [int(ids[0, 0]), *text[:3]]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([before + ids[0].tolist()])).logits[:, -1]
    torch.testing.assert_close(last_logits(model, method, ids, mask), expected, atol=1e-4, rtol=1e-4)


def test_a_short_text_is_repeated() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    length = 2 * len(tokenizer(INITIAL_TEXT, add_special_tokens=False)["input_ids"])
    assert initial_prefix(length, model, tokenizer, [5]).shape == (3, 2, 2, length, 8)


def test_projection_learns_slower() -> None:
    sizes = sizes_of(tiny_llama())
    assert set(PrefixTuning(PROJECTED, sizes).learning_rate_factors().values()) == {0.1}
    assert PrefixTuning(CONFIG, sizes).learning_rate_factors() == {}
