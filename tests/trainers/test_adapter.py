"""The adapter directory: what is written is read, and everything else is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    check_adapter_fits,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from trainers.backbone import Backbone, config_fingerprint, load_backbone, save_backbone
from trainers.config import IAPTConfig
from trainers.errors import IaptError
from trainers.iapt import IAPTGenerator

METHOD = IAPTConfig(bottleneck=8, prompt_length=2)


def config(**fields: Any) -> AdapterConfig:
    model = tiny_llama()
    defaults: dict[str, Any] = {
        "base_model_name_or_path": "tiny/llama",
        "backbone_fingerprint": config_fingerprint(model.config),
        "hidden_size": 32,
        "num_layers": 3,
        "method": METHOD,
        "labels": ("no", "yes"),
        "prompt_format": "chat",
    }
    return AdapterConfig(**{**defaults, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_adapter(tmp_path / "adapter", config(), dict(IAPTGenerator(METHOD, 32, 3).named_parameters()))
    return tmp_path / "adapter"


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(fields)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def test_round_trip(folder: Path) -> None:
    torch.manual_seed(0)
    module = IAPTGenerator(METHOD, 32, 3)
    adapter = load_adapter(folder)
    assert adapter.config == config()
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    for name, parameter in module.named_parameters():
        assert torch.equal(adapter.tensors[name], parameter)
    hidden, mask = torch.randn(1, 4, 32), torch.ones(1, 4)
    assert torch.equal(adapter.generator()(1, hidden, mask), module(1, hidden, mask))


def test_layout_is_pefts(folder: Path) -> None:
    content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    assert (content["peft_type"], content["task_type"]) == ("IAPT", "CAUSAL_LM")
    assert content["bottleneck"] == 8 and content["schema_version"] == 1


def test_half_precision_weights_are_read_as_fp32(folder: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    change_weights(folder, halve)
    assert {tensor.dtype for tensor in load_adapter(folder).tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"schema_version": 2}, "schema_version is 2, this version reads 1; upgrade iapt-export"),
        ({"peft_type": "LORA"}, "peft_type 'LORA' is not a known method; known: IAPT"),
        ({"colour": "blue"}, "unknown field colour; known fields are"),
        ({"hidden_size": ...}, "field hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size='32' is not a positive integer"),
        ({"prompt_format": "xml"}, "prompt_format='xml' is not one of chat, plain"),
        ({"pooling": "median"}, "pooling='median' is not one of attention, mean, max"),
    ],
)
def test_bad_configuration(folder: Path, fields: dict[str, Any], text: str) -> None:
    change_config(folder, **fields)
    with pytest.raises(IaptError) as caught:
        load_adapter(folder)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"), [("{", "is not JSON"), ("[]", "holds a list; expected a JSON object"), (None, "is missing")]
)
def test_unreadable_configuration(folder: Path, content: str | None, text: str) -> None:
    (folder / CONFIG_FILE).unlink()
    if content is not None:
        (folder / CONFIG_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(IaptError) as caught:
        read_adapter_config(folder)
    assert text in str(caught.value)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(IaptError, match=f"{WEIGHTS_FILE} is missing; weights are read from safetensors only"):
        load_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(IaptError, match=r"adapter_model\.bin is not read, because unpickling runs code"):
        load_adapter(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -50])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IaptError, match="is not a whole safetensors file"):
        load_adapter(folder)


def test_pickled_weights_under_the_right_name(folder: Path) -> None:
    torch.save({"down_weight": torch.ones(1)}, folder / WEIGHTS_FILE)
    with pytest.raises(IaptError, match="is not a whole safetensors file"):
        load_adapter(folder)


def set_to(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_to("query", torch.full((3, 8, 2), float("nan"))), "tensor query holds NaN or infinity; train the adapter"),
        (set_to("query", torch.full((3, 8, 2), float("inf"))), "tensor query holds NaN or infinity"),
        (set_to("query", torch.zeros(3, 8, 4)), "tensor query has shape (3, 8, 4), expected (3, 8, 2)"),
        (
            set_to("query", torch.zeros(3, 8, 2, dtype=torch.long)),
            "tensor query has type torch.int64, expected a float",
        ),
        (set_to("extra", torch.zeros(1)), "tensor extra is not part of the method"),
        (lambda tensors: tensors.pop("up_bias"), "tensor up_bias is missing"),
    ],
)
def test_wrong_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], text: str) -> None:
    change_weights(folder, change)
    with pytest.raises(IaptError) as caught:
        load_adapter(folder)
    assert text in str(caught.value)


def test_fits_its_own_backbone_only() -> None:
    check_adapter_fits(config(), Backbone(tiny_llama(), None, "tiny/llama"), "adapter")
    other = Backbone(tiny_llama(hidden_size=64, num_hidden_layers=2), None, "tiny/other")
    with pytest.raises(IaptError) as caught:
        check_adapter_fits(config(), other, "adapter")
    for text in (
        "adapter was trained for tiny/llama, not for tiny/other",
        "hidden size is 32 in the adapter and 64 in the backbone",
        "number of layers is 3 in the adapter and 2 in the backbone",
        "fingerprint is",
        "Give its own backbone with --model",
    ):
        assert text in str(caught.value)
    same_size = Backbone(tiny_llama(num_key_value_heads=4), None, "tiny/kv4")
    with pytest.raises(IaptError, match="fingerprint is"):
        check_adapter_fits(config(), same_size, "adapter")


def test_fingerprint_ignores_the_seed() -> None:
    assert config_fingerprint(tiny_llama(0).config) == config_fingerprint(tiny_llama(1).config)


def test_interrupted_writing_leaves_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / WEIGHTS_FILE).read_bytes()

    def full(_tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("trainers.adapter.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(folder, dataclasses.replace(config(), labels=()), {"x": torch.ones(1)})
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    assert load_adapter(folder).config == config()


def test_backbone_round_trip(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path / "model")
    backbone = load_backbone(str(folder))
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    save_backbone(backbone, tmp_path / "again")
    again = load_backbone(str(tmp_path / "again"), dtype="bf16")
    assert again.fingerprint == backbone.fingerprint
    assert again.model.dtype == torch.bfloat16


def test_backbone_errors(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    for source, text in (
        (str(tmp_path / "none"), "does not exist; check the path given with --model"),
        (str(tmp_path / "weights.bin"), "is a file but not GGUF"),
        (str(tmp_path), "holds no config.json and 0 .gguf files"),
        ("nobody/nothing", "the backbone 'nobody/nothing' could not be loaded"),
    ):
        with pytest.raises(IaptError) as caught:
            load_backbone(source)
        assert text in str(caught.value)
    with pytest.raises(IaptError, match="dtype 'fp8' is not known; use one of fp32, fp16, bf16"):
        load_backbone(str(tmp_path), dtype="fp8")
