"""What a build will make is decided before long work, and every contradiction is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from iapt_export.building.jobs import plan_build
from iapt_export.building.plan import (
    TargetPlan,
    check_device,
    check_ranges,
    load_tenants,
    onnx_variant,
    parse_range,
    plan_ranges,
    plan_targets,
    plan_tenants,
)
from iapt_export.building.telling import tell_of_generation_settings, tell_of_other_weights
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import Range, Ranges
from tests.bundles import METHOD, NUM_LAYERS, TinyBuild, save_tiny_adapter
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.methods.configs import LoRAConfig

RANGES = Ranges(Range(1, 4, 8), Range(1, 64, 512), Range(5, 256, 1024), Range(1, 4, 64))


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Backbone:
    return load_backbone(str(tiny_build.model))


def adapter(folder: Path, backbone: Backbone, **changes: Any) -> Path:
    return save_tiny_adapter(folder, 0, backbone.fingerprint, dataclasses.replace(METHOD, **changes))


@pytest.mark.parametrize(
    ("requested", "dtype", "opset", "planned"),
    [
        ([], None, None, [("onnxruntime", "fp32", 23)]),
        ([], "fp16", 20, [("onnxruntime", "fp16", 20)]),
        (["onnxruntime", "tensorrt-rtx"], None, None, [("onnxruntime", "fp32", 23), ("tensorrt-rtx", "fp16", 23)]),
        (["tensorrt:bf16", "onnxruntime"], "fp32", 23, [("tensorrt", "bf16", 23), ("onnxruntime", "fp32", 23)]),
    ],
)
def test_targets(requested: list[str], dtype: str | None, opset: int | None, planned: list[Any]) -> None:
    assert plan_targets(requested, dtype, opset) == [TargetPlan(*fields) for fields in planned]


def test_targets_of_one_dtype_and_opset_share_graphs() -> None:
    plans = plan_targets(["onnxruntime:fp16", "tensorrt-rtx:fp16", "tensorrt:bf16"], None, None)
    assert [plan.variant for plan in plans] == ["fp16-opset23", "fp16-opset23", "bf16-opset23"]


@pytest.mark.parametrize(
    ("requested", "variant"),
    [
        (["onnxruntime", "tensorrt-rtx"], "fp32-opset23"),
        (["tensorrt-rtx", "onnxruntime"], "fp32-opset23"),
        (["tensorrt:bf16", "tensorrt-rtx"], "bf16-opset23"),
    ],
)
def test_a_bundle_holds_the_graphs_that_onnx_runtime_runs(requested: list[str], variant: str) -> None:
    assert onnx_variant(plan_targets(requested, None, None)) == variant


@pytest.mark.parametrize(
    ("requested", "dtype", "opset", "text"),
    [
        (
            ["openvino"],
            None,
            None,
            "target 'openvino' is not known; use one of onnxruntime, tensorrt-rtx, tensorrt, as NA",
        ),
        ([""], None, None, "target '' is not known"),
        (
            ["onnxruntime:int2"],
            None,
            None,
            "dtype 'int2' of target 'onnxruntime:int2' is not known; use one of fp32, fp16",
        ),
        (["onnxruntime"], "float16", None, "dtype 'float16' of target 'onnxruntime' is not known"),
        (["onnxruntime", "onnxruntime:fp16"], None, None, "target 'onnxruntime' is given twice; build a second bundle"),
        ([], None, 22, "opset 22 is not supported; use one of 20, 23"),
        ([], None, 0, "opset 0 is not supported"),
    ],
)
def test_bad_targets(requested: list[str], dtype: str | None, opset: int | None, text: str) -> None:
    with pytest.raises(IaptError) as caught:
        plan_targets(requested, dtype, opset)
    assert text in str(caught.value)


def test_bf16_needs_a_device_that_multiplies_it() -> None:
    targets = plan_targets(["tensorrt-rtx:bf16", "onnxruntime:bf16"], None, None)
    check_device(targets, "cuda")
    check_device(targets[:1], "cpu")
    with pytest.raises(IaptError, match="ONNX Runtime multiplies no bf16 matrices on the CPU, so onnxruntime:bf16"):
        check_device(targets, "cpu")


@pytest.mark.parametrize(
    ("text", "sizes"), [("8", (1, 4, 8)), ("1", (1, 1, 1)), ("2:3:5", (2, 3, 5)), ("4:4:4", (4, 4, 4))]
)
def test_ranges(text: str, sizes: tuple[int, int, int]) -> None:
    assert parse_range(text, "batch") == Range(*sizes)


def test_all_ranges() -> None:
    texts = {"batch": "1:4:8", "sequence": "1:64:512", "past": "5:256:1024", "tenants": "1:4:64"}
    assert plan_ranges(texts) == RANGES


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:3:4", "-1", "1.5", "1:x:3", " 8", "²", "٣"])
def test_ranges_that_are_no_numbers(text: str) -> None:
    with pytest.raises(IaptError) as caught:
        parse_range(text, "past")
    assert str(caught.value) == f"--past {text!r} is not MAX or MIN:OPT:MAX in whole numbers, for example 8 or 1:4:8"


@pytest.mark.parametrize("text", ["0", "0:1:2", "3:2:4", "1:5:4", "9:1:1"])
def test_ranges_that_are_not_ordered(text: str) -> None:
    with pytest.raises(IaptError) as caught:
        parse_range(text, "batch")
    assert str(caught.value) == f"--batch {text!r} is not ordered: expected 1 <= MIN <= OPT <= MAX"


def test_ranges_that_fit() -> None:
    check_ranges(RANGES, 4, 8192, 64)
    check_ranges(RANGES, 512, 1025, 1)


def test_all_contradictions_are_listed() -> None:
    with pytest.raises(IaptError) as caught:
        check_ranges(RANGES, 513, 1024, 65)
    assert str(caught.value) == (
        "--past 1024 cannot hold 513 prompt rows and --sequence 512; "
        "--past 1024 is more than the backbone's 1024 positions less one; give --past 1023 or less; "
        "65 adapters are more than --tenants 64"
    )


def test_ranges_that_start_too_late_are_refused() -> None:
    late = dataclasses.replace(RANGES, batch=Range(2, 4, 8), past=Range(9, 64, 1024), tenants=Range(2, 4, 64))
    with pytest.raises(IaptError) as caught:
        check_ranges(late, 4, 8192, 3, fewest=1)
    assert str(caught.value) == (
        "--batch starts at 2, but a session also serves a single row; start at 1; "
        "--past from 9 leaves out an instruction of 1 tokens after 4 prompt rows; "
        "a method has 1 tenants, --tenants starts at 2"
    )


def test_tenants_are_named_after_their_folders_unless_told(tiny_build: TinyBuild, backbone: Backbone) -> None:
    folders = tiny_build.adapters
    tenants = load_tenants([str(folders["alpha"]), f"second={folders['beta']}", f"{folders['gamma']}/"], backbone)
    assert list(tenants) == ["alpha", "second", "gamma"]
    assert [tenant.path for tenant in tenants.values()] == [folders["alpha"], folders["beta"], folders["gamma"]]
    plan = plan_tenants(tenants, backbone.model)
    assert plan.owner == dict.fromkeys(tenants, "iapt")
    assert (plan.num_slots, plan.merged) == (4, None)


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "a/b", "..", "ä/", "a\n", "-a", "a" * 129])
def test_bad_tenant_names(tiny_build: TinyBuild, backbone: Backbone, name: str) -> None:
    with pytest.raises(IaptError) as caught:
        load_tenants([f"{name}={tiny_build.adapters['alpha']}"], backbone)
    assert f"tenant name {name!r} must be up to 128 letters, digits, '-', '_' or '.'" in str(caught.value)
    assert str(caught.value).endswith("; give NAME=DIR")


def test_no_tenant_is_the_backbone_alone(backbone: Backbone) -> None:
    plan = plan_tenants(load_tenants([], backbone), backbone.model)
    assert (plan.installed, plan.owner, plan.shipped, plan.num_slots, plan.fewest) == ([], {}, {}, 0, None)
    late = dataclasses.replace(RANGES, past=Range(1, 256, 1024), tenants=Range(2, 4, 64))
    check_ranges(late, 0, 8192, 0, plan.fewest)


def test_two_tenants_of_one_name(tiny_build: TinyBuild, backbone: Backbone) -> None:
    folder = tiny_build.adapters["alpha"]
    with pytest.raises(IaptError, match="two adapters are called 'alpha'; tell them apart with --adapter NAME=DIR"):
        load_tenants([str(folder), f"alpha={tiny_build.adapters['beta']}"], backbone)
    with pytest.raises(IaptError, match="is called 'model', as the backbone is; give it a name: NAME="):
        load_tenants([f"model={folder}"], backbone)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (
            "onnxruntime:int4",
            "alpha was trained on fp32 weights, and onnxruntime serves int4; train --weights int4 trains on those",
        ),
        (
            "tensorrt-rtx:int4",
            "alpha was trained on fp32 weights, and tensorrt-rtx serves int4, rounded in TensorRT's way, which train "
            "--weights does not know\ncoarse was trained on int4 weights, and tensorrt-rtx serves int4, rounded in "
            "TensorRT's way, which train --weights does not know",
        ),
        (
            "onnxruntime:fp16",
            "coarse was trained on int4 weights, and onnxruntime serves fp32; train --weights fp32 trains on those",
        ),
    ],
)
def test_other_weights_than_those_of_training_are_said(
    tiny_build: TinyBuild,
    tmp_path: Path,
    backbone: Backbone,
    caplog: pytest.LogCaptureFixture,
    target: str,
    text: str,
) -> None:
    if target.startswith("tensorrt-rtx"):
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    coarse = save_tiny_adapter(tmp_path / "coarse", 0, backbone.fingerprint, weights="int4")
    request = tiny_build.request(tmp_path / "out", "alpha", targets=[target])
    plan = plan_build(dataclasses.replace(request, adapters=[*request.adapters, coarse]), backbone)
    tell_of_other_weights(plan.targets, plan.tenants.adapters, merged=False)
    warnings = [record.message for record in caplog.records if record.name == "iapt_export"]
    assert warnings == [f"tenant {line}" for line in text.splitlines()]


def test_a_merged_adapter_is_rounded_with_the_backbone(
    tiny_build: TinyBuild, tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it was trained on: round(W) + BA is not round(W + BA)."""
    config = LoRAConfig(rank=2)
    adapter = save_tiny_adapter(tmp_path / "lora", 0, backbone.fingerprint, config, weights="int4")
    request = dataclasses.replace(tiny_build.request(tmp_path / "out", past="1:64:160"), adapters=[adapter])
    for target, said in (("onnxruntime:int4", True), ("onnxruntime:fp32", False)):
        caplog.clear()
        plan = plan_build(dataclasses.replace(request, targets=[target], merge_lora=True), backbone)
        tell_of_other_weights(plan.targets, plan.tenants.adapters, merged=plan.tenants.merged is not None)
        assert ("serves int4, rounded after the merge; build without --merge-lora" in caplog.text) == said


def test_generation_settings_that_no_session_applies_are_said(
    backbone: Backbone, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.0, suppress_tokens=[])
    monkeypatch.setattr(backbone.model, "generation_config", sampled)
    tell_of_generation_settings(backbone)
    assert not caplog.messages, "how to sample is a request's to say"
    changed = GenerationConfig(repetition_penalty=1.1, bad_words_ids=[[5]], num_beams=3, eos_token_id=1)
    monkeypatch.setattr(backbone.model, "generation_config", changed)
    tell_of_generation_settings(backbone)
    assert "if it can: repetition_penalty=1.1, num_beams=3, bad_words_ids=[[5]]" in caplog.text


def test_training_rounds_to_the_very_floats_that_are_served(
    tiny_build: TinyBuild, tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    chosen: dict[str, Any] = {"targets": ["tensorrt-rtx:nvfp4"], "compute_capability": "12.1"}
    plan = plan_build(tiny_build.request(tmp_path / "out", "alpha", **chosen), backbone)
    tell_of_other_weights(plan.targets, plan.tenants.adapters, merged=False)
    assert [record.message for record in caplog.records if record.name == "iapt_export"] == [
        "tenant alpha was trained on fp32 weights, and tensorrt-rtx serves nvfp4; train --weights nvfp4 trains on those"
    ]


def test_an_adapter_for_another_backbone(tmp_path: Path, backbone: Backbone) -> None:
    folder = save_tiny_adapter(tmp_path / "other", 0, "another", num_layers=NUM_LAYERS + 1)
    with pytest.raises(IaptError) as caught:
        load_tenants([str(folder)], backbone)
    assert "other was trained for model, not for " in str(caught.value)
    assert "number of layers is 3 in the adapter and 2 in the backbone; fingerprint is another" in str(caught.value)


LORA = LoRAConfig(rank=2)
MERGE = "--merge-lora changes the backbone for everyone, so it needs exactly one LoRA adapter; got "
REFUSED: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "two to merge": ({"merge_lora": True}, [LORA, LORA], f"{MERGE}a (LORA), b (LORA). Without it each row chooses"),
    "merging beside another": ({"merge_lora": True}, [METHOD, LORA], f"{MERGE}a (IAPT), b (LORA). Without it"),
    "nothing to merge": ({"merge_lora": True}, [METHOD], f"{MERGE}a (IAPT). Without it each row chooses its own"),
    "nobody to merge": ({"merge_lora": True}, [], f"{MERGE}none. Without it each row chooses its own"),
    "nothing to fold": (
        {"fold_embeddings": True},
        [METHOD, LORA],
        "--fold-embeddings is for ADePT's offsets, and no adapter is of that method; leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_to_merge_or_to_fold(case: str, tmp_path: Path, backbone: Backbone) -> None:
    flags, configs, text = REFUSED[case]
    folders = [
        save_tiny_adapter(tmp_path / name, 0, backbone.fingerprint, config)
        for name, config in zip("ab", configs, strict=False)
    ]
    with pytest.raises(IaptError) as caught:
        plan_tenants(load_tenants([str(folder) for folder in folders], backbone), backbone.model, **flags)
    assert text in str(caught.value)


def test_a_merged_tenant_has_no_method(tmp_path: Path, backbone: Backbone) -> None:
    folder = save_tiny_adapter(tmp_path / "style", 0, backbone.fingerprint, LORA)
    plan = plan_tenants(load_tenants([str(folder)], backbone), backbone.model, merge_lora=True)
    assert (plan.installed, plan.owner, plan.shipped, plan.num_slots) == ([], {"style": None}, {}, 0)
    assert plan.merged is not None
