"""``validate --runner openvino``: a bundle's portable graphs in a runtime that shares no code with the others."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from iapt_export.cli import PARITY_FAILED
from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.manifest import BundleManifest, GraphSpec, TargetSpec
from tests.bundles import TinyBuild, rehash, run
from tests.validation.sabotage import position_off_by_one
from validation.sides.portable import portable_target
from validation.validate import compared_targets

COMPARED = {"prefill logits", "prefill cache", "decode logits", "decode cache", "greedy tokens"}


def validate(bundle: Path, folder: Path) -> tuple[int, dict]:
    outcome = run("validate", bundle, "--runner=openvino", "--quick", f"--report={folder}", "--no-peft-check")
    return outcome.code, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_openvino_agrees_with_pytorch(tiny_build: TinyBuild, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    code, report = validate(tiny_build.bundle, tmp_path)
    (target,) = report["targets"]
    assert (code, report["verdict"], target["name"], target["status"]) == (0, "pass", "openvino", "pass")
    assert {check["stage"] for check in target["checks"]} >= COMPARED
    assert "--runner openvino" in report["command"]
    found = compared_targets(BundleManifest.load(tiny_build.bundle), "openvino")
    assert [(target.name, target.runtime_version) for target in found] == [("openvino", openvino.__version__)]


def test_a_wrong_graph_fails_there(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    position_off_by_one(tiny_bundle)
    rehash(tiny_bundle)
    code, report = validate(tiny_bundle, tmp_path / "report")
    failed = {check["stage"] for target in report["targets"] for check in target["checks"] if not check["passed"]}
    assert code == PARITY_FAILED and "decode logits" in failed and "prefill logits" not in failed


def with_target(manifest: BundleManifest, **fields: object) -> BundleManifest:
    target = dataclasses.replace(manifest.target("onnxruntime"), **fields)
    return dataclasses.replace(manifest, targets=[target])


def test_bundles_that_openvino_cannot_read(tiny_build: TinyBuild) -> None:
    manifest = BundleManifest.load(tiny_build.bundle)
    target: TargetSpec = manifest.target("onnxruntime")
    serving: dict[str, GraphSpec] = {"serve": target.graphs["serve"]}
    with pytest.raises(IaptError, match=r"this bundle's targets \(onnxruntime:int8\) have none; build it with"):
        portable_target(with_target(manifest, dtype="int8", graphs=serving))
    with pytest.raises(IaptError, match=r"this bundle's targets \(tensorrt:fp16\) have none"):
        portable_target(with_target(manifest, name="tensorrt", dtype="fp16"))
    with pytest.raises(IaptError, match=r"takes graphs of fp32 and fp16, and this bundle's are bf16"):
        portable_target(with_target(manifest, dtype="bf16"))


def test_without_the_package_nothing_is_loaded(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    outcome = run("validate", tiny_build.bundle, "--runner=openvino", "--model=/nowhere")
    assert outcome.code == 1 and "OpenVINO is not installed; try: pip install -e '.[openvino]'" in outcome.err
    with pytest.raises(NotRunnableError):
        portable_target(BundleManifest.load(tiny_build.bundle))
