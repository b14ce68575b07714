"""Families against the outside truth: stock transformers for the plain backbone, stock PEFT for a soft prompt."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BlenderbotConfig,
    BltConfig,
    Gemma3TextConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from iapt_export.contract.errors import IaptError
from tests.families import FAMILIES, IN_PLACE, REFUSED, tiny_family
from tests.thorough import default_for
from trainers.decoder.attention import read_options, use_own_attention
from trainers.decoder.family import _Computation, cache_argument, check_family, family_of
from trainers.decoder.generate import greedy, prefill
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import rows_of
from trainers.methods.configs import IAPTConfig, LoRAConfig, PrefixTuningConfig, PromptTuningConfig
from trainers.methods.forms import new_method

SUPPORTED = [name for name, (expected, *_) in FAMILIES.items() if expected != REFUSED]
COMMON = {"llama", "mistral", "qwen3", "qwen3_moe", "gemma3_text", "gpt2", "phi3", "granite", "deepseek_v3", "opt"}
"""Families whose answers the default run compares."""
TRAINED = (IAPTConfig(), PromptTuningConfig(), PrefixTuningConfig(), LoRAConfig())
LONG = torch.arange(5, 25)[None]
SHORT = LONG[:, :3]
REASONS = {
    "llama-dynamic": "dynamic NTK",
    "opt-350m-like": "32 wide and its layers 64",
    "gpt_neo": "attends by itself",
    "doge": "for rows of one length alone",
    "lfm2": "other state than keys and values (conv)",
    "mamba": "other state than keys and values",
    "falcon_h1": "other state than keys and values",
    "bamba": "other state than keys and values",
    "rwkv": "other state than keys and values",
    "mamba2": "other state than keys and values",
    "granitemoehybrid": "other state than keys and values",
    "jamba": "other state than keys and values",
    "qwen3_next": "other state than keys and values (linear_attention)",
    "recurrent_gemma": "other state than keys and values",
    "zamba2": "other state than keys and values",
    "gemma3n_text": "4 layers share 2 caches",
    "llama4_text": "it computes with complex numbers",
    "jetmoe": "its code cannot be followed without data",
    "mpt": "attends by itself",
    "xglm": "attends by itself",
}


def soft_prompt(model: Any) -> Any:
    method = new_method(PromptTuningConfig(prompt_length=4), sizes_of(model)).eval()
    method.get_parameter("prompt").data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return method


@torch.no_grad()
def answer_of_peft(name: str, prompt: torch.Tensor) -> torch.Tensor:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt))
    model = peft.get_peft_model(tiny_family(name), config).eval()
    model.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return model(input_ids=LONG, attention_mask=torch.ones_like(LONG)).logits[0, -1]


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", default_for(lambda name: name in COMMON or name in REASONS, FAMILIES))
def test_the_verdict_on_a_family(name):
    expected, *_ = FAMILIES[name]
    family = family_of(tiny_family(name))
    assert (REFUSED if family.refusal else IN_PLACE if family.in_place else "portable") == expected
    assert REASONS.get(name, "") in family.refusal


def tokens_agree(name: str) -> bool:
    """Whether the plain backbone's greedy tokens are those of stock transformers."""
    fed = {"attention_mask": torch.ones_like(LONG), "pad_token_id": 1, "eos_token_id": None}
    stock = tiny_family(name).generate(LONG, max_new_tokens=8, min_new_tokens=8, do_sample=False, **fed)
    model = tiny_family(name)
    use_own_attention(model)
    tokens, _ = greedy(model, rows_of(None), LONG, torch.ones_like(LONG), max_new_tokens=8)
    return tokens[0] == stock[0, LONG.shape[1] :].tolist()


def error_to_peft(name: str) -> float:
    """Difference of the last logits behind a soft prompt, relative to the largest."""
    model = tiny_family(name)
    use_own_attention(model)
    method = soft_prompt(model)
    logits, _ = prefill(model, rows_of(method), LONG, torch.ones_like(LONG))
    return difference(logits[0], answer_of_peft(name, method.get_parameter("prompt").data))


def error_beside_a_long_row(name: str) -> float:
    """The same for a short row that padding separates from its prompt; a window must not count the hole."""
    model = tiny_family(name)
    use_own_attention(model)
    rows = rows_of(soft_prompt(model))
    alone, _ = prefill(model, rows, SHORT, torch.ones_like(SHORT))
    missing = LONG.shape[1] - SHORT.shape[1]
    ids = torch.cat([torch.cat([torch.ones(1, missing).long(), SHORT], dim=1), LONG])
    mask = torch.ones_like(ids)
    mask[0, :missing] = 0
    together, _ = prefill(model, rows, ids, mask)
    return difference(together[0], alone[0])


@pytest.mark.parametrize("name", default_for(COMMON.__contains__, SUPPORTED))
def test_answers_are_those_of_transformers_and_peft(name):
    assert tokens_agree(name)
    assert error_to_peft(name) < 1e-5
    assert error_beside_a_long_row(name) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_family_can_be_trained_for(name, kind):
    """A loss on two rows, one padded, reaches every tensor that is trained; a LoRA's A comes after its B."""
    model = tiny_family(name).requires_grad_(False).train()
    use_own_attention(model)
    sizes = sizes_of(model)
    if isinstance(kind, LoRAConfig):
        kind = LoRAConfig(rank=2, target_modules=tuple({linear.rpartition(".")[2] for linear in sizes.linears}))
    method = new_method(kind, sizes).train()
    ids, mask = LONG.repeat(2, 1), torch.ones(2, LONG.shape[1], dtype=torch.int64)
    mask[0, :7] = 0
    logits = read_instruction(model, rows_of(method), ids, mask).logits[:, -1]
    torch.nn.functional.cross_entropy(logits, torch.tensor([3, 4])).backward()
    gradients = {path: parameter.grad for path, parameter in method.named_parameters() if not path.endswith("__A")}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for gradient in gradients.values())


def test_a_model_is_given_its_cache_by_the_name_that_its_code_has():
    """transformers 5.24 renamed it; a checkpoint's own code keeps what it has."""

    class Older(torch.nn.Module):
        def forward(self, input_ids=None, past_key_values=None): ...

    class Newer(torch.nn.Module):
        def forward(self, input_ids=None, cache=None, **kwargs): ...

    assert cache_argument(Older(), 1) == {"past_key_values": 1}
    assert cache_argument(Newer(), 1) == {"cache": 1}


def test_positions_count_as_read_where_they_are_indices():
    """As CodeGen's code has it since transformers 5.24."""
    positions = torch.arange(3, device="meta")
    computation, table = _Computation(positions), torch.empty(8, 2, device="meta")
    with computation:
        _ = table[torch.arange(3, device="meta")]
    assert not computation.uses_positions
    with computation:
        _ = table[positions]
    assert computation.uses_positions


def test_the_refusal_names_model_and_reason():
    with pytest.raises(IaptError, match=r"models/mamba is not supported: its layers keep other state"):
        check_family(tiny_family("mamba"), "models/mamba")


def test_an_encoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=64))
    assert "it is an encoder and a decoder" in family_of(model).refusal


def small(kind: Any, **fields: Any) -> Any:
    """A model of a family that is in no table."""
    config = kind(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: small(BertConfig, intermediate_size=96), "it attends in both directions (is_decoder is off?)"),
        (
            lambda: small(BlenderbotConfig, d_model=64, decoder_layers=2, decoder_attention_heads=4, encoder_layers=2),
            "its code takes no positions, so it would count the padding beside a row as tokens",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(BltConfig()),
            "it has no table of embeddings for its tokens: 'BltConfig' object has no attribute 'hidden_size'",
        ),
    ],
)
def test_families_that_are_in_no_table_are_refused_in_words(make, reason):
    with torch.device("meta"):
        model = make()
    assert reason in family_of(model).refusal


def test_a_decoder_without_layers_is_refused():
    with torch.device("meta"):
        model = small(LlamaConfig, intermediate_size=96)
        model.config.num_hidden_layers = 0
    assert family_of(model).refusal == "its configuration says that it has no layers"


def test_longrope_in_some_layers_alone_is_refused():
    """Its factors are kept where all layers have them; here PyTorch's would follow the longest row."""
    plain = {"rope_type": "default", "rope_theta": 100.0}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    long |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    fields = {"head_dim": 16, "intermediate_size": 96, "num_key_value_heads": 1, "sliding_window": 8}
    fields["layer_types"] = ["sliding_attention", "full_attention"]
    model = small(Gemma3TextConfig, **fields, rope_parameters={"full_attention": long, "sliding_attention": plain})
    assert "(longrope) in some kinds of layers, and not in others" in family_of(model).refusal


def test_longrope_keeps_the_factors_of_the_original_length():
    family = family_of(tiny_family("phi3-longrope"))
    assert family.max_positions == 32
    assert family.restrictions == ("rotary factors are those of up to 32 positions (longrope): a row may have no more",)


def test_what_attention_does_not_know_is_refused_by_name():
    module = torch.nn.Identity()
    with pytest.raises(IaptError, match="Identity asks its attention for position_bias, which is not carried out"):
        read_options(module, {"position_bias": torch.zeros(1), "dropout": 0.0, "head_mask": None})
    with pytest.raises(IaptError, match="attends in both directions"):
        read_options(module, {"is_causal": False})
    options = read_options(module, {"sliding_window": 8, "softcap": 5.0, "position_ids": torch.zeros(1)})
    assert (options.window, options.softcap, options.sinks) == (8, 5.0, None)
