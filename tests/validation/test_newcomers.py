"""`validate --adapter`: what an existing bundle does not serve yet is compared as if it did, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iapt_export.building import tenant_file
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import METHOD, MIXED, NEW_TOKENS, TinyBuild, run, save_tiny_adapter
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import IAPTConfig, LAMPConfig
from validation.judging.compare import Settings
from validation.validate import validate_bundle


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Any:
    return load_backbone(str(tiny_build.model))


def compared(build: TinyBuild, backbone: Any, *adapters: str) -> Any:
    settings = Settings(0, NEW_TOKENS, depth="quick", adapters=adapters)
    return validate_bundle(build.bundle, BundleManifest.load(build.bundle), backbone, settings)


def test_adapters_of_every_method_of_a_bundle(mixed_build: TinyBuild, backbone: Any, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mixed_build.bundle.rglob("*")}
    configs = MIXED | {"mood": LAMPConfig(init_length=16, rank=2, window=4)}  # shipped as a prompt of the same length
    adapters = [
        f"new-{name}={save_tiny_adapter(tmp_path / name, 50 + seed, backbone.fingerprint, config)}"
        for seed, (name, config) in enumerate(configs.items())
    ]
    report = compared(mixed_build, backbone, *adapters)
    assert report.verdict == "pass"
    assert report.tenants == [f"new-{name}" for name in configs]
    assert all(f"--adapter {adapter}" in report.command for adapter in adapters)
    served, *_ = report.targets
    tenants = {row.tenant for row in served.tokens}
    assert set(report.tenants) <= tenants and not tenants & set(MIXED)
    assert {path: path.stat().st_mtime_ns for path in mixed_build.bundle.rglob("*")} == before


def test_what_the_tenant_command_would_ship_is_compared(
    tiny_build: TinyBuild, backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And held against what training wrote: a file of other numbers fails."""
    adapter = save_tiny_adapter(tmp_path / "late", 7, backbone.fingerprint)
    make = tenant_file.plain_tenant

    def other(*given: Any) -> Any:
        card, tensors = make(*given)  # type: ignore[misc]
        return card, {name: array * np.float32(1.1) for name, array in tensors.items()}

    assert compared(tiny_build, backbone, str(adapter)).verdict == "pass"
    monkeypatch.setattr(tenant_file, "plain_tenant", other)
    assert compared(tiny_build, backbone, str(adapter)).verdict == "fail"


def test_on_the_command_line(tiny_build: TinyBuild, backbone: Any, tmp_path: Path) -> None:
    late = save_tiny_adapter(tmp_path / "late", 7, backbone.fingerprint)
    command = ["validate", tiny_build.bundle, "--quick", f"--new-tokens={NEW_TOKENS}", "--json"]
    outcome = run(*command, f"--adapter={late}", "--adapter", f"alpha={late}")
    found = json.loads(outcome.out)
    assert (outcome.code, found["verdict"], found["tenants"]) == (0, "pass", ["late", "alpha"])
    wide = save_tiny_adapter(tmp_path / "wide", 8, backbone.fingerprint, IAPTConfig(bottleneck=16))
    foreign = save_tiny_adapter(tmp_path / "foreign", 9, "another", METHOD)
    for adapters, text in (
        ([wide], "so its graphs cannot run"),
        ([foreign], "fingerprint"),
        ([tmp_path / "none"], "none"),
        ([f"n{number}={late}" for number in range(5)], "5 adapters are more than the bundle's 4 places"),
    ):
        refused = run(*command, *(f"--adapter={adapter}" for adapter in adapters))
        assert refused.code == 1 and text in refused.err, refused.err
        assert not refused.out
