"""The proof with a backbone that does not fit into memory: the same cases and figures as with one that does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import iapt_export
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.passes.quantise_weights import SCALES
from tests.bundles import METHOD, MIXED, NUM_LAYERS, TinyBuild, save_tiny_adapter
from tests.thorough import default_for
from tests.tiny import save_tiny_backbone, tiny_llama
from tests.validation.sides.test_rounding import one_percent, weight
from trainers.decoder import streamed
from trainers.decoder.backbone import load_backbone
from trainers.decoder.streamed import is_streamed
from trainers.methods.configs import LoRAConfig
from validation.judging.compare import Settings, depth_for
from validation.judging.result import Report
from validation.validate import loader_for, validate_bundle

METHODS: dict[str, Any] = {
    "movies": METHOD,
    "mood": MIXED["mood"],
    "lora": LoRAConfig(rank=2, target_modules=("q_proj", "down_proj")),
}


def build_in(root: Path, dtype: str) -> TinyBuild:
    """Tenants of three methods over a checkpoint in bf16; not proven, since int4's limits are for real weights."""
    model = tiny_llama(num_hidden_layers=NUM_LAYERS)
    folder = save_tiny_backbone(root / "model", model.to(torch.bfloat16))
    fingerprint = load_backbone(str(folder)).fingerprint
    adapters = {
        name: save_tiny_adapter(root / name, seed, fingerprint, method)
        for seed, (name, method) in enumerate(METHODS.items())
    }
    build = TinyBuild(folder, adapters, root / "cache", root / "bundle")
    iapt_export.build(build.request(build.bundle, targets=(f"onnxruntime:{dtype}",), prove=False))
    return build


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    return build_in(tmp_path_factory.mktemp("fp32"), "fp32")


@pytest.fixture(scope="module")
def in_int4(tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    return build_in(tmp_path_factory.mktemp("int4"), "int4")


def compared(made: TinyBuild, bundle: Path, *, streams: bool, monkeypatch: pytest.MonkeyPatch) -> Report:
    manifest = BundleManifest.load(bundle)
    monkeypatch.setattr(streamed, "free_memory", lambda: 0 if streams else None)
    backbone = loader_for(manifest)(str(made.model))
    assert is_streamed(backbone.model) is streams
    return validate_bundle(bundle, manifest, backbone, Settings(depth="quick"))


@pytest.mark.parametrize("dtype", default_for("int4".__eq__, ["fp32", "int4"]))
def test_figures_are_those_of_a_backbone_in_memory(
    dtype: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = request.getfixturevalue(f"in_{dtype}")
    loaded, read = (compared(made, made.bundle, streams=streams, monkeypatch=monkeypatch) for streams in (False, True))
    assert len(read.targets) == len(loaded.targets) >= 2, "PEFT's own answer is compared as well"
    assert any(row.first_divergence is not None for row in read.targets[0].tokens) == (dtype == "int4")
    for ours, theirs in zip(read.targets, loaded.targets, strict=True):
        assert [(check.stage, check.case) for check in ours.checks] == [
            (check.stage, check.case) for check in theirs.checks
        ]
        for row, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert (row.first_divergence, row.excused, row.target) == (
                *(other.first_divergence, other.excused, other.target),
            )
            # what PyTorch answers after the first other token is not known: its weights are read once
            end = None if row.first_divergence is None else row.first_divergence + 1
            assert row.reference == other.reference[:end]
        differs = any(row.first_divergence is not None for row in ours.tokens)
        for check, other in zip(ours.checks, theirs.checks, strict=True):
            mixed = check.case.startswith(("batch ", "every row of "))
            if differs and mixed and check.stage not in ("prefill logits", "prefill cache"):
                continue  # compared after the target's tokens, where the other is after PyTorch's
            # prompt and tokens are read in one pass or in two, which adds up in another order
            judged, wanted = ({name: one.measured[name] for name in one.limits} for one in (check, other))
            assert check.passed == other.passed and judged == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_a_fault_is_found_and_located(in_int4: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(in_int4.bundle, tmp_path / "bundle"))
    weight(SCALES, one_percent)(bundle, monkeypatch)
    exact = compared(in_int4, bundle, streams=True, monkeypatch=monkeypatch).targets[1]
    assert exact.status == "fail" and exact.bisection is not None
    found = exact.bisection.finding
    assert found is not None and (found.layer, found.source) == (1, "weight") and "1.01" in found.evidence


def test_a_build_proves_with_what_memory_there_is(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def noting(model: Any, *args: Any) -> Any:
        used.append(streamed.streamed(model, *args))
        return used[-1]

    monkeypatch.setattr("iapt_export.building.backbones.streamed", noting)
    monkeypatch.setattr(streamed, "free_memory", lambda: 0)
    request = tiny_build.request(tmp_path / "bundle", depth="quick")
    assert iapt_export.build(request).parity.verdict == "pass" and len(used) == 1
    report = json.loads((tmp_path / "bundle" / "report.json").read_text(encoding="utf-8"))
    assert "--quick" in report["command"] and report["depth"] == "quick"
    assert report["environment"]["backbone"] == "read layer by layer"
    parity = BundleManifest.load(tmp_path / "bundle").parity
    assert parity.depth == "quick" and {"most-padding", "batch 1, one row"} <= set(parity.cases["onnxruntime:fp32"])


def test_a_merged_adapter_is_compared_in_memory(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = BundleManifest.load(tiny_build.bundle)
    monkeypatch.setattr(streamed, "free_memory", lambda: 0)
    merged = dataclasses.replace(manifest, tenants=[dataclasses.replace(manifest.tenants[0], method=None)])
    assert not is_streamed(loader_for(merged)(str(tiny_build.model)).model)
    assert is_streamed(loader_for(manifest)(str(tiny_build.model)).model)


def test_large_backbones_are_compared_quickly_unless_more_is_asked_for() -> None:
    with torch.device("meta"):
        small, large = nn.Linear(1000, 1000), nn.Linear(2**16, 2**15)
    assert (depth_for(small), depth_for(large)) == ("standard", "quick")
