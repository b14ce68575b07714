"""``--quantise`` from training to the bundle: each says what it stored, and nobody serves another's by mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import iapt_export
from iapt_export.building.jobs import plan_build
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import RANGES, run
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_backbone
from validation.judging.compare import Settings
from validation.validate import validate_bundle

CHOICE = "block=64,narrow=4"
FLAGS = ("--weights", "int4", "--quantise", "narrow=4,head=8,block=64")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and an adapter that was trained on these weights of it."""
    root = tmp_path_factory.mktemp("choice")
    save_tiny_backbone(root / "model", tiny_llama(num_hidden_layers=1, hidden_size=64, intermediate_size=128))
    lines = [{"instruction": f"joy {i}", "output": "yes" if i % 2 else "no"} for i in range(16)]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    places = ("--model", root / "model", "--data", root / "data.jsonl", "--output", root / "adapter")
    done = run("train", *places, *FLAGS, "--max-steps", "1", "--bottleneck", "8", "--prompt-length", "4")
    assert done.code == 0, done.err
    return root


def request(root: Path, output: str, quantise: str) -> iapt_export.BuildRequest:
    # what rounding costs so small and random a model is beyond the limits, so its proof is made by hand below
    return iapt_export.BuildRequest(
        model=str(root / "model"),
        adapters=[root / "adapter"],
        output=root / output,
        cache=root / "cache",
        targets=["onnxruntime:int4"],
        quantise=quantise,
        prove=False,
        **RANGES,
    )


def weights_of(path: Path, *flags: str) -> int:
    """Bytes of a bundle's or a model's weights, as ``plan`` counts them."""
    shares = json.loads(run("plan", path, *flags, "--json").out)
    return next(share["bytes"] for share in shares if share["name"] == "weights")


def test_an_adapter_records_what_it_was_trained_on(root: Path) -> None:
    config = load_adapter(root / "adapter").config
    assert (config.weights, config.quantise) == ("int4", CHOICE)
    card = (root / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"fp32 over weights rounded to int4 ({CHOICE})" in card and "--quantise" in card
    assert f"int4 ({CHOICE}) weights" in run("inspect", root / "adapter").out
    again = run("train", "--model", root / "model", "--data", root / "data.jsonl", "--output", root / "adapter")
    assert "holds a finished adapter" in again.err


def test_a_bundle_serves_it_and_says_so(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = iapt_export.build(request(root, "bundle", CHOICE))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
    assert BundleManifest.load(root / "bundle").targets[0].quantise == CHOICE
    assert f"onnxruntime int4 ({CHOICE}), opset 23" in run("inspect", root / "bundle").out
    backbone, settings = load_backbone(str(root / "model")), Settings(0, 8, depth="quick", peft_check=False)
    served, exact = validate_bundle(root / "bundle", manifest, backbone, settings).targets
    assert (exact.name, exact.status) == (f"onnxruntime with int4 ({CHOICE}) weights, otherwise", "pass")
    # not beside fp32, where the limits are those of the type's own rounding
    assert (served.name, served.status) == (f"onnxruntime beside PyTorch with int4 ({CHOICE}) weights", "pass")
    worst = {
        target.name: max(check.measured.get("relative", 0.0) for check in target.checks) for target in (served, exact)
    }
    assert worst[exact.name] < 1e-4 < 1e-3 < worst[served.name], "activations are rounded"
    planned = run("plan", root / "bundle", "--quantise", "block=64")
    assert "which says it itself; leave it out" in planned.err


def test_other_settings_are_another_bundle(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = iapt_export.build(request(root, "bundle", CHOICE))
    caplog.clear()
    usual = iapt_export.build(request(root, "usual", ""))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"tenant adapter was trained on int4 ({CHOICE}) weights, and onnxruntime serves int4; train --weights int4 "
        "trains on those"
    ]
    assert '"quantise"' not in (root / "usual" / "manifest.json").read_text(encoding="utf-8"), "older readers take it"
    assert usual.targets[0].quantise == "" and usual.build_key != made.build_key
    same = iapt_export.build(request(root, "bundle", "narrow=4,block=64,head=8"))
    assert same.build_key == made.build_key, "the same in other words"
    sizes = [weights_of(root / name) for name in ("usual", "bundle")]
    # half the scales of all; of k, v and down, in 4 bits, half the values too
    wide, narrow, table = 2 * 64 * 64 + 2 * 64 * 128, 2 * 64 * 32 + 128 * 64, 320 * 64
    assert sizes[0] - sizes[1] == (wide + narrow + table) // 64 * 4 + narrow // 2


def test_a_train_that_is_asked_for_again_says_what_differs(root: Path) -> None:
    places = ("--model", root / "model", "--data", root / "data.jsonl", "--output", root / "adapter")
    sizes = ("--max-steps", "1", "--bottleneck", "8", "--prompt-length", "4")
    same = run("train", *places, "--weights", "int4", "--quantise", CHOICE, *sizes, "--resume")
    assert same.code == 0 and "is finished and stays as it is" in same.err
    other = run("train", *places, "--weights", "int4", *sizes, "--resume")
    assert f"quantise {CHOICE!r} there, None here" in other.err


def test_plan_and_build_foresee_the_same_bytes(root: Path) -> None:
    backbone = load_backbone(str(root / "model"))
    keys = {text: plan_build(request(root, "new", text), backbone).key for text in ("", "block=32", "head=4", CHOICE)}
    assert keys[""] == keys["block=32"] and len(set(keys.values())) == 3
    sizes = [
        weights_of(root / "model", "--target", "onnxruntime:int4", "--quantise", text) for text in ("head=8", "head=4")
    ]
    assert sizes[0] - sizes[1] == 320 * 64 // 2, "the tied table"
