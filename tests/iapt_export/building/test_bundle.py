"""What a bundle's manifest says about its parts, and when a bundle counts as up to date."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iapt_export.building import layout as layout
from iapt_export.building.stage_cache import content_key, run_stage
from iapt_export.contract.disk import file_sha256
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest, Parity
from iapt_export.contract.sizes import BackboneSizes
from iapt_export.graphs.interface import weight_specs
from iapt_export.graphs.table import graph_specs
from tests.bundles import METHOD, TENANTS, TinyBuild, tiny_adapter
from tests.families import tiny_family
from tests.graphs import installed
from tests.test_structure import PACKAGES, ROOT, imported_modules
from tests.tiny import ARCHITECTURES, tiny_gpt2, tiny_llama, tiny_qwen3
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.insertion import sizes_of
from trainers.decoder.stored import weights_sha256

SHAPE = BackboneSizes(32, 2, 2, 8, 320)


def backbone(eos: Any, pad: int | None, tokenizer_pad: int | None, generation_eos: Any = None) -> Backbone:
    model = tiny_llama(num_hidden_layers=1)
    model.config.eos_token_id, model.config.pad_token_id = eos, pad
    model.generation_config.eos_token_id = generation_eos
    return Backbone(model, SimpleNamespace(pad_token_id=tokenizer_pad), "tiny")


@pytest.mark.parametrize(
    ("fields", "eos", "pad"),
    [
        ((2, 5, 7), [2], 7),
        ((2, 5, None), [2], 5),
        (([2, 3], None, None), [2, 3], 2),
        ((None, None, None), [], 0),
        ((0, None, None), [0], 0),
        ((2, 0, None), [2], 0),
        ((2, 5, 7, [9, 1]), [9, 1], 7),
        ((2, 5, 7, 9), [9], 7),
    ],
)
def test_end_and_padding_tokens(fields: tuple[Any, ...], eos: list[int], pad: int) -> None:
    spec = layout.backbone_spec(backbone(*fields))
    assert (spec.eos_token_ids, spec.pad_token_id) == (eos, pad)


def test_every_end_token_that_somebody_means_ends_an_answer() -> None:
    """The settings' of generation, the tokenizer's, and what training put behind answers; none out of the table."""
    made = backbone(2, 5, 400)
    made.tokenizer.eos_token_id = 3
    adapters = [tiny_adapter(0, eos_token_id=token) for token in (4, 2, None, 320, -1)]
    spec = layout.backbone_spec(made, adapters)
    assert (spec.eos_token_ids, spec.pad_token_id) == ([2, 3, 4], 5)


@pytest.mark.parametrize(("pad", "expected"), [(320, 5), (-1, 5), (319, 319)])
def test_a_padding_token_out_of_the_table_is_not_taken(pad: int, expected: int) -> None:
    assert layout.backbone_spec(backbone(2, 5, pad)).pad_token_id == expected


def test_a_configuration_without_a_padding_token_is_read() -> None:
    """CodeGen's class has none in transformers 5."""
    model = tiny_family("codegen")
    assert not hasattr(model.config, "pad_token_id")
    spec = layout.backbone_spec(Backbone(model, SimpleNamespace(pad_token_id=None), "tiny"))
    assert (spec.eos_token_ids, spec.pad_token_id) == ([1], 1)


def test_a_backbones_sizes() -> None:
    specs = {}
    for name, make in ARCHITECTURES.items():
        specs[name] = layout.backbone_spec(Backbone(make(), SimpleNamespace(pad_token_id=0), "tiny"))
    sizes = {name: (s.hidden_size, s.num_layers, s.num_kv_heads, s.head_dim, s.vocab_size) for name, s in specs.items()}
    assert sizes["llama"] == (32, 3, 2, 8, 320) and sizes["gpt2"] == (32, 3, 4, 8, 320)
    assert sizes["qwen3"][3] == 16
    assert {spec.max_positions for spec in specs.values()} == {256}


def test_a_family_that_is_not_supported_has_no_sizes() -> None:
    with pytest.raises(IaptError, match="mamba is not supported: its layers keep other state than keys and values"):
        sizes_of(tiny_family("mamba"))


def test_the_hash_of_weights_sees_every_bit_and_name() -> None:
    model = tiny_llama(num_hidden_layers=1)
    before = weights_sha256(model)
    assert before == weights_sha256(tiny_llama(num_hidden_layers=1))
    changed = copy.deepcopy(model)
    changed.model.norm.weight.data[3] += torch.finfo(torch.float32).eps
    assert weights_sha256(changed) != before
    assert len({weights_sha256(m) for m in (model, changed, tiny_gpt2(), tiny_qwen3())}) == 4


def test_one_tenants_weights_and_their_graph_inputs_have_one_order() -> None:
    (item,) = installed()
    weights = weight_specs(item, "fp16")
    specs = graph_specs([item], SHAPE, "fp16")
    for graph in ("prefill", "generator"):
        index, *stacked = [tensor for tensor in specs[graph].inputs if tensor.name.startswith("iapt.")]
        assert (index.name, index.shape) == ("iapt.tenant_index", ["batch"])
        assert [tensor.name for tensor in stacked] == [f"iapt.{weight.name}" for weight in weights]
        assert [tensor.shape for tensor in stacked] == [["tenants_iapt", *weight.shape] for weight in weights]
    assert [weight.name for weight in layout.method_spec(item).weights] == [weight.name for weight in weights]
    kinds = {weight.name: weight.dtype for weight in weights}
    assert {name for name, kind in kinds.items() if kind == "fp32"} == {"numerator", "denominator"}


def test_a_bundles_files_and_tenants(tiny_build: TinyBuild) -> None:
    manifest = BundleManifest.load(tiny_build.bundle)
    assert [tenant.name for tenant in manifest.tenants] == list(TENANTS)
    for tenant in manifest.tenants:
        source = tiny_build.adapters[tenant.name]
        weights = source / "adapter_model.safetensors"
        assert tenant.path is not None
        shipped, trained = load_file(tiny_build.bundle / tenant.path), load_file(weights)
        assert list(shipped) == list(trained) and all(torch.equal(shipped[name], trained[name]) for name in trained)
        assert (tenant.method, tenant.trained_form, tenant.trained) == ("iapt", "IAPT", None)
        assert tenant.trained_config == dataclasses.asdict(METHOD)
        assert tenant.examples is not None
        assert (tiny_build.bundle / tenant.examples).read_bytes() == (source / "examples.jsonl").read_bytes()
    found = {p.relative_to(tiny_build.bundle).as_posix() for p in tiny_build.bundle.rglob("*") if p.is_file()}
    assert found == {"manifest.json", "manifest.sha256", *manifest.files}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= found
    assert {"prefill.onnx", "decode.onnx", "generator.onnx", "weights.data", "report.json", "report.html"} <= found
    assert found.isdisjoint({"stage.json", "passes.json"}) and not any(name.endswith(".tmp") for name in found)
    notes = manifest.target().passes
    assert notes.keys() == manifest.target().graphs.keys()
    assert notes["serve"]["AddRationalBody"] == "degrees (5, 4) form B"
    assert "attentions take one product" in notes["serve"]["PackProjections"]


def test_a_manifest_says_what_was_measured(tiny_build: TinyBuild) -> None:
    manifest = BundleManifest.load(tiny_build.bundle)
    assert manifest.parity.verdict == "pass"
    report = json.loads((tiny_build.bundle / "report.json").read_text(encoding="utf-8"))
    stages = {"prefill logits", "prefill cache", "decode logits", "decode cache", "top-1 agreement", "greedy tokens"}
    for target, own in zip(report["targets"], (set(), {"generator"}), strict=True):
        measured = manifest.parity.measured[f"{target['name']}:fp32"]
        assert set(measured) == stages | own | {"refusal"}
        for stage, figures in measured.items():
            checks = [check for check in target["checks"] if check["stage"] == stage]
            worst = max(check["measured"].get("relative", 0.0) for check in checks)
            assert figures.get("relative", 0.0) == worst
    assert stages | {"generator"} <= {key.removesuffix(" fp32") for key in manifest.parity.tolerances}
    (method,) = manifest.methods
    assert (method.name, method.form, method.prompt_length, method.in_decode) == ("iapt", "IAPT", 4, False)
    assert method.config == dataclasses.asdict(METHOD)
    assert (manifest.op_domain, manifest.op_version) == ("ai.iapt", 1)
    assert {"iapt-export", "torch", "transformers", "onnx", "onnxruntime"} <= set(manifest.versions)


def test_placing_leaves_behind_what_is_no_stages_result(tmp_path: Path) -> None:
    """Its record, and what file systems and their tools put beside: a server of files, a desktop."""
    stage, _ = run_stage(tmp_path, "graphs", {}, lambda folder: (folder / "prefill.onnx").write_text("graph"))
    (stage / ".nfs0001").write_text("junk")
    (stage / "@eaDir").mkdir()
    layout.place_files(stage, tmp_path / "bundle" / "engines" / "x")
    assert [path.name for path in (tmp_path / "bundle/engines/x").iterdir()] == ["prefill.onnx"]


def test_engines_stand_in_their_targets_folder() -> None:
    specs = graph_specs(installed(), SHAPE, "fp16", capacity=64)
    engines = layout.engine_specs(specs, "tensorrt-rtx")
    assert {name: spec.path for name, spec in engines.items()} == {
        "serve_prefill": "engines/tensorrt-rtx/serve_prefill.engine",
        "serve_decode": "engines/tensorrt-rtx/serve_decode.engine",
    }
    assert engines["serve_decode"].inputs == specs["serve_decode"].inputs
    assert layout.engine_graphs(graph_specs(installed(), SHAPE, "fp16")) == ("prefill", "decode")


def key(build: TinyBuild, settings: dict[str, Any] | None = None, order: tuple[str, ...] = TENANTS) -> str:
    spec = layout.backbone_spec(load_backbone(str(build.model)))
    tenants = {name: load_adapter(build.adapters[name]) for name in order}
    return content_key(layout.build_inputs(spec, tenants, settings or {"seed": 0}))


def test_the_build_key_covers_what_went_in(tiny_build: TinyBuild, tmp_path: Path) -> None:
    before = key(tiny_build)
    assert key(tiny_build) == before
    others = [
        key(tiny_build, {"seed": 1}),
        key(tiny_build, order=("beta", "alpha", "gamma")),
        key(tiny_build, order=TENANTS[:2]),
    ]
    for file in ("adapter_config.json", "adapter_model.safetensors", "examples.jsonl"):
        changed = Path(shutil.copytree(tiny_build.adapters["beta"], tmp_path / file))
        adapter = load_adapter(changed)
        (changed / file).write_bytes((changed / file).read_bytes() + b"\n")
        spec = layout.backbone_spec(load_backbone(str(tiny_build.model)))
        tenants = {name: load_adapter(tiny_build.adapters[name]) for name in TENANTS} | {"beta": adapter}
        others.append(content_key(layout.build_inputs(spec, tenants, {"seed": 0})))
    (changed / "README.md").write_text("a model card changes nothing")
    assert len({before, *others}) == 1 + len(others)


def test_when_a_bundle_is_current(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = BundleManifest.load(tiny_bundle)
    assert layout.is_current(tiny_bundle, manifest.build_key, None)
    assert not layout.is_current(tiny_bundle, "another key", None)
    assert not layout.is_current(tmp_path / "nothing", manifest.build_key, None)
    for verdict in ("fail", "not run"):
        dataclasses.replace(manifest, parity=Parity(verdict)).save(tiny_bundle)
        assert not layout.is_current(tiny_bundle, manifest.build_key, None)
    manifest.save(tiny_bundle)
    assert layout.is_current(tiny_bundle, manifest.build_key, None)
    (tiny_bundle / "decode.onnx").write_bytes(b"")
    assert not layout.is_current(tiny_bundle, manifest.build_key, None)


def test_an_exports_versions_are_those_of_the_packages_that_it_uses() -> None:
    versions = layout.export_versions()
    assert set(versions) >= {"torch", "transformers", "onnx", "onnxscript", "code"} and "onnxruntime" not in versions
    assert layout.export_versions(quantises=True) == versions | {"onnxruntime": metadata.version("onnxruntime")}


def graphs_code() -> str:
    return layout.export_versions()["code"]


def engines_code() -> str:
    return layout.engine_versions("1.7.1")["code"]


@pytest.mark.parametrize(
    ("rooms", "code"), [(layout.EXPORTING_ROOMS, graphs_code), (layout.ENGINE_ROOMS, engines_code)]
)
def test_a_change_of_a_file_of_its_rooms_makes_a_stage_anew(
    rooms: tuple[str, ...], code: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first and the last file of each folder stand for all."""
    honest = code()
    for package in layout.BUNDLE_ROOMS:
        shutil.copytree(layout.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "cpp"))
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    read = functools.cache(lambda path, size: file_sha256(path))  # each file twice, not at every look
    monkeypatch.setattr(layout, "file_sha256", lambda path: read(path, path.stat().st_size))
    assert code() == honest, "the key does not depend on where the project stands"
    bundle = layout.code_sha256(layout.BUNDLE_ROOMS)
    folders = [sorted(folder.glob("*.py")) for folder in tmp_path.rglob("*") if folder.is_dir()]
    for path in [file for files in folders for file in dict.fromkeys((*files[:1], *files[-1:]))]:
        text = path.read_bytes()
        path.write_bytes(text + b"#")
        changes = any(path.is_relative_to(tmp_path / room) for room in rooms)
        assert (code() != honest) == changes, path
        assert layout.code_sha256(layout.BUNDLE_ROOMS) != bundle, path
        path.write_bytes(text)
    (tmp_path / rooms[0] / "new.py").touch()
    assert code() != honest


def test_an_engines_key_covers_runtime_and_plugin(tmp_path: Path) -> None:
    keys = [layout.engine_versions("1.7.1"), layout.engine_versions("1.7.2")]
    for number in range(2):
        (tmp_path / "plugin.so").write_bytes(b"%d" % number)
        keys.append(layout.engine_versions("1.7.1", tmp_path / "plugin.so"))
    assert len({content_key(key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("start", "rooms"),
    [("iapt_export.graphs.export", layout.EXPORTING_ROOMS), ("engines.tensorrt.builder", layout.ENGINE_ROOMS)],
)
def test_the_rooms_hold_everything_that_a_stage_imports(start: str, rooms: tuple[str, ...]) -> None:
    waiting, seen = [start], set[str]()
    while waiting:
        module = waiting.pop()
        place = ROOT / module.replace(".", "/")
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if module in seen:
            continue
        seen.add(module)
        waiting += [name for _, name in imported_modules(path) if name.split(".")[0] in PACKAGES]
        assert any(path.is_relative_to(ROOT / room) for room in rooms), module
    assert len(seen) > 5
