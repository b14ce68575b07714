"""A family is refused from its configuration alone: before, and without, any weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, T5Config, ViTConfig

from iapt_export.contract.errors import IaptError
from tests.bundles import run
from tests.families import FAMILIES, REFUSED, tiny_family
from tests.tiny import save_tiny_backbone, tiny_llama
from tests.trainers.decoder.gguf_files import TinyFile, write
from trainers.decoder.backbone import load_backbone, load_outline
from trainers.decoder.family import family_of

REFUSED_NAMES = [name for name, (expected, *_) in FAMILIES.items() if expected == REFUSED]


def save_config(folder: Path, config: Any) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_a_refused_family_needs_no_weights_to_be_refused(name: str, tmp_path: Path) -> None:
    model = tiny_family(name)
    folder = save_config(tmp_path / name, model.config)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    with pytest.raises(IaptError) as caught:
        load_backbone(str(folder))
    assert str(caught.value) == f"{folder} is not supported: {family_of(model).refusal}"


def test_train_and_build_refuse_it_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    folder = save_config(tmp_path / "model", tiny_family("lfm2").config)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}", "completion": "yes"}}\n' for i in range(20)), encoding="utf-8")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    monkeypatch.setattr("trainers.decoder.backbone.gguf_state_dict", never)
    for argv in (
        ("train", f"--data={data}", f"--output={tmp_path / 'adapter'}"),
        ("build", f"--output={tmp_path / 'bundle'}"),
    ):
        outcome = run(*argv, f"--model={folder}")
        assert outcome.code == 1 and "is not supported: its layers keep other state than keys" in outcome.err
        assert not (tmp_path / "adapter").exists() and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (T5Config(num_layers=1), "is not supported: it is an encoder and a decoder; only decoders are"),
        (ViTConfig(), "Unrecognized configuration class"),
    ],
)
def test_what_is_no_decoder(config: Any, text: str, tmp_path: Path) -> None:
    folder = save_config(tmp_path / "model", config)
    for load in (load_outline, load_backbone):
        with pytest.raises(IaptError, match=text):
            load(str(folder))


@pytest.mark.parametrize("fields", [{"num_attention_heads": 0}, {"hidden_act": "none such"}, {"hidden_size": "wide"}])
def test_a_configuration_of_no_model_is_refused_in_words(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = save_config(tmp_path / "model", tiny_llama().config)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")
    with pytest.raises(IaptError):
        load_outline(str(folder))


def test_an_outline_is_the_model_without_its_weights(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path / "model", tiny_llama())
    loaded = load_backbone(str(folder))
    (folder / "model.safetensors").unlink()
    outline = load_outline(str(folder))
    assert {p.device.type for p in outline.parameters()} == {"meta"}
    assert {name: p.shape for name, p in outline.named_parameters()} == {
        name: p.shape for name, p in loaded.model.named_parameters()
    }
    assert family_of(outline) is family_of(loaded.model), "one trial serves both"


def test_the_outline_of_a_gguf_file_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf", TinyFile("llama"))
    loaded = load_backbone(str(path))

    def never(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("trainers.decoder.gguf_file.GgufFile.tensor", never)
    outline = load_outline(str(path))
    assert outline.config.to_dict().items() >= {"num_hidden_layers": 2, "hidden_size": 64}.items()
    assert family_of(outline) is family_of(loaded.model)


def test_a_warning_about_a_configuration_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The configuration is read twice: for the verdict, and with the weights."""
    folder = save_tiny_backbone(tmp_path / "model", tiny_llama())
    path = folder / "config.json"
    fields = json.loads(path.read_text("utf-8"))
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "unheard_of": 1.0}
    path.write_text(json.dumps(fields), "utf-8")
    with caplog.at_level(logging.WARNING):
        load_backbone(str(folder))
    said = [record.message for record in caplog.records if "unheard_of" in record.message]
    assert len(said) == 1


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_local_experts"])
def test_counts_without_measure_are_refused_before_the_model_is_made(tmp_path: Path, field: str) -> None:
    fields = {**tiny_llama().config.to_dict(), field: 10**7}
    if field == "num_local_experts":
        fields |= {"model_type": "mixtral", "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(IaptError, match=f"has {field}=10000000, expected at most 10000"):
        load_outline(str(tmp_path))


def test_a_gguf_file_of_too_many_layers(tmp_path: Path) -> None:
    for count in (2**31, 0):
        path = write(tmp_path / f"{count}.gguf", TinyFile("gemma3", {"block_count": count}, layers=1))
        with pytest.raises(IaptError, match=f"has {count} as its block_count, expected 1 to 10000"):
            load_outline(str(path))
