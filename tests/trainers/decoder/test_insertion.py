"""Prompts inside real architectures: equal under padding, blind to the response, and equal to K/V prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from iapt_export.contract.errors import IaptError
from tests.tiny import ARCHITECTURES, padded, tiny_llama
from trainers.decoder.generate import decode, greedy, prefill
from trainers.decoder.insertion import decoder_layers, last_token, positions, read_instruction, sizes_of
from trainers.decoder.method import Method, Rows, rows_of
from trainers.methods.configs import METHOD_CONFIGS, IAPTConfig
from trainers.methods.forms import new_method
from trainers.methods.iapt import IAPT

LENGTHS = [4, 9, 6]
PROMPTS = 4


def generator(model: Any, cls: type[IAPT] = IAPT, **fields: Any) -> IAPT:
    torch.manual_seed(5)
    config = IAPTConfig(**{"bottleneck": 8, "prompt_length": PROMPTS, **fields})
    module = cls(config, sizes_of(model))
    with torch.no_grad():
        module.up_weight *= 20  # prompts that differ visibly from row to row
        if config.pooling == "attention":
            module.query *= 20
    return module.eval().requires_grad_(False)


def any_method(model: Any, name: str) -> Method:
    """A method of that name, far from where it starts."""
    if name == "IAPT":
        return generator(model)
    torch.manual_seed(5)
    fields = {"target_modules": ("c_attn", "c_fc")} if name == "LORA" and model.config.model_type == "gpt2" else {}
    module = new_method(METHOD_CONFIGS[name](**fields), sizes_of(model))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_padding_side_does_not_matter(name: str, method: str) -> None:
    model = ARCHITECTURES[name]()
    rows = rows_of(any_method(model, method))
    results = {side: prefill(model, rows, *padded(LENGTHS, side))[0] for side in ("right", "left")}
    assert torch.allclose(results["right"], results["left"], atol=1e-4)
    ids, mask = padded(LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone = prefill(model, rows, ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
        assert torch.allclose(results["right"][row], alone[0], atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_methods_matter(name: str, method: str) -> None:
    model = ARCHITECTURES[name]()
    changed = prefill(model, rows_of(any_method(model, method)), *padded(LENGTHS))[0]
    assert (changed - prefill(model, Rows(), *padded(LENGTHS))[0]).abs().max() > 0.1
    for module in model.modules():  # nothing is left behind
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_no_rows_are_the_plain_backbone(name: str, side: str) -> None:
    model = ARCHITECTURES[name]()
    ids, mask = padded(LENGTHS, side)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert torch.equal(read_instruction(model, rows_of(None), ids, mask).logits, plain)
    logits, cache = prefill(model, Rows(), ids, mask)
    assert torch.allclose(logits, plain[torch.arange(3), last_token(mask)], atol=1e-4)
    full = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    whole = model(
        input_ids=torch.cat([ids, torch.tensor([[7], [8], [9]])], dim=1),
        attention_mask=full,
        position_ids=positions(full),
    ).logits[:, -1]
    assert torch.allclose(decode(model, Rows(), torch.tensor([7, 8, 9]), full, cache), whole, atol=1e-4)


class Watched(IAPT):
    """Notes what it is asked and what it answers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self.made: list[Tensor] = []

    def slots(self, weights: Any, layer: int, slots: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        self.asked.append((layer, tuple(slots.shape), tuple(tokens.shape)))
        self.made.append(super().slots(weights, layer, slots, tokens, mask))
        return self.made[-1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_asks_for_its_own_prompts(name: str) -> None:
    model = ARCHITECTURES[name]()
    method = generator(model, Watched)
    prefill(model, rows_of(method), *padded(LENGTHS))
    assert method.asked == [(layer, (3, PROMPTS, 32), (3, 9, 32)) for layer in range(3)]
    assert not any(module._forward_pre_hooks for module in model.modules())  # nothing is left behind


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_decoding_agrees_with_reading_it_all(name: str, method: str) -> None:
    """A cached step after prefill equals a pass over prompt, instruction and new token at once."""
    model = ARCHITECTURES[name]()
    rows = rows_of(any_method(model, method))
    ids, mask = padded(LENGTHS)
    _, cache = prefill(model, rows, ids, mask)
    token = torch.tensor([7, 8, 9])
    ones = mask.new_ones(3, 1)
    step = decode(model, rows, token, torch.cat([rows.slot_mask(mask), mask, ones], dim=1), cache)
    whole = read_instruction(
        model,
        rows,
        torch.cat([ids, token[:, None]], dim=1),
        torch.cat([mask, ones], dim=1),
        instruction_mask=torch.cat([mask, 0 * ones], dim=1),
    ).logits[:, -1]
    assert torch.allclose(step, whole, atol=1e-4)


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_prompts_do_not_see_the_response(pooling: str) -> None:
    model = tiny_llama()
    seen: dict[str, list[Tensor]] = {}
    ids, mask = padded([8, 8])
    instruction = mask.clone()
    instruction[:, 5:] = 0
    logits = {}
    for name in ("a", "b"):
        method = generator(model, Watched, pooling=pooling)
        logits[name] = read_instruction(model, rows_of(method), ids, mask, instruction_mask=instruction).logits
        seen[name] = method.made
        ids = ids.clone()
        ids[:, 5:] = (ids[:, 5:] + 11) % 300 + 2  # another response for the second pass
    assert len(seen["a"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen["a"], seen["b"], strict=True))
    assert torch.allclose(logits["a"][:, : PROMPTS + 5], logits["b"][:, : PROMPTS + 5], atol=1e-5)


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_no_method_sees_the_response(method: str) -> None:
    """Logits up to the end of the instruction do not depend on what follows it."""
    model = tiny_llama()
    rows = rows_of(any_method(model, method))
    ids, mask = padded([8, 8])
    instruction = mask.clone()
    instruction[:, 5:] = 0
    other = ids.clone()
    other[:, 5:] = (ids[:, 5:] + 11) % 300 + 2
    one, two = (read_instruction(model, rows, t, mask, instruction_mask=instruction).logits for t in (ids, other))
    end = rows.num_slots + 5
    assert torch.allclose(one[:, :end], two[:, :end], atol=1e-5)
    assert (one[:, end:] - two[:, end:]).abs().max() > 0.1


def kv_prefix_logits(model: Any, module: IAPT, ids: Tensor, mask: Tensor) -> Tensor:
    """The second implementation of insertion, for Llama: no prompt row passes through any layer.

    Layer l's prompts only act through their keys and values, K_p = RoPE(norm1(p) W_k) at positions 0..P-1 and
    V_p = norm1(p) W_v, which stand in front of the tokens' own. The layer is written out here on its parts.
    """
    inner, config = model.model, model.config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, inner.layers[0].self_attn.head_dim
    batch, length = ids.shape
    full = torch.cat([mask.new_ones(batch, PROMPTS), mask], dim=1)  # [B, P+T]
    place = positions(full)
    hidden = inner.embed_tokens(ids)
    cos, sin = inner.rotary_emb(hidden, place)
    causal = torch.ones(length, PROMPTS + length).tril(PROMPTS).bool()[None] & full[:, None, :].bool()  # [B, T, P+T]
    for layer, block in enumerate(inner.layers):
        prompts = module.slots(module.weights(), layer, hidden.new_zeros(batch, PROMPTS, 32), hidden, mask)
        normed, prefix = block.input_layernorm(hidden), block.input_layernorm(prompts)
        attention = block.self_attn
        q = attention.q_proj(normed).view(batch, length, heads, width).transpose(1, 2)
        k, v = (
            torch.cat([project(prefix), project(normed)], dim=1)
            .view(batch, PROMPTS + length, kv_heads, width)
            .transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        q, _ = apply_rotary_pos_emb(q, q, cos[:, PROMPTS:], sin[:, PROMPTS:])
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
        k, v = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (k, v))
        scores = (q @ k.transpose(2, 3)) / width**0.5
        weights = scores.masked_fill(~causal[:, None], -1e30).softmax(dim=-1)
        hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, heads * width))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sharing", ["all", "none"])
def test_concatenation_equals_kv_prefix(side: str, sharing: str) -> None:
    model = tiny_llama()
    module = generator(model, sharing=sharing)
    ids, mask = padded(LENGTHS, side)
    concatenated = read_instruction(model, rows_of(module), ids, mask).logits[:, PROMPTS:]
    prefixed = kv_prefix_logits(model, module, ids, mask)
    real = mask.bool()
    assert torch.allclose(concatenated[real], prefixed[real], atol=2e-4)
    # The comparison means something: other positions for the prompts give other logits.
    wrong = torch.cat([torch.zeros(3, PROMPTS), torch.ones(3, ids.shape[1])], dim=1).long()
    assert (model(input_ids=ids, attention_mask=wrong[:, PROMPTS:]).logits[real] - prefixed[real]).abs().max() > 0.1


def test_logits_of_chosen_places_only() -> None:
    model = tiny_llama()
    ids, mask = padded(LENGTHS)
    method = rows_of(generator(model))
    whole = read_instruction(model, method, ids, mask).logits
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([3, 4, 5])
    some = read_instruction(model, method, ids, mask, select=lambda hidden: hidden[rows, columns]).logits
    assert torch.allclose(some, whole[rows, columns], atol=1e-5)


def test_greedy_stops_per_row_and_reports_margins() -> None:
    model = tiny_llama()
    method = rows_of(generator(model))
    ids, mask = padded(LENGTHS)
    tokens, margins = greedy(model, method, ids, mask, max_new_tokens=6)
    assert [len(row) for row in tokens] == [6, 6, 6] == [len(row) for row in margins]
    assert all(margin >= 0 for row in margins for margin in row)
    stop = tokens[0][1]
    stopped, _ = greedy(model, method, ids, mask, max_new_tokens=6, eos_token_ids=(stop,))
    assert stopped[0] == tokens[0][: tokens[0].index(stop) + 1]
    for row in (1, 2):
        end = tokens[row].index(stop) + 1 if stop in tokens[row] else 6
        assert stopped[row] == tokens[row][:end]


def test_cache_holds_prompts_first() -> None:
    model = tiny_llama()
    _, cache = prefill(model, rows_of(generator(model)), *padded(LENGTHS))
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == PROMPTS + max(LENGTHS)


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]])
    assert positions(mask).tolist() == [[0, 1, 1, 2, 3], [0, 1, 2, 2, 2]]
    assert last_token(mask).tolist() == [4, 2]


def test_backbone_without_a_list_of_layers() -> None:
    class Odd(nn.Module):
        config = tiny_llama().config

    with pytest.raises(IaptError, match="no list of 3 decoder layers was found in Odd"):
        decoder_layers(Odd())
