"""Adapter directories that stock PEFT writes are read here, and ours are read by stock PEFT: same logits both ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from iapt_export.contract.errors import IaptError
from tests.tiny import padded, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_qwen3, tiny_tokenizer
from tests.trainers.methods_tiny import LENGTHS, STEPS, greedy_tokens, trained
from trainers.adapters.adapter import PEFT_TYPES, AdapterConfig
from trainers.adapters.directory import load_adapter, save_adapter
from trainers.adapters.peft_format import (
    FORMS,
    adapter_from_peft,
    from_peft_tensors,
    peft_fields,
    to_peft_tensors,
)
from trainers.adapters.peft_forms import TABLE
from trainers.decoder.backbone import Backbone
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import rows_of
from trainers.methods.configs import METHOD_CONFIGS, LoRAConfig, PrefixTuningConfig, PromptTuningConfig, method_name
from trainers.methods.forms import new_method

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 6}
PROMPT = {"num_virtual_tokens": 4}
FROM_PEFT = [
    pytest.param(tiny_llama, "PromptTuningConfig", PROMPT, id="llama-prompt"),
    pytest.param(tiny_gpt2, "PromptTuningConfig", PROMPT, id="gpt2-prompt"),
    pytest.param(tiny_llama, "PrefixTuningConfig", PROMPT, id="llama-prefix"),
    pytest.param(tiny_qwen3, "PrefixTuningConfig", PROMPT, id="qwen3-prefix"),
    pytest.param(tiny_gpt2, "PrefixTuningConfig", PROMPT, id="gpt2-prefix"),
    pytest.param(tiny_llama, "PrefixTuningConfig", {**PROMPT, "prefix_projection": True}, id="llama-projection"),
    pytest.param(tiny_gpt2, "PrefixTuningConfig", {**PROMPT, "prefix_projection": True}, id="gpt2-projection"),
    pytest.param(tiny_llama, "PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 8}, id="llama-p-tuning"),
    pytest.param(
        tiny_gpt2,
        "PromptEncoderConfig",
        {**PROMPT, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
        id="gpt2-p-tuning-lstm",
    ),
    pytest.param(tiny_llama, "LoraConfig", LORA, id="llama-lora-default"),
    pytest.param(tiny_llama, "LoraConfig", {**LORA, "target_modules": SEVEN}, id="llama-lora-seven"),
    pytest.param(tiny_llama, "LoraConfig", {**LORA, "target_modules": "all-linear"}, id="llama-lora-all-linear"),
    pytest.param(tiny_llama, "LoraConfig", {**LORA, "target_modules": r".*mlp\.(up|down)_proj"}, id="llama-lora-regex"),
    pytest.param(tiny_llama, "LoraConfig", {**LORA, "use_rslora": True}, id="llama-rslora"),
    pytest.param(
        tiny_llama,
        "LoraConfig",
        {
            **LORA,
            "target_modules": SEVEN,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 20, "down_proj": 1},
            "use_rslora": True,
        },
        id="llama-lora-patterns",
    ),
    pytest.param(
        tiny_llama,
        "LoraConfig",
        {**LORA, "layers_to_transform": [0, 2], "exclude_modules": r".*\.2\..*k_proj", "target_modules": SEVEN},
        id="llama-lora-some-layers",
    ),
    pytest.param(
        tiny_llama,
        "LoraConfig",
        {**LORA, "target_modules": ["layers.1.self_attn.q_proj", "up_proj"]},
        id="llama-lora-one-layer-by-name",
    ),
    pytest.param(tiny_gpt2, "LoraConfig", {**LORA, "fan_in_fan_out": True}, id="gpt2-lora-default"),
    pytest.param(
        tiny_gpt2,
        "LoraConfig",
        {**LORA, "fan_in_fan_out": True, "target_modules": ["attn.c_proj", "c_fc"]},
        id="gpt2-lora-one-of-two-c_proj",
    ),
    pytest.param(tiny_qwen2, "LoraConfig", {**LORA, "use_dora": True, "target_modules": SEVEN}, id="qwen2-dora"),
    pytest.param(tiny_gpt2, "LoraConfig", {**LORA, "use_dora": True, "fan_in_fan_out": True}, id="gpt2-dora"),
    pytest.param(
        tiny_llama,
        "LoraConfig",
        {
            **LORA,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "layers_to_transform": [0, 2],
        },
        id="llama-dora-patterns",
    ),
]
OURS = [
    pytest.param(tiny_llama, PromptTuningConfig(prompt_length=4), id="llama-prompt"),
    pytest.param(tiny_gpt2, PromptTuningConfig(prompt_length=4), id="gpt2-prompt"),
    pytest.param(tiny_llama, PrefixTuningConfig(prompt_length=4), id="llama-prefix"),
    pytest.param(tiny_qwen3, PrefixTuningConfig(prompt_length=4), id="qwen3-prefix"),
    pytest.param(tiny_gpt2, PrefixTuningConfig(prompt_length=4), id="gpt2-prefix"),
    pytest.param(
        tiny_llama, PrefixTuningConfig(prompt_length=4, projection=True, projection_width=8), id="llama-projection"
    ),
    pytest.param(tiny_llama, LoRAConfig(rank=4), id="llama-lora"),
    pytest.param(tiny_llama, LoRAConfig(rank=4, rslora=True, target_modules=tuple(SEVEN)), id="llama-rslora-seven"),
    pytest.param(tiny_gpt2, LoRAConfig(rank=4, target_modules=("c_attn", "mlp.c_proj")), id="gpt2-lora"),
]


def stock(make: Any, kind: str, options: dict[str, Any]) -> Any:
    """A tiny model in stock PEFT, every trained weight far from zero."""
    peft = pytest.importorskip("peft", reason="needs peft, whose files these are")
    model = peft.get_peft_model(make(), getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
    source = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "prompt_encoder" in name:
            parameter.data = torch.randn(parameter.shape, generator=source) * 0.3
    return model


def backbone_of(model: Any) -> Backbone:
    return Backbone(model, tiny_tokenizer(chat=False), "tiny")


def logits(model: Any, rows: Any, lengths: list[int]) -> torch.Tensor:
    ids, mask = padded(lengths)
    with torch.no_grad():
        output = read_instruction(model, rows, ids, mask).logits
    return output[:, -mask.shape[1] :][mask == 1]


def stock_logits(model: Any, lengths: list[int]) -> torch.Tensor:
    ids, mask = padded(lengths)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask).logits
    return output[:, -mask.shape[1] :][mask == 1]


def stock_greedy(model: Any, prompt: Sequence[int], steps: int, **options: Any) -> tuple[list[int], torch.Tensor]:
    """The likeliest tokens of a stock model, each from the whole text before it, and their logits ``[steps, V]``.

    PEFT's ``generate`` would do, but loses its prompts with transformers 5.24; see ``findings/``.
    """
    ids, logits = torch.tensor([list(prompt)]), []
    for _ in range(steps):
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[0, -1])
        ids = torch.cat([ids, logits[-1].argmax().reshape(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist(), torch.stack(logits)


def adapter_config(method: Any, sizes: Sizes, base: str = "tiny") -> AdapterConfig:
    return AdapterConfig(
        base_model_name_or_path=base,
        backbone_fingerprint="0",
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab_size,
        linears=FORMS[method_name(method)].linears(method, sizes),
        layers_path=sizes.layers_path,
        method=method,
    )


@pytest.mark.parametrize(("make", "kind", "options"), FROM_PEFT)
def test_what_peft_saved_gives_the_same_logits_and_tokens(
    make: Any, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = stock(make, kind, options)
    theirs.save_pretrained(tmp_path)
    model = make()
    adapter = adapter_from_peft(tmp_path, backbone_of(model))
    assert adapter.config.prompt_format == "plain"
    assert adapter.config.backbone_fingerprint == backbone_of(model).fingerprint
    method = adapter.module()
    torch.testing.assert_close(
        logits(model, rows_of(method), LENGTHS), stock_logits(theirs, LENGTHS), atol=2e-4, rtol=1e-4
    )
    ids, mask = padded([7])
    assert greedy_tokens(model, method, ids, mask)[0] == stock_greedy(theirs, ids[0].tolist(), STEPS)[0]


def test_a_prompt_format_has_to_be_said_where_there_is_a_choice(tmp_path: Path) -> None:
    stock(tiny_llama, "PromptTuningConfig", PROMPT).save_pretrained(tmp_path)
    chat = Backbone(tiny_llama(), tiny_tokenizer(chat=True), "tiny")
    for said in ("chat", "plain"):
        assert load_adapter(tmp_path, chat, peft_prompt_format=said).config.prompt_format == said
    with pytest.raises(IaptError, match=r"has a chat template; give --adapter .*,format=chat .*,format=plain"):
        load_adapter(tmp_path, chat)
    assert load_adapter(tmp_path, backbone_of(tiny_llama())).config.prompt_format == "plain"


def test_a_chat_template_saved_beside_an_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL and LLaMA-Factory save the tokenizer with it: prompts went through it, whatever the backbone has."""
    stock(tiny_llama, "PromptTuningConfig", PROMPT).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.save_pretrained(tmp_path)
    plain, chat = (Backbone(tiny_llama(), tiny_tokenizer(chat=chat), "tiny") for chat in (False, True))
    with pytest.raises(IaptError, match=r"was saved with a chat template, which this backbone's tokenizer lacks; save"):
        load_adapter(tmp_path, plain)
    assert load_adapter(tmp_path, plain, peft_prompt_format="plain").config.prompt_format == "plain"
    assert load_adapter(tmp_path, chat, peft_prompt_format="chat").config.prompt_format == "chat"
    assert "another chat template" not in caplog.text
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    assert load_adapter(tmp_path, chat, peft_prompt_format="chat").config.prompt_format == "chat"
    assert f"{tmp_path} was saved with another chat template than the backbone's" in caplog.text


def test_a_chat_format_needs_a_chat_template(tmp_path: Path) -> None:
    stock(tiny_llama, "PromptTuningConfig", PROMPT).save_pretrained(tmp_path)
    plain = Backbone(tiny_llama(), tiny_tokenizer(chat=False), "tiny")
    with pytest.raises(IaptError, match="prompt_format=chat needs a tokenizer with a chat template"):
        load_adapter(tmp_path, plain, peft_prompt_format="chat")


@pytest.mark.parametrize(("make", "method"), OURS)
def test_what_we_save_gives_the_same_logits_in_peft(make: Any, method: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, which is to read our files")
    model = make()
    module = trained(type(new_method(method, sizes_of(model))), method, model)
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    save_adapter(tmp_path, adapter_config(method, sizes_of(model)), tensors)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(
        stock_logits(theirs, LENGTHS), logits(model, rows_of(module), LENGTHS), atol=2e-4, rtol=1e-4
    )
    again = load_adapter(tmp_path)
    assert again.config.method == method
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())


def test_peft_needs_no_field_that_we_leave_out(tmp_path: Path) -> None:
    """The two files as `peft_fields` and `to_peft_tensors` alone make them."""
    peft = pytest.importorskip("peft", reason="needs peft, which is to read our files")
    model = tiny_llama()
    for number, method in enumerate((PromptTuningConfig(), PrefixTuningConfig(), LoRAConfig())):
        folder = tmp_path / str(number)
        folder.mkdir()
        module = trained(type(new_method(method, sizes_of(model))), method, model)
        config = adapter_config(method, sizes_of(model))
        fields = {"peft_type": config.peft_type, "task_type": "CAUSAL_LM", **peft_fields(method, config.sizes)}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
        save_file(to_peft_tensors(method, tensors, config.sizes), folder / "adapter_model.safetensors")
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()
        torch.testing.assert_close(
            stock_logits(theirs, LENGTHS), logits(model, rows_of(module), LENGTHS), atol=2e-4, rtol=1e-4
        )


def test_target_modules_are_short_where_last_names_say_it(tmp_path: Path) -> None:
    cases = [
        (tiny_llama, {"target_modules": "all-linear"}, tuple(SEVEN)),
        (tiny_gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}, ("attn.c_proj",)),
        (tiny_gpt2, {"target_modules": ["c_proj"], "fan_in_fan_out": True}, ("c_proj",)),
    ]
    for number, (make, options, expected) in enumerate(cases):
        stock(make, "LoraConfig", options).save_pretrained(tmp_path / str(number))
        adapter = adapter_from_peft(tmp_path / str(number), backbone_of(make()))
        assert adapter.config.method.target_modules == expected
        assert tuple(adapter.config.linears) == adapter.module().linear_names


def test_half_precision_files_become_fp32() -> None:
    method, sizes = PromptTuningConfig(prompt_length=4), sizes_of(tiny_llama())
    got = from_peft_tensors(method, {TABLE: torch.ones(4, 32, dtype=torch.bfloat16)}, sizes)
    assert got["prompt"].dtype == torch.float32


def test_the_methods_that_peft_reads_are_named_where_torch_is_not_needed() -> None:
    assert set(PEFT_TYPES) == FORMS.keys() & METHOD_CONFIGS.keys()
