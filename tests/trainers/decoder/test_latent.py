"""Latent attention (DeepSeek V2 and V3): its cache holds latents and rotary keys, of different widths."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from iapt_export.contract.errors import IaptError
from iapt_export.graphs.interface import Sizing
from tests.bundles import random_method
from tests.families import tiny_family
from tests.tiny import tiny_tokenizer
from trainers.adapters.adapter import AdapterConfig
from trainers.adapters.directory import load_adapter, save_adapter
from trainers.adapters.peft_format import adapter_from_peft
from trainers.decoder.attention import grouped_attention, real_rotations, use_own_attention
from trainers.decoder.backbone import Backbone
from trainers.decoder.generate import prefill
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import rows_of
from trainers.methods.configs import PrefixTuningConfig
from trainers.methods.prefix_tuning import initial_prefix
from validation.sides.peft_side import folders_of

FAMILIES = ["deepseek_v2", "deepseek_v2-lite", "deepseek_v3"]
LENGTH, WIDTHS = 3, (16, 8)
IDS = torch.arange(5, 25)[None]


def as_cache(prefix: Tensor) -> DynamicCache:
    """A prefix ``[L, 2, 1, P, 16]`` as what a stock model finds in its cache."""
    return DynamicCache([(layer[0][None], layer[1][None, ..., : WIDTHS[1]]) for layer in prefix])


def test_what_the_cache_holds() -> None:
    sizes = sizes_of(tiny_family("deepseek_v3"))
    assert (sizes.num_kv_heads, sizes.cache_widths) == (1, WIDTHS)
    shapes = [spec.shape for spec in Sizing([], sizes, "fp32").cache("past_key_values.", "past")]
    assert shapes == [["batch", 1, "past", 16], ["batch", 1, "past", 8]] * 2
    assert sizes_of(tiny_family("llama")).value_dim == 0, "said only where it differs"


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_what_a_stock_model_finds_in_its_cache(family: str, projection: bool) -> None:
    model = tiny_family(family)
    method: Any = random_method(1, PrefixTuningConfig(prompt_length=LENGTH, projection=projection), sizes_of(model))
    prefix = method.deployed().get_parameter("prefix")
    assert prefix.shape == (2, 2, 1, LENGTH, 16)
    stock = tiny_family(family)
    with torch.no_grad():
        wanted = stock(IDS, past_key_values=as_cache(prefix)).logits[0, -1]
        plain = stock(IDS).logits[0, -1]
    use_own_attention(model)
    logits, _ = prefill(model, rows_of(method), IDS, torch.ones_like(IDS))
    largest = wanted.abs().max()
    assert (logits[0] - wanted).abs().max() < 1e-5 * largest < 1e-2 * (plain - wanted).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_real_rotations_are_the_complex_ones(family: str) -> None:
    model = tiny_family(family)
    with torch.no_grad():
        theirs = model(IDS).logits
        with real_rotations(model):
            assert not any(part.is_complex() for part in model.model.rotary_emb(theirs, IDS))
            assert (model(IDS).logits - theirs).abs().max() < 1e-6 * theirs.abs().max()
        assert torch.equal(model(IDS).logits, theirs), "and theirs are back"


def test_exported_attention_is_of_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT takes no other; the zeros beside a value change nothing."""
    query, key, value = torch.randn(2, 4, 5, 24), torch.randn(2, 4, 5, 24), torch.randn(2, 4, 5, 16)
    wanted = F.scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2)
    asked, attend = [], F.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        asked.append({tensor.shape[-1] for tensor in (q, k, v)})
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    made, _ = grouped_attention(torch.nn.Module(), query, key, value, None, 0.3)
    assert asked == [{24}]
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-6)


def test_a_prefix_begins_as_what_a_real_text_leaves_in_the_cache() -> None:
    model, tokenizer = tiny_family("deepseek_v3"), tiny_tokenizer()
    prefix = initial_prefix(LENGTH, model, tokenizer, [7, 8, 9])
    assert torch.equal(prefix[:, 1, ..., WIDTHS[1] :], torch.zeros(2, 1, LENGTH, 8))
    ids = tokenizer("Answer", add_special_tokens=False)["input_ids"]
    assert ids, "the neutral text has tokens"
    first = model(torch.tensor([[7]])).past_key_values.layers[0]
    assert torch.allclose(prefix[0, 0, :, :1], first.keys[0], atol=1e-6)
    assert torch.allclose(prefix[0, 1, :, :1, : WIDTHS[1]], first.values[0], atol=1e-6)


def test_peft_has_no_such_prefix(tmp_path: Path) -> None:
    model = tiny_family("deepseek_v3")
    backbone, sizes = Backbone(model, None, "tiny"), sizes_of(model)
    method = PrefixTuningConfig(prompt_length=LENGTH)
    config = AdapterConfig(
        base_model_name_or_path="tiny", backbone_fingerprint=backbone.fingerprint, method=method, **asdict(sizes)
    )
    tensors = dict(random_method(1, method, sizes).state_dict())
    save_adapter(tmp_path, config, tensors)
    read = load_adapter(tmp_path, backbone)
    assert read.config.value_dim == 8 and torch.equal(read.tensors["prefix"], tensors["prefix"])
    assert folders_of({"prefix": read}) == {}, "so its answer cannot be asked"
    with pytest.raises(IaptError, match="keys and values of one width, and this backbone caches latents of 16 and 8"):
        adapter_from_peft(tmp_path, backbone)
