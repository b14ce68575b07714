"""The adapter directory: what is written is read, and everything else is refused with a reason."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from iapt_export.building.layout import save_tenant
from iapt_export.contract.errors import IaptError
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from trainers.adapters.directory import check_adapter_fits, load_adapter, save_adapter
from trainers.decoder.backbone import Backbone, config_fingerprint, load_backbone, save_backbone
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import Method
from trainers.methods.configs import METHOD_CONFIGS, IAPTConfig, LoRAConfig, PromptTuningConfig
from trainers.methods.forms import METHODS, new_method
from trainers.methods.iapt import IAPT

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
    save_adapter(tmp_path / "adapter", config(), dict(IAPT(METHOD, Sizes(32, 3)).named_parameters()))
    return tmp_path / "adapter"


def write(folder: Path, method: Any) -> Method:
    """Write an adapter of any method as the trainer does, and return the module that it holds."""
    sizes = sizes_of(tiny_llama())
    module = new_method(method, sizes)
    changed = {name: sizes.linears[name] for name in module.linear_names}
    fields = dataclasses.asdict(dataclasses.replace(sizes, linears=changed))
    save_adapter(folder, config(method=method, **fields), dict(module.named_parameters()))
    return module


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(fields)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def test_iapt_without_the_field_was_trained_without_normalising(folder: Path) -> None:
    """Adapters that are older than the field keep their meaning."""
    assert read_adapter_config(folder).method.normalize
    change_config(folder, normalize=...)
    assert not read_adapter_config(folder).method.normalize


def test_round_trip(folder: Path) -> None:
    torch.manual_seed(0)
    module = IAPT(METHOD, Sizes(32, 3))
    adapter = load_adapter(folder)
    assert adapter.config == config()
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    for name, parameter in module.named_parameters():
        assert torch.equal(adapter.tensors[name], parameter)
    slots, hidden, mask = torch.zeros(1, 2, 32), torch.randn(1, 4, 32), torch.ones(1, 4)
    made, wanted = (one.slots(one.weights(), 1, slots, hidden, mask) for one in (adapter.module(), module))
    assert torch.equal(made, wanted)
    assert not adapter.module().training


METHODS_WITH_OPTIONS = {
    **{name: cls() for name, cls in METHOD_CONFIGS.items()},
    "PREFIX_TUNING with projection": METHOD_CONFIGS["PREFIX_TUNING"](projection=True, projection_width=8),
    "LORA elsewhere": LoRAConfig(rank=2, alpha=3.5, rslora=True, target_modules=("o_proj", "mlp.up_proj")),
}


@pytest.mark.parametrize("method", METHODS_WITH_OPTIONS.values(), ids=METHODS_WITH_OPTIONS)
def test_round_trip_of_every_method(tmp_path: Path, method: Any) -> None:
    module = write(tmp_path / "adapter", method)
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.config.method == method
    assert METHODS[adapter.config.peft_type] is type(module)
    assert set(adapter.config.sizes.linears) == set(module.linear_names)
    again = adapter.module()
    assert list(again.state_dict()) == list(module.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    save_adapter(tmp_path / "again", adapter.config, adapter.tensors)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_fields_of_other_libraries_do_not_reach_a_method_that_peft_has(tmp_path: Path) -> None:
    """PEFT reads its own fields at the top of the file, we read ours below; a stranger's are nobody's business."""
    write(tmp_path, LoRAConfig(rank=2))
    content = json.loads((tmp_path / CONFIG_FILE).read_text(encoding="utf-8"))
    assert (content["r"], content["method_config"]["rank"]) == (2, 2)
    change_config(tmp_path, r=3, use_dora=True)
    assert load_adapter(tmp_path).config.method == LoRAConfig(rank=2)
    for nothing in (..., 3):
        change_config(tmp_path, method_config=nothing)
        with pytest.raises(IaptError, match="field method_config, an object with the method's settings, is missing"):
            load_adapter(tmp_path)


def test_a_directory_of_stock_peft_needs_its_backbone(tmp_path: Path) -> None:
    module = write(tmp_path, PromptTuningConfig(prompt_length=3))
    fields = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")
    for read in (load_adapter, read_adapter_config):
        with pytest.raises(IaptError, match="was written by stock PEFT and does not say which sizes its backbone has"):
            read(tmp_path)
    adapter = load_adapter(tmp_path, Backbone(tiny_llama(), None, "tiny"))
    assert torch.equal(adapter.tensors["prompt"], module.get_parameter("prompt"))
    assert adapter.config.method.prompt_length == 3


def test_a_backbone_does_not_matter_for_our_own(folder: Path) -> None:
    assert load_adapter(folder, Backbone(tiny_llama(num_hidden_layers=2), None, "tiny")).config == config()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"peft_type": "LORA"}, "peft_type='LORA' is not the name of the method given, IAPT"),
        ({"head_dim": -1}, "head_dim=-1 is not an integer from 0 to 16777216"),
        ({"linears": {"mlp": (3,)}}, "linears={'mlp': (3,)} does not give each name its inputs and outputs"),
        ({"linears": {"mlp": (3, 0)}}, "linears={'mlp': (3, 0)} does not give"),
    ],
)
def test_configuration_refuses(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        config(**fields)
    assert text in str(caught.value)


def test_an_adapter_from_before_there_were_other_methods(folder: Path) -> None:
    change_config(folder, num_kv_heads=..., head_dim=..., vocab_size=..., linears=..., layers_path=...)
    assert load_adapter(folder).config == config()


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
        ({"schema_version": ...}, "schema_version is None, this version reads 1"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not a known method; known: IAPT, ADEPT, LOPA"),
        ({"colour": "blue"}, "unknown field colour; known fields are"),
        ({"hidden_size": ...}, "field hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size='32' is not an integer from 1 to 16777216"),
        ({"linears": {"mlp": [1, 2, 3]}}, "linears={'mlp': (1, 2, 3)} does not give each name its inputs and outputs"),
        ({"linears": ["mlp"]}, "linears=['mlp'] does not give"),
        ({"prompt_format": "xml"}, "prompt_format='xml' is not one of chat, plain, newline"),
        ({"pooling": "median"}, "pooling='median' is not one of attention, mean, max"),
        ({"labels": 5}, "labels=5 is no list of texts"),
        ({"labels": [5]}, "labels=(5,) is no list of texts"),
        ({"peft_type": ["IAPT"]}, "peft_type ['IAPT'] is not a known method; known: IAPT"),
        ({"system_prompt": {"a": 1}}, "system_prompt={'a': 1} is not text or null"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None is not text"),
        ({"eos_token_id": True}, "eos_token_id=True is not an integer or null"),
        ({"revision": 1.5}, "revision=1.5 is not text or null"),
        ({"num_layers": 10**7}, "num_layers=10000000 is not an integer from 1 to 10000"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776 is not an integer from 1 to 16777216"),
        ({"vocab_size": -1}, "vocab_size=-1 is not an integer from 0 to 16777216"),
        (
            {"num_layers": 10_000, "linears": {f"expert{number}": [1, 1] for number in range(21)}},
            "21 linears in 10000 layers are more than 200000",
        ),
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

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(folder, dataclasses.replace(config(), labels=()), {"x": torch.ones(1)})
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    assert load_adapter(folder).config == config()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """A server under another account reads what it may read; safetensors' own writing always gives 0600."""
    before = os.umask(umask)
    try:
        save_adapter(tmp_path / "adapter", config(), {"x": torch.ones(1)})
        save_tenant({"x": torch.ones(1)}, tmp_path / "tenant.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {CONFIG_FILE, WEIGHTS_FILE, "tenant.safetensors"}
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode] * 3


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
        ("nobody/nothing", "the backbone 'nobody/nothing', which is no folder as seen from"),
    ):
        with pytest.raises(IaptError) as caught:
            load_backbone(source)
        assert text in str(caught.value)
    with pytest.raises(IaptError, match="dtype 'fp8' is not known; use one of fp32, fp16, bf16"):
        load_backbone(str(tmp_path), dtype="fp8")
