"""The published JSON Schemas take what we write, and refuse what our readers refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors import safe_open

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.tenant_card import CARD_KEY, TenantCard
from iapt_export.schemas import schemas
from tests.bundles import TinyBuild
from trainers.adapters.adapter import AdapterConfig, read_adapter_config
from trainers.adapters.directory import save_adapter
from trainers.decoder.backbone_sizes import Sizes
from trainers.methods.configs import METHOD_CONFIGS
from trainers.methods.forms import METHODS

SCHEMAS = schemas()
LINEARS = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.up_proj": (32, 64)}
SIZES = Sizes(32, 3, 2, 8, 64, LINEARS)


def problems(name: str, value: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMAS[f"{name}.schema.json"]).iter_errors(value)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_they_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])


def test_files_of_a_bundle_fit(tiny_build: TinyBuild) -> None:
    manifest = json.loads((tiny_build.bundle / "manifest.json").read_text(encoding="utf-8"))
    assert problems("manifest", manifest) == []
    cards = sorted((tiny_build.bundle / "tenants").glob("*.safetensors"))
    assert cards
    for path in cards:
        with safe_open(path, "np") as file:
            assert problems("tenant", json.loads(file.metadata()[CARD_KEY])) == []
    for folder in tiny_build.adapters.values():
        assert problems("adapter_config", json.loads((folder / "adapter_config.json").read_text("utf-8"))) == []


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_an_adapter_of_every_method_fits(tmp_path: Path, name: str) -> None:
    method = METHOD_CONFIGS[name]()
    config = AdapterConfig(
        base_model_name_or_path="m", backbone_fingerprint="f", method=method, labels=("a",), **vars(SIZES)
    )
    shapes = METHODS[name].shapes(method, SIZES)
    save_adapter(tmp_path, config, {tensor: torch.zeros(shape) for tensor, shape in shapes.items()})
    read_adapter_config(tmp_path)
    assert problems("adapter_config", json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))) == []


MANIFEST = {
    "missing": lambda m: m.pop("ranges"),
    "strange": lambda m: m.update(colour="blue"),
    "deep": lambda m: m["backbone"].update(num_layers="3"),
    "boolean": lambda m: m["backbone"].update(num_layers=True),
    "shape": lambda m: m["methods"][0]["weights"][0].update(shape=[1.5]),
    "version": lambda m: m.update(schema_version=1),
}
ADAPTER = {
    "missing": lambda a: a.pop("backbone_fingerprint"),
    "strange": lambda a: a.update(colour="blue"),
    "kind": lambda a: a.update(peft_type="QLORA"),
    "choice": lambda a: a.update(prompt_format="loud"),
    "labels": lambda a: a.update(labels=[1]),
    "version": lambda a: a.pop("schema_version"),
}
CARD = {
    "missing": lambda c: c.pop("fingerprint"),
    "strange": lambda c: c.update(colour="blue"),
    "type": lambda c: c.update(labels="yes"),
}


@pytest.mark.parametrize("damage", MANIFEST)
def test_a_wrong_manifest_is_refused_by_both(tiny_build: TinyBuild, damage: str) -> None:
    fields = json.loads((tiny_build.bundle / "manifest.json").read_text(encoding="utf-8"))
    wrong = copy.deepcopy(fields)
    MANIFEST[damage](wrong)
    assert problems("manifest", wrong)
    with pytest.raises(IaptError):
        BundleManifest.parse(json.dumps(wrong).encode(), "manifest.json")


@pytest.mark.parametrize("damage", CARD)
def test_a_wrong_card_is_refused_by_both(tiny_build: TinyBuild, damage: str) -> None:
    with safe_open(tiny_build.bundle / "tenants" / "alpha.safetensors", "np") as file:
        wrong = json.loads(file.metadata()[CARD_KEY])
    CARD[damage](wrong)
    assert problems("tenant", wrong)
    with pytest.raises(IaptError):
        TenantCard.from_metadata({CARD_KEY: json.dumps(wrong)}, "file")


@pytest.mark.parametrize("damage", ADAPTER)
def test_a_wrong_adapter_is_refused_by_both(tiny_build: TinyBuild, tmp_path: Path, damage: str) -> None:
    wrong = json.loads((tiny_build.adapters["alpha"] / "adapter_config.json").read_text(encoding="utf-8"))
    ADAPTER[damage](wrong)
    assert problems("adapter_config", wrong)
    (tmp_path / "adapter_config.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(IaptError):
        read_adapter_config(tmp_path)
