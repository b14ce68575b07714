"""Adapter directories that stock PEFT writes are read here, and ours are read by stock PEFT: same logits both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from iapt_export.contract.errors import IaptError
from tests.tiny import padded, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer
from tests.trainers.methods_tiny import LENGTHS, STEPS, greedy_tokens, trained
from trainers.adapters.adapter import AdapterConfig
from trainers.adapters.directory import load_adapter, save_adapter
from trainers.adapters.peft_format import (
    adapter_from_peft,
    from_peft_tensors,
    peft_fields,
    to_peft_tensors,
)
from trainers.adapters.peft_forms import FORMS, TABLE
from trainers.decoder.backbone import Backbone
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import Sizes, rows_of
from trainers.methods.configs import LoRAConfig, PrefixTuningConfig, PromptTuningConfig, method_name
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
    return Backbone(model, tiny_tokenizer(), "tiny")


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
    expected = theirs.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    assert greedy_tokens(model, method, ids, mask)[0] == expected[0, -STEPS:].tolist()


def test_a_chat_format_needs_a_chat_template(tmp_path: Path) -> None:
    stock(tiny_llama, "PromptTuningConfig", PROMPT).save_pretrained(tmp_path)
    chat = Backbone(tiny_llama(), tiny_tokenizer(chat=True), "tiny")
    assert load_adapter(tmp_path, chat, peft_prompt_format="chat").config.prompt_format == "chat"
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


def directory(folder: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A directory as stock PEFT writes it, without PEFT."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora_directory(folder: Path, **options: Any) -> Path:
    sizes = sizes_of(tiny_llama())
    module = new_method(LoRAConfig(rank=2), sizes)
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options}
    return directory(folder, fields, to_peft_tensors(LoRAConfig(rank=2), tensors, sizes))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"use_dora": True},
            r"use_dora=True is not supported; merge it into the backbone with PEFT's merge_and_unload",
        ),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not supported"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not supported"),
        ({"target_parameters": ["w"]}, r"target_parameters=\['w'\] is not supported"),
        ({"invented_tomorrow": 1}, "invented_tomorrow=1 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected True or False or 'gaussian'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', expected 'CAUSAL_LM'"),
    ],
)
def test_unsupported_lora_options_are_named(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = lora_directory(tmp_path, **options)
    with pytest.raises(IaptError, match=rf"PEFT's LORA cannot be served as it is: .*{words}"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("PROMPT_TUNING", {"num_transformer_submodules": 2}, "num_transformer_submodules is 2, expected 1"),
        ("PROMPT_TUNING", {"token_dim": 64}, "token_dim is 64, expected 32"),
        ("PROMPT_TUNING", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("PREFIX_TUNING", {"num_layers": 4}, "num_layers is 4, expected 3"),
        ("PREFIX_TUNING", {"token_dim": 32}, "token_dim is 32, expected 16"),
        ("PREFIX_TUNING", {"num_attention_heads": 4}, "num_attention_heads is 4, expected 2"),
    ],
)
def test_unfitting_prompt_options_are_named(kind: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    fields = {"peft_type": kind, "num_virtual_tokens": 4, **options}
    folder = directory(tmp_path, fields, {TABLE: torch.zeros(4, 32)})
    with pytest.raises(IaptError, match=f"PEFT's {kind} cannot be served as it is: .*{words}"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


def test_a_task_of_a_multitask_prompt(tmp_path: Path) -> None:
    theirs = stock(tiny_llama, "MultitaskPromptTuningConfig", {**PROMPT, "num_tasks": 3, "num_ranks": 2})
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    ids, mask = padded([7])
    answers = []
    for task in range(3):
        method = adapter_from_peft(tmp_path, backbone_of(model), task=task).module()
        with torch.no_grad():
            wanted = theirs(input_ids=ids, attention_mask=mask, task_ids=torch.tensor([task])).logits
        answers.append(logits(model, rows_of(method), [7]))
        torch.testing.assert_close(answers[-1], wanted[:, -7:][mask == 1], atol=2e-4, rtol=1e-4)
    assert not torch.allclose(answers[0], answers[2])
    for task, words in ((None, "holds prompts for 3 tasks; say which one .* PATH,task=0"), (3, "task=3 is not one of")):
        with pytest.raises(IaptError, match=words):
            adapter_from_peft(tmp_path, backbone_of(model), task=task)
    with pytest.raises(IaptError, match="task=1 is for PEFT's MULTITASK_PROMPT_TUNING; this is LORA"):
        adapter_from_peft(lora_directory(tmp_path / "lora"), backbone_of(model), task=1)


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "0.self_attn.q_proj"),
        ({"target_modules": r".*\.(q|v)_proj"}, "2.self_attn.v_proj"),
        ({"layers_to_transform": [1, 2]}, "1.self_attn.q_proj"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, "1.self_attn.q_proj"),
    ],
)
def test_a_file_that_lacks_a_layer_is_refused(options: dict[str, Any], lost: str, tmp_path: Path) -> None:
    """Layers may be left out only where the configuration says so."""
    folder = lora_directory(tmp_path, **options)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if lost not in name}, path)
    with pytest.raises(IaptError, match=f"{lost}.lora_A.weight is missing"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": 5},
        {"target_modules": "(q_proj"},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"(q_proj": 3}},
        {"layers_to_transform": "first"},
    ],
)
def test_a_selection_of_layers_that_makes_no_sense_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    folder = lora_directory(tmp_path, **options)
    with pytest.raises(IaptError, match="which layers it changes, or their ranks, cannot be read"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


def test_a_rank_that_the_configuration_does_not_say_is_refused(tmp_path: Path) -> None:
    folder = lora_directory(tmp_path, rank_pattern={"v_proj": 4})
    with pytest.raises(IaptError, match=r"v_proj.lora_A.weight has shape \(2, 32\), expected \(4, 32\)"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


def test_other_methods_of_peft(tmp_path: Path) -> None:
    folder = directory(tmp_path, {"peft_type": "IA3"}, {"x": torch.zeros(1)})
    for load in (adapter_from_peft, load_adapter):
        with pytest.raises(
            IaptError, match="PEFT's method 'IA3' is not supported; use one of PROMPT_TUNING, P_TUNING, M"
        ):
            load(folder, backbone_of(tiny_llama()))


def test_missing_number_of_tokens(tmp_path: Path) -> None:
    folder = directory(tmp_path, {"peft_type": "PROMPT_TUNING"}, {TABLE: torch.zeros(4, 32)})
    with pytest.raises(IaptError, match="prompt_length=None is not an integer"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = lora_directory(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(IaptError, match=r"adapter_model.bin is not read, because unpickling runs code"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


def test_lora_of_another_backbone(tmp_path: Path) -> None:
    folder = lora_directory(tmp_path)
    with pytest.raises(IaptError, match=r"which are attn.c_attn, .* got self_attn.q_proj, self_attn.v_proj. Give"):
        adapter_from_peft(folder, backbone_of(tiny_gpt2()))
    with pytest.raises(IaptError, match=r"q_proj.lora_A.weight has shape \(2, 32\), expected \(2, 16\); .*more$"):
        adapter_from_peft(folder, backbone_of(tiny_llama(hidden_size=16)))
    with pytest.raises(IaptError, match=r"layers\.3\.self_attn\.q_proj\.lora_A\.weight is missing"):
        adapter_from_peft(folder, backbone_of(tiny_llama(num_hidden_layers=4)))


def test_lora_on_the_embeddings(tmp_path: Path) -> None:
    folder = lora_directory(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file({**tensors, name: torch.zeros(2, 320)}, folder / "adapter_model.safetensors")
    with pytest.raises(IaptError, match=f"tensor {name} is not part of the method"):
        adapter_from_peft(folder, backbone_of(tiny_llama()))
    save_file({name: torch.zeros(2, 320)}, folder / "adapter_model.safetensors")
    with pytest.raises(
        IaptError, match=f"expected LoRA tensors of linear layers in the decoder.s 3 layers, .* got {name}"
    ):
        adapter_from_peft(folder, backbone_of(tiny_llama()))


def test_bad_tensors_are_named() -> None:
    method, sizes = PromptTuningConfig(prompt_length=4), sizes_of(tiny_llama())
    good = torch.zeros(4, 32)
    cases = [
        ({}, "tensor prompt_embeddings is missing"),
        ({TABLE: good, "x": good}, "tensor x is not part of the method"),
        ({TABLE: good[:3]}, r"has shape \(3, 32\), expected \(4, 32\)"),
        ({TABLE: good.long()}, "has type torch.int64, expected a floating type"),
        ({TABLE: good + float("nan")}, "holds NaN or infinity; train the adapter again"),
    ]
    for tensors, words in cases:
        with pytest.raises(IaptError, match=f"here: the tensors do not fit the configuration .*{words}"):
            from_peft_tensors(method, tensors, sizes, "here")


def test_half_precision_files_become_fp32() -> None:
    method, sizes = PromptTuningConfig(prompt_length=4), sizes_of(tiny_llama())
    got = from_peft_tensors(method, {TABLE: torch.ones(4, 32, dtype=torch.bfloat16)}, sizes)
    assert got["prompt"].dtype == torch.float32
