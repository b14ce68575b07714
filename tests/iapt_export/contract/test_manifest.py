"""``manifest.json``: what is written is read, the bytes are stable, and everything else is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iapt_export.contract import manifest as module
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.integrity import verify_files
from iapt_export.contract.manifest import (
    BackboneSpec,
    BundleManifest,
    FileSpec,
    GraphSpec,
    MethodSpec,
    Parity,
    Range,
    Ranges,
    TargetSpec,
    TenantSpec,
    TensorSpec,
    file_sha256,
    write_atomically,
)
from tests.bundles import seal


def example(bundle: Path) -> BundleManifest:
    """A small manifest, with the files that it names."""
    names = ("movies", "style", "jokes", "trained/merged")
    contents = {
        "prefill.onnx": b"one",
        "decode.onnx": b"",
        "notes": b"",
        **{f"tenants/{name}.safetensors": b"two" for name in names},
    }
    files = {}
    for name, data in contents.items():
        path = bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files[name] = FileSpec(file_sha256(path), len(data))
    ids = TensorSpec("input_ids", "int64", ["batch", "sequence"])
    logits = TensorSpec("logits", "fp16", ["batch", 1, 320])
    return BundleManifest(
        versions={"iapt-export": "0.1.0"},
        build_key="0123456789abcdef",
        backbone=BackboneSpec(
            hidden_size=32,
            num_layers=2,
            num_kv_heads=2,
            head_dim=8,
            vocab_size=320,
            name_or_path="tiny/ünïcode",
            revision=None,
            fingerprint="f",
            weights_sha256="w",
            model_type="llama",
            max_positions=256,
            eos_token_ids=[1, 2],
            pad_token_id=0,
        ),
        methods=[
            MethodSpec("iapt", "IAPT", {"bottleneck": 8, "bias": True}, 4, [TensorSpec("query", "fp32", [2, 8, 4])]),
            MethodSpec("lora", "LORA", {"rank": 2}, 0, [TensorSpec("a", "fp32", [2, 2, 32])], in_decode=True),
        ],
        ranges=Ranges(Range(1, 4, 8), Range(1, 16, 64), Range(5, 64, 128), Range(1, 3, 4)),
        tenants=[
            TenantSpec("style", "lora", "tenants/style.safetensors", "LORA", {"rank": 2}, "plain"),
            TenantSpec("movies", "iapt", "tenants/movies.safetensors", "IAPT", {}, "chat", ["good", "bad"]),
            TenantSpec("merged", None, None, "LORA", {}, "plain", trained="tenants/trained/merged.safetensors"),
            TenantSpec("jokes", "lora", "tenants/jokes.safetensors", "LORA", {"rank": 2}, "plain"),
        ],
        op_domain="ai.iapt",
        op_version=1,
        targets=[
            TargetSpec(
                "onnxruntime",
                "fp16",
                23,
                {name: GraphSpec(f"{name}.onnx", [ids], [logits]) for name in ("prefill", "decode")},
                "1.31",
            )
        ],
        parity=Parity("pass", {"prefill logits fp16": {"relative": 0.05}}, {"x": {"y": {"relative": 1e-3}}}),
        files=files,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    example(tmp_path).save(tmp_path)
    return tmp_path


def change(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    edit(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    seal(bundle)


def refusal(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        BundleManifest.load(bundle)
    return str(caught.value)


def test_round_trip(bundle: Path) -> None:
    assert BundleManifest.load(bundle) == example(bundle)
    verify_files(bundle, BundleManifest.load(bundle))


def test_bytes_are_stable(bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    BundleManifest.load(bundle).save(bundle)
    assert (bundle / "manifest.json").read_bytes() == before
    assert before.endswith(b"}\n") and before.index(b'"backbone"') < before.index(b'"build_key"') < before.index(
        b'"files"'
    )


def test_the_order_of_fields_and_files_changes_no_byte(bundle: Path, tmp_path: Path) -> None:
    original = example(bundle)
    reordered = dataclasses.replace(original, files=dict(reversed(original.files.items())))
    other = tmp_path / "other"
    other.mkdir()
    reordered.save(other)
    assert (other / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()


def test_a_real_bundle_round_trips(tiny_bundle: Path) -> None:
    before = (tiny_bundle / "manifest.json").read_bytes()
    manifest = BundleManifest.load(tiny_bundle)
    manifest.save(tiny_bundle)
    assert (tiny_bundle / "manifest.json").read_bytes() == before
    verify_files(tiny_bundle, manifest)


def test_missing(tmp_path: Path) -> None:
    for folder, found in ((tmp_path, "a folder that is nothing of ours"), (tmp_path / "nothing", "nothing there")):
        text = f"{folder} holds no manifest.json; expected a bundle written by 'iapt-export build', found {found}"
        assert refusal(folder) == text


@pytest.mark.parametrize("data", [b"{", b"", b"\xff\xfe{}", b"{'schema_version': 2}"])
def test_not_json(bundle: Path, data: bytes) -> None:
    (bundle / "manifest.json").write_bytes(data)
    assert "manifest.json is not JSON: " in refusal(bundle) and "build the bundle again" in refusal(bundle)


@pytest.mark.parametrize("keep", [10, 400, -3])
def test_truncated(bundle: Path, keep: int) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    assert "is not JSON" in refusal(bundle)


@pytest.mark.parametrize(("version", "shown"), [(1, "1"), (3, "3"), (0, "0"), ("2", "'2'"), (None, "None")])
def test_another_schema(bundle: Path, version: Any, shown: str) -> None:
    change(bundle, lambda fields: fields.update(schema_version=version, colour="blue"))
    text = refusal(bundle)
    remedy = "build the bundle again" if version in (0, 1) else "upgrade iapt-export, or build the bundle again"
    assert f"schema_version is {shown}, this version of iapt-export reads 2; {remedy}" in text
    assert "colour" not in text, "fields of another schema say nothing"


@pytest.mark.parametrize("data", [b"[]", b"3", b'"text"', b"null"])
def test_another_kind_of_json(bundle: Path, data: bytes) -> None:
    (bundle / "manifest.json").write_bytes(data)
    assert "schema_version is None" in refusal(bundle)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda f: f.pop("tenants"), "manifest.tenants is missing"),
        (lambda f: f["backbone"].pop("vocab_size"), "manifest.backbone.vocab_size is missing"),
        (lambda f: f["tenants"][0].pop("trained_form"), "manifest.tenants[0].trained_form is missing"),
        (lambda f: f["tenants"][0].update(method=3), "manifest.tenants[0].method is 3, expected str | None"),
        (lambda f: f.pop("methods"), "manifest.methods is missing"),
        (lambda f: f["methods"][0].pop("form"), "manifest.methods[0].form is missing"),
        (lambda f: f["methods"][1].update(in_decode=1), "manifest.methods[1].in_decode is 1, expected bool"),
        (
            lambda f: f["tenants"][1].update(method="adept"),
            "tenant movies is of method 'adept', which the manifest does not describe",
        ),
        (
            lambda f: f["tenants"][2].update(trained=None),
            "tenant merged names no weights, neither as path nor as trained",
        ),
        (lambda f: f.update(colour="blue"), "manifest.colour is not a known field"),
        (lambda f: f["parity"].update(luck=1), "manifest.parity.luck is not a known field"),
        (lambda f: f.update(build_key=7), "manifest.build_key is 7, expected str"),
        (lambda f: f["targets"][0].update(quantise=64), "manifest.targets[0].quantise is 64, expected str"),
        (lambda f: f.update(tenants={}), "manifest.tenants is {}, expected list"),
        (lambda f: f.update(files=[]), "manifest.files is [], expected dict"),
        (lambda f: f.update(backbone=None), "manifest.backbone is None, expected an object"),
        (lambda f: f["backbone"].update(num_layers="2"), "manifest.backbone.num_layers is '2', expected int"),
        (lambda f: f["backbone"].update(num_layers=True), "manifest.backbone.num_layers is True, expected int"),
        (lambda f: f["backbone"].update(head_dim=0), "manifest.backbone: head_dim is 0, expected 1 to 16777216"),
        (
            lambda f: f["backbone"].update(max_positions=-1),
            "manifest.backbone: max_positions is -1, expected 1 to 2147483648",
        ),
        (lambda f: f["backbone"].update(num_layers=2.0), "manifest.backbone.num_layers is 2.0, expected int"),
        (lambda f: f["backbone"].update(revision=3), "manifest.backbone.revision is 3, expected str | None"),
        (
            lambda f: f["backbone"].update(eos_token_ids=[1, "2"]),
            "manifest.backbone.eos_token_ids[1] is '2', expected int",
        ),
        (
            lambda f: f["targets"][0]["graphs"]["prefill"]["inputs"][0].update(shape=["batch", 1.5]),
            "manifest.targets[0].graphs.prefill.inputs[0].shape[1] is 1.5, expected int | str",
        ),
        (
            lambda f: f["files"]["notes"].update(size_bytes=None),
            "manifest.files.notes.size_bytes is None, expected int",
        ),
        (lambda f: f["ranges"]["batch"].update(min=9), "range 9/4/8 is not ordered: expected 1 <= min <= opt <= max"),
        (lambda f: f["ranges"]["past"].update(min=0), "range 0/64/128 is not ordered"),
        (lambda f: f["ranges"]["past"].update(max=10**12), "range ends at 1000000000000, expected at most 2147483648"),
        (lambda f: f["ranges"]["past"].update(max=10**19), "ranges.past.max is 10000000000000000000, expected int"),
        (lambda f: f["backbone"].update(num_layers=10**7), "num_layers is 10000000, expected 1 to 10000"),
        (lambda f: f["backbone"].update(value_dim=-1), "value_dim is -1, expected 0 to 16777216"),
        (lambda f: f["backbone"].update(pad_token_id=320), "token id 320 is not in the vocabulary of 320"),
        (lambda f: f["backbone"].update(eos_token_ids=[1, -1]), "token id -1 is not in the vocabulary of 320"),
        (lambda f: f["methods"][0].update(prompt_length=-1), "prompt_length is -1, expected 0 to 16777216"),
        (lambda f: f["methods"][0]["weights"][0].update(shape=[2, -8, 4]), "expected no negative size"),
        (
            lambda f: f["methods"][0]["weights"][0].update(dtype="fp8"),
            "dtype of query is 'fp8', expected one of int64, int32",
        ),
        (
            lambda f: f["tenants"][0].update(prompt_format="html"),
            "prompt_format is 'html', expected chat, plain or newline",
        ),
        (lambda f: f["files"]["notes"].update(size_bytes=-1), "expected a SHA-256 in 64 hex digits and a size"),
        (lambda f: f["files"]["notes"].update(sha256="0"), "expected a SHA-256 in 64 hex digits and a size"),
        (lambda f: f["tenants"][0].update(name="movies"), "tenant movies is named twice"),
        (lambda f: f["targets"].append(f["targets"][0]), "target onnxruntime is named twice"),
        (
            lambda f: f["targets"][0]["graphs"].pop("decode"),
            "target onnxruntime has no graphs that read instructions and go on from them",
        ),
    ],
)
def test_bad_fields(bundle: Path, edit: Callable[[dict[str, Any]], Any], text: str) -> None:
    change(bundle, edit)
    assert text in refusal(bundle) and "manifest.json is not a valid manifest: " in refusal(bundle)


def test_problems_are_shown_together(bundle: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        del fields["versions"]
        fields["colour"] = "blue"
        fields["backbone"]["hidden_size"] = "wide"
        fields["tenants"][0]["labels"] = "good"
        fields["targets"][0].pop("opset")

    change(bundle, edit)
    text = refusal(bundle)
    for part in (
        "versions is missing",
        "colour is not",
        "hidden_size is 'wide'",
        "labels is 'good'",
        "opset is missing",
    ):
        assert part in text
    assert text.count("; ") == 4


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret", "tenants/../../secret", "a//b", "./a", "..", "", "a\\..\\b", "a/."]
)
@pytest.mark.parametrize("place", ["tenant", "trained", "examples", "graph", "file"])
def test_paths_that_leave_the_bundle(bundle: Path, place: str, path: str) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if place == "tenant":
            fields["tenants"][0]["path"] = path
        elif place == "trained":
            fields["tenants"][2]["trained"] = path
        elif place == "examples":
            fields["tenants"][0]["examples"] = path
        elif place == "graph":
            fields["targets"][0]["graphs"]["prefill"]["path"] = path
        else:
            fields["files"][path] = fields["files"]["notes"]

    change(bundle, edit)
    assert f"path {path!r} leaves the bundle; expected a relative path without '..'" in refusal(bundle)


def test_missing_truncated_and_altered_files_are_listed_together(bundle: Path) -> None:
    (bundle / "notes").unlink()
    (bundle / "prefill.onnx").write_bytes(b"on")
    (bundle / "tenants/movies.safetensors").write_bytes(b"twO")
    with pytest.raises(BundleError) as caught:
        verify_files(bundle, BundleManifest.load(bundle))
    text = str(caught.value)
    assert text.startswith(f"{bundle} is damaged: ") and text.endswith("Copy or build the bundle again")
    assert "notes is missing" in text
    assert "prefill.onnx has 2 bytes, expected 3" in text
    assert "tenants/movies.safetensors was altered: its SHA-256 differs from the manifest's" in text


def test_a_used_file_must_have_a_hash(bundle: Path) -> None:
    change(bundle, lambda fields: fields["files"].pop("prefill.onnx"))
    with pytest.raises(BundleError, match=r"prefill\.onnx is used but has no hash"):
        verify_files(bundle, BundleManifest.load(bundle))


def test_looking_up_targets_and_tenants(bundle: Path) -> None:
    manifest = BundleManifest.load(bundle)
    assert manifest.target() is manifest.target("onnxruntime") is manifest.targets[0]
    assert manifest.tenant("movies") is manifest.tenants[1]
    with pytest.raises(
        BundleError, match="target 'tensorrt' is not in this bundle, which has onnxruntime; build again"
    ):
        manifest.target("tensorrt")
    with pytest.raises(
        BundleError, match="tenant 'films' is not in this bundle; its tenants are style, movies, merged, jokes"
    ):
        manifest.tenant("films")
    assert issubclass(BundleError, IaptError)


def test_tenants_and_slots_of_methods(bundle: Path) -> None:
    """A tenant's place among its method's is its number in the graphs; slots are those of the longest method."""
    manifest = BundleManifest.load(bundle)
    names = {method.name: [tenant.name for tenant in manifest.tenants_of(method.name)] for method in manifest.methods}
    assert names == {"iapt": ["movies"], "lora": ["style", "jokes"]}
    assert [manifest.prompt_length(tenant.name) for tenant in manifest.tenants] == [0, 4, 0, 0]
    assert manifest.num_slots == 4
    alone = dataclasses.replace(manifest, methods=[], tenants=manifest.tenants[2:3])
    assert (alone.num_slots, alone.prompt_length("merged")) == (0, 0)


@pytest.mark.parametrize(("tenant", "field"), [(0, "path"), (2, "trained")])
def test_every_tenants_files_must_have_a_hash(bundle: Path, tenant: int, field: str) -> None:
    path = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["tenants"][tenant][field]
    change(bundle, lambda fields: fields["files"].pop(path))
    with pytest.raises(BundleError, match=f"{path} is used but has no hash"):
        verify_files(bundle, BundleManifest.load(bundle))


def test_writing_is_whole_or_not_at_all(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle / "manifest.json").read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        dataclasses.replace(example(bundle), build_key="other").save(bundle)
    assert (bundle / "manifest.json").read_bytes() == before
    monkeypatch.undo()
    write_atomically(bundle / "notes", b"new")
    assert (bundle / "notes").read_bytes() == b"new"


def test_reading_needs_no_package(tiny_bundle: Path) -> None:
    """Isolated and without site-packages, as far from torch as it goes."""
    root = Path(module.__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from pathlib import Path\n"
        "from iapt_export.contract.integrity import verify_files\n"
        "from iapt_export.contract.manifest import BundleManifest\n"
        f"bundle = Path({str(tiny_bundle)!r})\n"
        "verify_files(bundle, BundleManifest.load(bundle))\n"
        "print(len(BundleManifest.load(bundle).tenants))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
