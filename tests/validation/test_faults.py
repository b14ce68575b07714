"""The validator is checked itself: every planted fault is caught, and found where it was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iapt_export.manifest import BundleManifest
from tests.bundles import NEW_TOKENS, TinyBuild
from tests.validation.faults import FAULTS, Fault
from trainers.backbone import load_backbone
from validation.compare import Settings
from validation.result import Bisection
from validation.validate import validate_bundle


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Any:
    return load_backbone(str(tiny_build.model))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_and_located(
    fault: Fault,
    tiny_bundle: Path,
    backbone: Any,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    fault.plant(tiny_bundle, monkeypatch)
    record_property("planted", fault.name)
    report = validate_bundle(
        tiny_bundle, BundleManifest.load(tiny_bundle), backbone, Settings(0, NEW_TOKENS, depth="quick")
    )
    failed = [target for target in report.targets if target.status == "fail"]
    assert report.verdict == "fail" and failed
    record_property("caught", fault.name)
    for target in failed:
        assert target.bisection is not None and target.bisection.finding is not None, target.bisection
        found = target.bisection.finding
        assert (found.step, found.layer, found.source) == (fault.step, fault.layer, fault.source), found
        assert found.graph == "serve" or found.tensor.endswith(fault.tensor), found
        assert fault.evidence in found.evidence, found
    record_property("located", fault.name)


def test_an_honest_bundle_has_nothing_to_find(tiny_build: TinyBuild, backbone: Any) -> None:
    report = validate_bundle(
        tiny_build.bundle,
        BundleManifest.load(tiny_build.bundle),
        backbone,
        Settings(0, NEW_TOKENS, depth="quick", bisect=True),
    )
    assert report.verdict == "pass" and len(report.targets) == 2
    for target in report.targets:
        check_nothing_found(target.bisection)


def check_nothing_found(bisection: Bisection | None) -> None:
    assert bisection is not None
    assert bisection.finding is None and bisection.num_steps == NEW_TOKENS
    assert "every tensor agrees" in bisection.note
    layers = {layer for _, layer, _ in bisection.errors}
    assert layers == {None, 0, 1} and len(bisection.errors) > 30
    assert max(error for *_, error in bisection.errors) < 1e-4
