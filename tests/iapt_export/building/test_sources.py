"""What a build is made of: whatever of its sources changes, the next build sees it, and none keeps half of a change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.serving.session import Request, Session
from iapt_export import build
from iapt_export.building.build import foresee
from iapt_export.contract.errors import IaptError
from tests.bundles import METHOD, TinyBuild, save_tiny_adapter
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import LoRAConfig


@pytest.fixture
def made(tiny_build: TinyBuild, tmp_path: Path) -> TinyBuild:
    """A build of its own, with copies of the model and one adapter; nothing is proven, so that it takes seconds."""
    model = Path(shutil.copytree(tiny_build.model, tmp_path / "model"))
    adapter = Path(shutil.copytree(tiny_build.adapters["gamma"], tmp_path / "gamma"))
    return TinyBuild(model, {"gamma": adapter}, tmp_path / "cache", tmp_path / "bundle")


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def epsilons(bundle: Path) -> set[float]:
    graph = onnx.load(bundle / "prefill.onnx", load_external_data=False).graph
    return {round(a.f, 8) for node in graph.node for a in node.attribute if a.name == "epsilon"}


def test_a_changed_configuration_is_another_graph(made: TinyBuild, tmp_path: Path) -> None:
    """An adapter's fingerprint has no epsilon and no activation; what the graphs compute depends on them."""
    build(made.request(made.bundle, tenants="1:1:4", prove=False))
    assert 0.25 not in epsilons(made.bundle)
    change_json(made.model / "config.json", rms_norm_eps=0.25)
    build(made.request(tmp_path / "other", tenants="1:1:4", prove=False))
    assert 0.25 in epsilons(tmp_path / "other")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_a_changed_text_is_another_bundle_of_the_same_graphs(made: TinyBuild, name: str) -> None:
    request = made.request(made.bundle, tenants="1:1:4", prove=False)
    keys, stages = [], []
    for change in (False, False, True):
        if change and name.endswith(".jinja"):
            path = made.model / name
            path.write_text(path.read_text(encoding="utf-8").replace("You help.", "You are new."), encoding="utf-8")
        elif change:
            fields = {"top_k": 7} if name.startswith("generation") else {"model_max_length": 77}
            change_json(made.model / name, **fields)
        keys.append(build(request).build_key)
        stages.append(sorted(path.name for path in made.cache.glob("graphs-*")))
    assert keys[0] == keys[1] != keys[2]
    assert stages[0] == stages[2] and len(stages[0]) == 1


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime:int4"])
def test_weights_that_change_during_a_build_leave_no_stage(made: TinyBuild, target: str) -> None:
    path = made.model / "model.safetensors"
    honest = path.read_bytes()
    changed = {name: tensor * 1.5 for name, tensor in load_file(path).items()}

    def meanwhile(step: str, *_: Any) -> None:
        if step == "looking for an up-to-date bundle":
            save_file(changed, made.model / "new", {"format": "pt"})
            os.replace(made.model / "new", path)

    request = made.request(made.bundle, tenants="1:1:4", prove=False, targets=[target])
    with pytest.raises(IaptError, match=r"model.safetensors of .* changed during the build; build again"):
        build(request, on_step=meanwhile)
    assert not made.bundle.exists() and not list(made.cache.glob("*-*"))
    path.write_bytes(honest)
    assert build(request).targets


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_is_trained_anew_during_a_build(made: TinyBuild, merged: bool) -> None:
    """Its tensors were loaded before, and its hash would be the new one's: the bundle and the stage of another."""
    fingerprint = load_backbone(str(made.model)).fingerprint
    config = LoRAConfig(rank=2) if merged else METHOD
    save_tiny_adapter(made.adapters["gamma"], 1, fingerprint, config)
    past = {"past": "1:64:160"} if merged else {}
    request = made.request(made.bundle, tenants="1:1:4", prove=False, merge_lora=merged, **past)

    def meanwhile(step: str, *_: Any) -> None:
        if step == "looking for an up-to-date bundle":
            save_tiny_adapter(made.adapters["gamma"], 2, fingerprint, config)

    with pytest.raises(
        IaptError, match=r"adapter_model.safetensors.* of .*gamma changed during the build; build again"
    ):
        build(request, on_step=meanwhile)
    assert not made.bundle.exists() and not list(made.cache.glob("*-*"))
    build(request)
    shipped = load_file(made.bundle / ("tenants/trained/gamma.safetensors" if merged else "tenants/gamma.safetensors"))
    trained = load_adapter(made.adapters["gamma"]).tensors
    assert shipped.keys() == trained.keys() and all(torch.equal(shipped[name], trained[name]) for name in trained)


def test_what_comes_to_stand_at_the_output_during_a_build_stays(made: TinyBuild) -> None:
    def meanwhile(step: str, *_: Any) -> None:
        if step == "looking for an up-to-date bundle":
            made.bundle.mkdir()
            (made.bundle / "notes.txt").write_text("mine")

    with pytest.raises(IaptError, match="exists and is not a bundle; nothing was changed"):
        build(made.request(made.bundle, tenants="1:1:4", prove=False), on_step=meanwhile)
    assert [path.name for path in made.bundle.iterdir()] == ["notes.txt"]


def test_a_link_that_comes_to_stand_at_the_output_leads_nowhere(made: TinyBuild, tmp_path: Path) -> None:
    """The bundle that it leads to is not held by this build."""
    build(made.request(tmp_path / "other", tenants="1:1:4", prove=False))
    before = (tmp_path / "other/manifest.json").read_bytes()

    def meanwhile(step: str, *_: Any) -> None:
        if step == "looking for an up-to-date bundle":
            made.bundle.symlink_to(tmp_path / "other")

    with pytest.raises(IaptError, match=r"has become a link during the build; nothing was changed"):
        build(made.request(made.bundle, tenants="1:1:3", prove=False), on_step=meanwhile)
    assert made.bundle.is_symlink() and (tmp_path / "other/manifest.json").read_bytes() == before


def test_prompts_that_cannot_be_compared_are_refused_by_a_dry_run(made: TinyBuild) -> None:
    request = made.request(made.bundle, tenants="1:1:4")
    (made.adapters["gamma"] / "examples.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(IaptError, match=r"gamma/examples.jsonl:1: expected a JSON object like"):
        foresee(request)
    (made.adapters["gamma"] / "examples.jsonl").unlink()
    with pytest.raises(IaptError, match=r"--past 11 leaves no room for a prompt to compare, beside 4 prompt rows and"):
        foresee(made.request(made.bundle, tenants="1:1:4", sequence="1:1:4", past="1:5:11"))


CODE = """from transformers import LlamaForCausalLM


class MyForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * SCALE
        return out
"""


@pytest.mark.thorough
def test_a_models_own_code_is_part_of_what_is_built(
    made: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights and configuration stay; graphs of before would be served under the proof of before."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    change_json(made.model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_my.MyForCausalLM"})
    request = made.request(made.bundle, tenants="1:1:4", prove=False, trust_remote_code=True)
    keys, answers = [], []
    for scale in ("1.0", "-1.0", "-1.0"):
        (made.model / "modeling_my.py").write_text(CODE.replace("SCALE", scale), encoding="utf-8")
        keys.append(build(request).build_key)
        with Session.open(made.bundle, allow_unproven=True) as session:
            asked = Request("gamma", tokens=(5, 6, 7), max_new_tokens=4, ignore_eos=True)
            answers.append(next(iter(session.generate([asked]))).tokens)
    assert keys[0] != keys[1] == keys[2]
    assert answers[0] != answers[1] == answers[2]
