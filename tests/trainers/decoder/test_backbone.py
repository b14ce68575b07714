"""A checkpoint fills its model, or is refused with the names of the weights that do not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from iapt_export import BuildRequest, build
from iapt_export.contract.errors import IaptError
from tests.tiny import save_tiny_backbone, tiny_llama, tiny_qwen2, tiny_tokenizer
from trainers.decoder.backbone import load_backbone, load_outline, save_backbone
from trainers.decoder.checkpoint import read_warnings

Weights = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {"batch": "2", "sequence": "64", "past": "128", "new_tokens": 4}


def folder_with(folder: Path, change: Callable[[Weights], Any], model: Any = None) -> str:
    """A tiny checkpoint whose weights were changed after it was written."""
    save_tiny_backbone(folder, model)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def refusal(folder: str) -> str:
    with pytest.raises(IaptError) as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_head_is_refused(tmp_path: Path) -> None:
    untied = tiny_qwen2(tie_word_embeddings=False)
    said = refusal(folder_with(tmp_path, lambda weights: weights.pop("lm_head.weight"), untied))
    assert "these are missing and would be drawn at random: lm_head.weight. Download the checkpoint again" in said


def test_a_padding_token_out_of_the_table_is_one_sentence(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(fields | {"pad_token_id": 400}), encoding="utf-8")
    assert "Padding_idx must be within num_embeddings" in refusal(str(folder))


def test_tied_head_is_no_missing_weight(tmp_path: Path) -> None:
    model = load_backbone(str(save_tiny_backbone(tmp_path))).model
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        del weights["model.norm.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        weights["model.layers.1.input_layernorm.weight"] = torch.zeros(31)

    said = refusal(folder_with(tmp_path, change))
    assert "missing and would be drawn at random: model.norm.weight. " in said
    assert "these have no place in the model: model.layers.0.self_attn.q_proj.bias. " in said
    assert "than its configuration says: model.layers.1.input_layernorm.weight [31], expected [32]. " in said


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("num_hidden_layers", 2, "these have no place in the model: model.layers.2.input_layernorm.weight"),
        ("num_hidden_layers", 4, "would be drawn at random: model.layers.3.input_layernorm.weight"),
        ("hidden_size", "big", "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int"),
    ],
)
def test_configuration_of_another_model_is_refused(field: str, value: Any, text: str, tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    assert text in refusal(str(folder))


def test_many_weights_are_counted(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if ".layers.2." in name]:
            del weights[name]

    assert "self_attn.q_proj.weight and 1 more" in refusal(folder_with(tmp_path, change))


def test_broken_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path)
    (folder / "model.safetensors").write_bytes(b"xx")
    assert "is not whole: model.safetensors is 2 bytes long, and its header does not fit" in refusal(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    assert "Error no file named model.safetensors found" in refusal(str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "x"}'),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [{"id": 1, "content": 5}]}'),
        ("tokenizer_config.json", '{"pad_token": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": ["a"]}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_a_broken_tokenizer_is_refused_in_a_sentence(tmp_path: Path, name: str, content: str) -> None:
    """Each of transformers' and tokenizers' own kinds of exceptions, plain ones and panics among them."""
    folder = save_tiny_backbone(tmp_path)
    (folder / name).write_text(content, encoding="utf-8")
    text = refusal(str(folder))
    assert "could not be loaded" in text or f"the tokenizer of {folder} cannot be read" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "generation_config.json is not JSON"),
        ("[]", "generation_config.json holds a list; expected a JSON object"),
        ('{"eos_token_id": "</s>"}', "generation_config.json has eos_token_id='</s>', expected the number of a token"),
        ('{"eos_token_id": [[1]]}', r"generation_config.json has eos_token_id=\[\[1\]\], expected the number of"),
        ('{"eos_token_id": true}', "generation_config.json has eos_token_id=True, expected the number of a token"),
    ],
)
def test_settings_for_generation_that_say_nothing_of_use_are_refused(content: str, words: str, tmp_path: Path) -> None:
    """transformers passes over a broken file, and what ends an answer would be another token."""
    path = save_tiny_backbone(tmp_path) / "generation_config.json"
    path.write_text(content, "utf-8")
    for load in (load_backbone, load_outline):
        with pytest.raises(IaptError, match=words):
            load(str(tmp_path))
    path.write_text('{"eos_token_id": [1, 2]}', "utf-8")
    assert load_backbone(str(tmp_path)).model.generation_config.eos_token_id == [1, 2]
    path.unlink()
    assert load_backbone(str(tmp_path)).model.generation_config.eos_token_id == 1


def test_of_several_chat_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    """Command R has one for tools and one for documents besides."""
    save_tiny_backbone(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    tokenizer = tiny_tokenizer()
    wanted = tokenizer.chat_template
    tokenizer.chat_template = {"default": wanted, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    request = BuildRequest(model=str(tmp_path / "model"), output=tmp_path / "bundle", **SMALL, prove=False)
    build(request)
    assert (tmp_path / "bundle" / "chat_template.jinja").read_text(encoding="utf-8") == wanted
    assert not (tmp_path / "bundle" / "additional_chat_templates").exists()
    assert load_backbone(str(tmp_path / "model")).tokenizer.chat_template == wanted

    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert "has the chat templates tool_use, and none is called default" in refusal(str(tmp_path / "model"))


def test_two_loads_are_equal(tmp_path: Path) -> None:
    folder = str(save_tiny_backbone(tmp_path))
    first, second = (load_backbone(folder).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_warnings_of_the_loader_are_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def untie(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    with caplog.at_level(logging.WARNING):
        load_backbone(str(save_tiny_backbone(tmp_path / "clean")))
        assert not caplog.messages
        load_backbone(folder_with(tmp_path / "other", untie))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("transformers says: The tied weights mapping")


def test_expected_warnings_are_not(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.somewhere")
    with caplog.at_level(logging.WARNING), read_warnings():
        logger.warning("… Using the explicit factor (4.0) in YaRN. …")
        logger.warning("once")
        logger.warning("once")
    assert caplog.messages == ["transformers says: once"]


def test_loading_and_saving_show_no_progress_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_backbone(tmp_path)
    capsys.readouterr()
    save_backbone(load_backbone(str(folder)), tmp_path / "again")
    assert capsys.readouterr() == ("", "")
