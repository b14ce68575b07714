"""Bad input and bad luck: an exact exit code, a text that helps, and nothing half-written anywhere."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.serving.tenants import TenantBank
from tests.bundles import METHOD, Outcome, TinyBuild, change_manifest, run, save_tiny_adapter
from tests.thorough import default_for
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import PromptTuningConfig

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tiny_build: TinyBuild, tmp_path: Path) -> Path:
    """A copy of an adapter that a test may damage."""
    return Path(shutil.copytree(tiny_build.adapters["beta"], tmp_path / "beta"))


def build_with(build: TinyBuild, adapter: Path, output: Path, *flags: str) -> Outcome:
    outcome = run(*dataclasses.replace(build, adapters={"beta": adapter}).arguments(output), *flags)
    assert outcome.code == 0 or (not output.exists() and "Traceback" not in outcome.err)
    return outcome


def set_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS), name: tensor}, folder / WEIGHTS)


def set_field(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda a: (a / WEIGHTS).unlink(),
            "adapter_model.safetensors is missing; weights are read from safetensors only",
        ),
        (lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-9]), "is not a whole safetensors file"),
        (lambda a: torch.save({}, a / WEIGHTS), "is not a whole safetensors file"),
        (lambda a: set_tensor(a, "query", torch.full((2, 8, 4), torch.nan)), "tensor query holds NaN or infinity"),
        (lambda a: set_tensor(a, "extra", torch.zeros(1)), "tensor extra is not part of the method"),
        (lambda a: set_field(a, peft_type="BITFIT"), "peft_type 'BITFIT' is not a known method; known: IAPT, ADEPT"),
        (lambda a: set_field(a, colour="blue"), "unknown field colour; known fields are"),
        (lambda a: set_field(a, schema_version=2), "schema_version is 2, this version reads 1; upgrade iapt-export"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json is not JSON"),
        (lambda a: shutil.rmtree(a), "adapter_config.json is missing; expected an adapter directory"),
        (lambda a: (a / "examples.jsonl").write_text("nonsense"), ':1: expected a JSON object like {"prompt": "..."}'),
    ],
)
def test_bad_adapters(
    tiny_build: TinyBuild, adapter: Path, tmp_path: Path, damage: Callable[[Path], Any], text: str
) -> None:
    damage(adapter)
    outcome = build_with(tiny_build, adapter, tmp_path / "bundle")
    assert outcome.code == 1 and text in outcome.err, outcome.err
    assert not list(tmp_path.glob(".*building*"))


def test_an_adapter_for_another_backbone(tiny_build: TinyBuild, tmp_path: Path) -> None:
    other = save_tiny_adapter(tmp_path / "other", 0, "feedfeedfeedfeed", METHOD, hidden_size=64)
    outcome = build_with(tiny_build, other, tmp_path / "bundle")
    assert outcome.code == 1
    assert "was trained for model, not for" in outcome.err
    assert "hidden size is 64 in the adapter and 32 in the backbone; fingerprint is feedfeedfeedfeed" in outcome.err
    assert "Give its own backbone with --model" in outcome.err


def test_adapters_that_cannot_share_a_bundle(tiny_build: TinyBuild, tmp_path: Path) -> None:
    fingerprint = load_backbone(str(tiny_build.model)).fingerprint
    other = save_tiny_adapter(tmp_path / "other", 0, fingerprint, dataclasses.replace(METHOD, numerator_degree=3))
    outcome = build_with(tiny_build, other, tmp_path / "bundle", f"--adapter={tiny_build.adapters['alpha']}")
    assert outcome.code == 1
    assert "the rational activations differ (degrees (3, 4) form B and degrees (5, 4) form B)" in outcome.err
    assert "a graph holds one body of the operator; build one bundle for each" in outcome.err


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--merge-lora", "--merge-lora changes the backbone for everyone, so it needs exactly one LoRA adapter; got"),
        ("--fold-embeddings", "--fold-embeddings is for ADePT's offsets, and no adapter is of that method"),
    ],
)
def test_flags_of_methods_that_are_not_there(
    tiny_build: TinyBuild, adapter: Path, tmp_path: Path, flag: str, text: str
) -> None:
    outcome = build_with(tiny_build, adapter, tmp_path / "bundle", flag)
    assert outcome.code == 1 and text in outcome.err, outcome.err
    assert "tracing" not in outcome.err, "refused before long work"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--target=openvino"], "target 'openvino' is not known; use one of onnxruntime, tensorrt-rtx, tensorrt"),
        (
            ["--target=onnxruntime:int2"],
            "dtype 'int2' of target 'onnxruntime:int2' is not known; use one of fp32, fp16, bf",
        ),
        (["--dtype=float32"], "dtype 'float32' of target 'onnxruntime' is not known"),
        (["--dtype=bf16"], "ONNX Runtime multiplies no bf16 matrices on the CPU"),
        (["--opset=22"], "opset 22 is not supported; use one of 20, 23"),
        (["--target=onnxruntime", "--target=onnxruntime"], "target 'onnxruntime' is given twice"),
        (["--compute-capability=8.9"], "--compute-capability is for TensorRT targets; add --target tensorrt-rtx"),
        (["--rational=plugin"], "--rational plugin is for TensorRT targets; add --target tensorrt or leave it out"),
        (
            ["--target=tensorrt", "--rational=plugin", "--opset=20"],
            "--rational plugin needs a graph over a cache that is written in place, which opset 20 does not have: "
            "engines come from the portable graphs then, where the activation is written in standard operators; "
            "leave out --opset",
        ),
        (["--target=tensorrt-rtx", "--rational=plugin"], "target tensorrt-rtx has no plugins (--rational plugin)"),
        (["--target=tensorrt-rtx", "--compute-capability=9.0"], "compute capability '9.0' is not supported"),
        (["--batch=many"], "--batch 'many' is not MAX or MIN:OPT:MAX in whole numbers"),
        (["--past=4:3:2"], "--past '4:3:2' is not ordered"),
        (["--past=99"], "--past 99 cannot hold 4 prompt rows and --sequence 96"),
        (["--past=256"], "--past 256 is more than the backbone's 256 positions less one"),
        (["--tenants=1"], "2 adapters are more than --tenants 1"),
        (["--new-tokens=157"], "tenant beta: no example prompt has at most 0 tokens, so nothing to compare; raise"),
        (
            ["--model=/nowhere/model"],
            "the backbone folder /nowhere/model does not exist; check the path given with --model",
        ),
    ],
)
def test_bad_flags(tiny_build: TinyBuild, adapter: Path, tmp_path: Path, flags: list[str], text: str) -> None:
    second = f"--adapter=second={tiny_build.adapters['alpha']}"
    outcome = build_with(tiny_build, adapter, tmp_path / "bundle", second, *flags)
    assert outcome.code == 1 and text in outcome.err, outcome.err
    assert "tracing" not in outcome.err, "refused before long work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beta"]


@pytest.mark.parametrize("kind", ["file", "folder", "web app"])
def test_an_output_that_is_not_ours_is_left_alone(tiny_build: TinyBuild, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind != "file":
        output.mkdir()
    mine = output if kind == "file" else output / ("manifest.json" if kind == "web app" else "thesis.txt")
    mine.write_text('{"name": "years of work"}')
    outcome = run(*tiny_build.arguments(output))
    assert outcome.code == 1
    assert f"--output {output} exists and is not a bundle; nothing was changed. Give another --output" in outcome.err
    assert mine.read_text() == '{"name": "years of work"}'
    assert [path.name for path in tmp_path.rglob("*") if path != output] == ([] if kind == "file" else [mine.name])


PLACES = [
    "iapt_export.building.layout.place_files",
    "iapt_export.building.layout.place_tenants",
    "iapt_export.contract.manifest.BundleManifest.save",
    "iapt_export.building.build.validate_bundle",
    "iapt_export.building.build.write_report",
    "iapt_export.building.build.publish",
]


def stop_at(monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(place, stop)


@pytest.mark.parametrize("place", default_for(lambda place: place in (PLACES[0], PLACES[-1]), PLACES))
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            KeyboardInterrupt(),
            130,
            "interrupted; nothing was left half-written, and a repeated build goes on where this",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "/bundle; free space, then run the command again",
        ),
    ],
    ids=["interrupt", "full disk"],
)
def test_a_build_that_stops_in_the_middle(
    tiny_build: TinyBuild,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    output = tmp_path / "bundle"
    stop_at(monkeypatch, place, error)
    outcome = run(*tiny_build.arguments(output, "alpha"))
    assert outcome.code == code and text in outcome.err, outcome.err
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_goes_on_from_finished_stages(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    stop_at(monkeypatch, PLACES[3], KeyboardInterrupt())
    assert run(*tiny_build.arguments(output)).code == 130
    monkeypatch.undo()
    outcome = run(*tiny_build.arguments(output))
    assert outcome.code == 0, outcome.err
    assert "graphs are up to date" in outcome.err and "tracing" not in outcome.err
    manifest = (output / "manifest.json").read_bytes()
    assert manifest == (tiny_build.bundle / "manifest.json").read_bytes(), "as if nothing had happened"


def test_an_export_that_stops_leaves_no_stage(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, "iapt_export.graphs.export.trace_graph", KeyboardInterrupt())
    outcome = run(*tiny_build.arguments(tmp_path / "bundle", cache=tmp_path / "cache"))
    assert outcome.code == 130 and "tracing prefill.onnx" in outcome.err
    assert [path.name for path in tmp_path.rglob("*")] == ["cache"]


def test_an_old_bundle_survives_a_failed_build(
    tiny_build: TinyBuild, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in tiny_bundle.rglob("*") if path.is_file()}
    stop_at(monkeypatch, PLACES[4], OSError(errno.ENOSPC, "No space left on device"))
    assert run(*tiny_build.arguments(tiny_bundle, "beta")).code == 1
    assert {path.name: path.read_bytes() for path in tiny_bundle.rglob("*") if path.is_file()} == before
    assert [path.name for path in tiny_bundle.parent.iterdir()] == ["bundle"]


def test_a_build_that_differs_from_pytorch_is_not_published(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TenantBank.indices
    monkeypatch.setattr(
        TenantBank, "indices", lambda *args: {name: array[::-1].copy() for name, array in honest(*args).items()}
    )
    output = tmp_path / "bundle"
    outcome = run(*tiny_build.arguments(output))
    assert outcome.code == 3
    assert "onnxruntime fp32 differs from PyTorch in" in outcome.err
    assert f"Nothing was written to {output}; the report is {tmp_path / 'bundle-failed-report'}" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle-failed-report"]
    report = json.loads((tmp_path / "bundle-failed-report/report.json").read_text(encoding="utf-8"))
    assert (report["verdict"], report["bundle"]) == ("fail", "bundle")


@pytest.mark.parametrize("command", ["validate", "generate"])
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda b: (b / "decode.onnx").unlink(), "is damaged: decode.onnx is missing"),
        (lambda b: (b / "weights.data").write_bytes(b"short"), "weights.data has 5 bytes, expected"),
        (
            lambda b: (b / "config.json").write_bytes(b"X" + (b / "config.json").read_bytes()[1:]),
            "config.json was altered",
        ),
        (lambda b: (b / "manifest.json").unlink(), "holds no manifest.json; expected a bundle written by"),
        (lambda b: (b / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (lambda b: change_manifest(b, schema_version=1), "schema_version is 1, this version of iapt-export reads 2"),
        (lambda b: change_manifest(b, colour="blue"), "manifest.colour is not a known field"),
        (
            lambda b: change_manifest(b, files={"../x": {"sha256": "0" * 64, "size_bytes": 0}}),
            "path '../x' leaves the bundle",
        ),
    ],
)
def test_damaged_bundles(tiny_bundle: Path, command: str, damage: Callable[[Path], Any], text: str) -> None:
    damage(tiny_bundle)
    flags = ["--tenant=alpha", "--prompt=yes"] if command == "generate" else []
    outcome = run(command, tiny_bundle, *flags)
    assert (outcome.code, outcome.out) == (1, "")
    assert text in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--tenant=delta", "--prompt=yes"],
            "tenant 'delta' is not in this bundle; its tenants are alpha, beta, gamma",
        ),
        (["--tenant=alpha", "--prompt="], "the prompt is empty; expected an instruction of at least one word"),
        (
            ["--tenant=alpha", "--prompt=" + "the film " * 200],
            "tokens; this bundle takes at most 96 (shorten it, or build",
        ),
        (["--tenant=alpha", "--prompt=yes", "--max-new-tokens=999"], "cache entries (4 prompt, 3 instruction"),
        (["--tenant=alpha", "--prompt=yes", "--max-new-tokens=0"], "max_new_tokens is 0, expected at least 1"),
        (["--tenant=alpha", "--prompt=yes", "--temperature=-1"], "temperature -1.0 is negative; use 0 for greedy"),
        (["--tenant=alpha", "--prompt=yes", "--top-p=0"], "top_p 0.0 is out of range"),
        (
            ["--tenant=alpha", "--prompt=yes", "--target=tensorrt"],
            "target 'tensorrt' is not in this bundle, which has onnx",
        ),
        (["--tenant=alpha", "--prompt=yes", "--device=cuda"], "device 'cuda' is not available"),
    ],
)
def test_bad_questions(tiny_build: TinyBuild, flags: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    outcome = run("generate", tiny_build.bundle, *flags)
    assert (outcome.code, outcome.out) == (1, "")
    assert text in outcome.err, outcome.err


@pytest.mark.parametrize("command", ["validate", "tenant"])
def test_a_backbone_that_the_manifest_names_relative_to_another_folder(
    tiny_build: TinyBuild, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    fields = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))["backbone"]
    change_manifest(tiny_bundle, backbone={**fields, "name_or_path": "models/tiny"})
    monkeypatch.chdir(tiny_bundle.parent)
    # a method of which the file holds what is computed with the backbone
    adapter = save_tiny_adapter(
        tiny_bundle.parent / "style", 0, fields["fingerprint"], PromptTuningConfig(prompt_length=4)
    )
    words = (adapter, "--bundle", tiny_bundle, "--output", "t.safetensors") if command == "tenant" else (tiny_bundle,)
    outcome = run(command, *words)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert f"was built from the backbone 'models/tiny', which is no folder as seen from {Path.cwd()}" in outcome.err
    assert "give its folder or id with --model" in outcome.err and "huggingface.co" not in outcome.err
    assert not Path("t.safetensors").exists()
    Path("models").mkdir()
    Path("models/tiny").symlink_to(tiny_build.model)
    if command == "tenant":
        assert "has no method PROMPT_TUNING" in run(command, *words).err, "the backbone was found"


@pytest.mark.parametrize("place", ["report", "tenants", "new/report"])
def test_a_report_is_not_written_into_a_bundle(tiny_bundle: Path, place: str) -> None:
    before = sorted(tiny_bundle.rglob("*"))
    outcome = run("validate", tiny_bundle, f"--report={tiny_bundle / place}")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    damaged = f"--report {tiny_bundle / place} is inside the bundle {tiny_bundle}, which it would damage"
    assert f"{damaged}; write it elsewhere" in outcome.err
    assert sorted(tiny_bundle.rglob("*")) == before
