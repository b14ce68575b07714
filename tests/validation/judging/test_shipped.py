"""What ships is computed from what was trained once more: a row of a table that no prompt reads counts too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from iapt_export import build
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import TinyBuild, rehash, save_tiny_adapter
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import ADePTConfig, DePTConfig, LAMPConfig, LoRAConfig, PrefixTuningConfig
from validation.judging.compare import Settings
from validation.judging.shipped import NAME, compare_shipped
from validation.sides.reference import Reference
from validation.validate import validate_bundle

CONFIGS: dict[str, Any] = {
    "table": DePTConfig(prompt_length=5, max_length=90),
    "folded": ADePTConfig(prompt_length=3, bottleneck=4),
    "prompt": LAMPConfig(init_length=20, rank=3, window=5),
    "made": PrefixTuningConfig(prompt_length=4, projection=True, projection_width=8),
    "low": LoRAConfig(rank=2, target_modules=("q_proj",)),
    "high": LoRAConfig(rank=3, alpha=7),
}


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Any:
    return load_backbone(str(tiny_build.model))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild, backbone: Any) -> Path:
    root = tmp_path_factory.mktemp("shipped")
    adapters = {
        name: save_tiny_adapter(root / name, seed, backbone.fingerprint, config)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }
    built = TinyBuild(tiny_build.model, adapters, root / "cache", root / "bundle")
    build(built.request(built.bundle, tenants="1:6:8", fold_embeddings=True, prove=False))
    return built.bundle


def change(bundle: Path, tenant: str, edit: Callable[[Any], None]) -> Callable[[], None]:
    """Edit a tenant's tensors in place; what is returned puts them back."""
    path = bundle / "tenants" / f"{tenant}.safetensors"
    before = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(tensors)
    save_file(tensors, path, metadata)
    return lambda: path.write_bytes(before) and None


def last_row(name: str) -> Callable[[Any], None]:
    def edit(tensors: Any) -> None:
        tensors[name][-1] *= 1.001

    return edit


EDITS = {
    "table": last_row("offset"),
    "folded": last_row("table"),
    "prompt": last_row("prompt"),
    "made": last_row("prefix"),
    "low": last_row("self_attn__q_proj__B"),
    "high": last_row("self_attn__v_proj__A"),
}


def test_a_row_that_differs_is_found(bundle: Path, backbone: Any) -> None:
    reference = Reference(bundle, BundleManifest.load(bundle), backbone)
    result = compare_shipped(reference, lambda _: None)
    assert result is not None and result.status == "pass"
    assert [check.tenants for check in result.checks] == [[name] for name in CONFIGS]
    assert all(check.measured["relative"] < 2e-6 for check in result.checks)
    for tenant, edit in EDITS.items():
        undo = change(bundle, tenant, edit)
        found = compare_shipped(reference, lambda _: None)
        undo()
        assert found is not None and found.status == "fail"
        assert [check.tenants[0] for check in found.checks if not check.passed] == [tenant]


def test_it_is_part_of_the_verdict(bundle: Path, backbone: Any) -> None:
    undo = change(bundle, "table", last_row("offset"))
    rehash(bundle)
    report = validate_bundle(bundle, BundleManifest.load(bundle), backbone, Settings(depth="quick", peft_check=False))
    undo()
    rehash(bundle)
    assert report.verdict == "fail"
    assert [target.name for target in report.targets if target.status == "fail"] == [NAME]
