"""Directories of stock PEFT that are not served as they are: each reason is named, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from iapt_export.contract.errors import IaptError
from tests.tiny import padded, tiny_gpt2, tiny_llama
from tests.trainers.adapters.test_peft_format import PROMPT, backbone_of, logits, stock, stock_logits
from trainers.adapters.directory import load_adapter
from trainers.adapters.peft_format import adapter_from_peft, from_peft_tensors, to_peft_tensors
from trainers.adapters.peft_forms import TABLE
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import rows_of
from trainers.methods.configs import LoRAConfig, PromptTuningConfig
from trainers.methods.forms import new_method


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
            {"trainable_token_indices": [7]},
            r"trainable_token_indices=\[7\] is not supported; merge it into the backbone with PEFT's merge_and_unload",
        ),
        ({"bias": "all"}, "bias is 'all', expected 'none'; merge it into the backbone"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not supported"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not supported"),
        ({"target_parameters": ["w"]}, r"target_parameters=\['w'\] is not supported"),
        ({"invented_tomorrow": 1}, "invented_tomorrow=1 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected True or False or 'gaussian'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', expected 'CAUSAL_LM'$"),
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
        ({"layers_to_transform": [0, 1, 2]}, "1.self_attn.q_proj"),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}, "1.self_attn.q_proj"),
        ({"target_modules": ["q_proj", "v_proj"]}, "q_proj"),
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
    ("options", "left_out"),
    [
        ({"target_modules": ["up_proj"]}, r"0\.self_attn\.q_proj"),
        ({"exclude_modules": ["v_proj"]}, r"0\.self_attn\.v_proj"),
        ({"layers_to_transform": [0, 1]}, r"2\.self_attn\.q_proj"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, r"0\.self_attn\.q_proj"),
        ({"layers_to_transform": ["0", "1", "2"]}, r"0\.self_attn\.q_proj"),
    ],
)
def test_tensors_that_the_configuration_leaves_out_are_refused(
    options: dict[str, Any], left_out: str, tmp_path: Path
) -> None:
    """PEFT passes over them, so that the same directory would answer otherwise there."""
    with pytest.raises(IaptError, match=rf"its configuration leaves out model\.layers\.{left_out}, of which it has"):
        adapter_from_peft(lora_directory(tmp_path, **options), backbone_of(tiny_llama()))


def test_patterns_that_both_fit_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT saves patterns in alphabetical order: the adapter that is loaded is not the one that was trained, there as
    here (``findings/peft-sorts-overlapping-patterns.sh``).
    """
    patterns = {"self_attn.q_proj": 64, "q_proj": 8}
    theirs = stock(tiny_llama, "LoraConfig", {"r": 4, "target_modules": ["q_proj"], "alpha_pattern": patterns})
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    model = tiny_llama()
    method = adapter_from_peft(tmp_path, backbone_of(model)).module()
    torch.testing.assert_close(logits(model, rows_of(method), [7]), stock_logits(again, [7]), atol=2e-4, rtol=1e-4)
    said = "model.layers.0.self_attn.q_proj: 'q_proj' and 'self_attn.q_proj' of its alpha_pattern fit"
    assert said in caplog.text and caplog.text.count("alphabetical order") == 3, "once a layer"


def test_weights_in_8_bits_are_the_values_that_peft_reads(tmp_path: Path) -> None:
    theirs = stock(tiny_llama, "LoraConfig", {"r": 4, "lora_alpha": 6})
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    model = tiny_llama()
    method = adapter_from_peft(tmp_path, backbone_of(model)).module()
    torch.testing.assert_close(logits(model, rows_of(method), [7]), stock_logits(again, [7]), atol=2e-4, rtol=1e-4)


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
            IaptError, match=r"PEFT's method 'IA3' is not supported; use one of PROMPT_TUNING, P_TUNING, M.*merge_and_u"
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
    for others in (tensors, {}):
        save_file({**others, name: torch.zeros(2, 320)}, folder / "adapter_model.safetensors")
        with pytest.raises(IaptError, match="LoRA of the embeddings is not supported; merge it into the backbone"):
            adapter_from_peft(folder, backbone_of(tiny_llama()))
    name = "base_model.model.lm_head.lora_A.weight"
    save_file({name: torch.zeros(2, 32)}, folder / "adapter_model.safetensors")
    with pytest.raises(
        IaptError, match=r"expected LoRA tensors of linear layers in the decoder.s 3 layers, .* got lm_head"
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
