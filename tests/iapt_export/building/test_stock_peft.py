"""Directories that stock PEFT saved are built as they are, side by side, and answer as PEFT does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.serving.session import Request, Session
from iapt_export import build
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import NEW_TOKENS, NUM_LAYERS, TinyBuild, run
from tests.tiny import tiny_llama
from tests.trainers.adapters.test_peft_format import stock, stock_greedy
from trainers.decoder.backbone import load_backbone
from trainers.decoder.stored import weights_sha256
from validation.judging.compare import Settings, measure_truth
from validation.judging.peft import compare_peft
from validation.sides.peft_side import PeftFolder
from validation.sides.reference import Reference

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True}),
    "encoded": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
    "task": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}),
    "lora": ("LoraConfig", {"r": 2, "target_modules": ["v_proj", "q_proj", "down_proj"]}),
    "patterns": (
        "LoraConfig",
        {
            **{"r": 3, "lora_alpha": 5, "target_modules": ["k_proj", "q_proj"], "use_rslora": True},
            **{"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"layers.0.self_attn.q_proj": 11}},
        },
    ),
    "one_layer": ("LoraConfig", {"r": 1, "target_modules": ["up_proj"], "layers_to_transform": [1]}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["v_proj", "down_proj"]}),
}
LATER: dict[str, dict[str, Any]] = {
    "reversed": {"r": 2, "target_modules": ["down_proj", "v_proj", "q_proj"]},
    "narrow": {"r": 1, "lora_alpha": 3, "target_modules": ["k_proj"]},
    "wide": {"r": 6, "target_modules": ["q_proj"]},
    "elsewhere": {"r": 1, "target_modules": ["gate_proj"]},
}
TASK = 2
TOKENS = (5, 40, 77, 12, 9, 130, 61)


def adapter(kind: str, options: dict[str, Any]) -> Any:
    """A backbone with an adapter of PEFT's own."""
    return stock(lambda: tiny_llama(num_hidden_layers=NUM_LAYERS), kind, options)


def peft_tokens(model: Any, **options: Any) -> list[int]:
    """What PEFT itself answers."""
    return stock_greedy(model, TOKENS, NEW_TOKENS, **options)[0]


@pytest.fixture(scope="module")
def made(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    """A bundle of them all."""
    root = tmp_path_factory.mktemp("stock")
    for name, (kind, options) in ADAPTERS.items():
        adapter(kind, options).save_pretrained(root / name)
    adapters = {name: Path(f"{root / name},task={TASK}" if name == "task" else root / name) for name in ADAPTERS}
    made = TinyBuild(tiny_build.model, adapters, tiny_build.cache, root / "out")
    build(made.request(made.bundle, tenants="1:6:8", peft_prompt_format="plain"))
    return made


@pytest.mark.thorough
def test_stock_adapters_in_one_bundle(made: TinyBuild) -> None:
    """Three kinds of prompts in one stack; LoRAs of any rank, scale, layers and linears, and DoRA, in another."""
    report = json.loads((made.bundle / "report.json").read_text(encoding="utf-8"))
    rows = [row for target in report["targets"] for row in target["tokens"]]
    assert {row["tenant"] for row in rows} == set(ADAPTERS)
    assert all(row["reference"] == row["target"] for row in rows)
    (theirs,) = [target for target in report["targets"] if target["name"] == "PEFT's own answer"]
    assert theirs["status"] == "pass"
    assert {check["case"].partition(",")[0] for check in theirs["checks"]} == set(ADAPTERS)

    manifest = BundleManifest.load(made.bundle)
    assert [(method.form, len(manifest.tenants_of(method.name))) for method in manifest.methods] == [
        ("PROMPT_TUNING", 3),
        ("PREFIX_TUNING", 1),
        ("DORA", 4),
    ]
    requests = [Request(name, tokens=TOKENS, max_new_tokens=NEW_TOKENS, ignore_eos=True) for name in ADAPTERS]
    with Session.open(made.bundle, verify=False) as session:
        answers = {r.tenant: answer.tokens for r, answer in zip(requests, session.generate(requests), strict=True)}
    for name, (kind, options) in ADAPTERS.items():
        task = {"task_ids": torch.tensor([TASK])} if name == "task" else {}
        assert answers[name] == peft_tokens(adapter(kind, options), **task), name
    assert len({tuple(tokens) for tokens in answers.values()}) == len(answers)  # the adapters matter


@pytest.mark.thorough
def test_stock_loras_join_a_bundle_of_their_kind(made: TinyBuild, tmp_path: Path) -> None:
    """PEFT writes the names of the changed layers in any order; lower ranks and fewer linears fit as well."""
    files, theirs = {}, {}
    for name, options in LATER.items():
        theirs[name] = adapter("LoraConfig", options)
        theirs[name].save_pretrained(tmp_path / name)
        path, order = tmp_path / name / "adapter_config.json", {"target_modules": options["target_modules"]}
        path.write_text(json.dumps({**json.loads(path.read_text()), **order}), encoding="utf-8")
        files[name] = tmp_path / f"{name}.safetensors"
        flags = [f"--bundle={made.bundle}", f"--output={files[name]}", "--json"]
        outcome = run("tenant", f"{tmp_path / name},format=chat", *flags)
        if name in ("wide", "elsewhere"):
            assert outcome.code == 1 and "so its graphs cannot run" in outcome.err
            assert not files[name].exists()
        else:
            assert outcome.code == 0, outcome.err
            assert json.loads(outcome.out)["prompt_format"] == "chat"
    assert BundleManifest.load(made.bundle).tenants[0].prompt_format == "plain"
    with Session.open(made.bundle, verify=False) as session:
        for name in ("reversed", "narrow"):
            assert session.add_tenant(files[name]) == name
            request = Request(name, tokens=TOKENS, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            assert next(iter(session.generate([request]))).tokens == peft_tokens(theirs[name]), name


@pytest.mark.thorough
def test_what_peft_computes_otherwise_is_seen(made: TinyBuild, tmp_path: Path) -> None:
    """Although our own two sides agree; and the backbone stays as it was."""
    backbone, manifest = load_backbone(str(made.model)), BundleManifest.load(made.bundle)
    reference = Reference(made.bundle, manifest, backbone)
    truths = measure_truth(made.bundle, manifest, reference, Settings(0, 4, case="prompts"), lambda _: None).prompts
    before = weights_sha256(backbone.model), backbone.model.config._attn_implementation

    def compare(folders: dict[str, PeftFolder] | None) -> Any:
        return compare_peft(reference, truths, folders, lambda _: None)

    # from the bundle's own files, where one task of the prompt is all that is left, and nothing of DoRA's lengths
    result = compare(None)
    assert result.status == "pass"
    assert {check.case.partition(",")[0] for check in result.checks} == ADAPTERS.keys() - {"dora"}
    other = shutil.copytree(made.adapters["lora"], tmp_path / "other_alpha")
    path = other / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 30}), encoding="utf-8")
    result = compare({"lora": PeftFolder(other)})
    assert result.status == "fail" and not any(check.passed for check in result.checks if "logits" in check.stage)
    path.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x", "r": "two"}), encoding="utf-8")
    with pytest.raises(IaptError, match=r"PEFT .* cannot run .*other_alpha.*; --no-peft-check leaves"):
        compare({"lora": PeftFolder(other)})
    assert before == (weights_sha256(backbone.model), backbone.model.config._attn_implementation)
