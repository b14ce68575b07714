"""The validator is checked itself: every planted fault is caught, and found where it was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import pytest
from onnx import numpy_helper

from iapt_export import build
from iapt_export.building.layout import served_graphs
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.passes.pack_projections import JOIN
from iapt_export.graphs.table import graph_specs
from tests.bundles import NEW_TOKENS, TinyBuild, save_tiny_adapter
from tests.thorough import default_for
from tests.tiny import save_tiny_backbone, tiny_llama
from tests.validation.faults import FAULTS, Fault
from trainers.decoder.backbone import config_fingerprint, load_backbone
from trainers.methods.configs import PromptTuningConfig
from validation.judging.compare import Settings
from validation.judging.result import Bisection
from validation.reporting.summary import summary
from validation.validate import validate_bundle


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Any:
    return load_backbone(str(tiny_build.model))


FIRST_OF_A_KIND = {fault.source: fault for fault in reversed(FAULTS)}


@pytest.mark.parametrize(
    "fault",
    default_for(lambda fault: fault is FIRST_OF_A_KIND[fault.source], FAULTS),
    ids=lambda fault: fault.name,
)
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


def test_a_fault_in_packed_weights_names_the_part(tmp_path: Path) -> None:
    """Heads of the tiny backbone are too narrow for ONNX Runtime to turn, so its projections stay apart; not these."""
    model = tiny_llama(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    folder = save_tiny_backbone(tmp_path / "model", model)
    heads = {"num_kv_heads": 1, "head_dim": 16}
    method = PromptTuningConfig(prompt_length=4)
    adapter = save_tiny_adapter(tmp_path / "alpha", 0, config_fingerprint(model.config), method, **heads)
    bundle = tmp_path / "bundle"
    request = TinyBuild(folder, {"alpha": adapter}, tmp_path / "cache", bundle).request(bundle, prove=False)
    with patch("iapt_export.building.jobs.graph_specs", lambda *rest: served_graphs(graph_specs(*rest))):
        build(request)  # without the portable graphs, which have no packed weights
    graph = onnx.load(bundle / "serve.onnx")
    packed = next(t for t in graph.graph.initializer if "layers.1" in t.name and t.name.count(JOIN) == 2)
    array = numpy_helper.to_array(packed).copy()
    assert array.shape == (32, 64)
    array[:, 32:48] *= 1.01
    packed.CopyFrom(numpy_helper.from_array(array, packed.name))
    onnx.save(graph, bundle / "serve.onnx")
    report = validate_bundle(
        bundle, BundleManifest.load(bundle), load_backbone(str(folder)), Settings(0, NEW_TOKENS, depth="quick")
    )
    (failed,) = (target for target in report.targets if target.status == "fail")
    assert failed.bisection is not None and failed.bisection.finding is not None, failed.bisection
    found = failed.bisection.finding
    assert (found.graph, found.step, found.layer, found.source) == ("serve", 0, 1, "weight"), found
    assert "layers.1.self_attn.k_proj.weight: it is 1.01 times the right one" in found.evidence


def test_an_honest_bundle_has_nothing_to_find(tiny_build: TinyBuild, backbone: Any) -> None:
    report = validate_bundle(
        tiny_build.bundle,
        BundleManifest.load(tiny_build.bundle),
        backbone,
        Settings(0, NEW_TOKENS, depth="quick", bisect=True),
    )
    assert report.verdict == "pass" and len(report.targets) == 2
    assert summary(report).count("nothing differs in these steps") == 2, "what the command ends with"
    for target in report.targets:
        check_nothing_found(target.bisection)


def check_nothing_found(bisection: Bisection | None) -> None:
    assert bisection is not None
    assert bisection.finding is None and bisection.num_steps == NEW_TOKENS
    assert bisection.note == "nothing differs in these steps: every tensor is within its limit"
    layers = {layer for _, layer, _ in bisection.errors}
    assert layers == {None, 0, 1} and len(bisection.errors) > 30
    assert max(error for *_, error in bisection.errors) < 1e-4
