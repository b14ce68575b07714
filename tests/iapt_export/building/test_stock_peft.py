"""Directories that stock PEFT saved are built as they are, side by side, and answer as PEFT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from engines.serving.session import Request, Session
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import NEW_TOKENS, NUM_LAYERS, TinyBuild, run
from tests.tiny import tiny_llama
from tests.trainers.adapters.test_peft_format import stock

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True}),
    "lora": ("LoraConfig", {"r": 2, "target_modules": ["v_proj", "q_proj", "down_proj"]}),
}
TOKENS = (5, 40, 77, 12, 9, 130, 61)


def test_stock_adapters_of_three_methods_in_one_bundle(tiny_build: TinyBuild, tmp_path: Path) -> None:
    theirs = {
        name: stock(lambda: tiny_llama(num_hidden_layers=NUM_LAYERS), kind, options)
        for name, (kind, options) in ADAPTERS.items()
    }
    for name, model in theirs.items():
        model.save_pretrained(tmp_path / name)
    build = TinyBuild(tiny_build.model, {name: tmp_path / name for name in theirs}, tiny_build.cache, tmp_path / "out")
    outcome = run(*build.arguments(build.bundle), "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads((build.bundle / "report.json").read_text(encoding="utf-8"))
    rows = [row for target in report["targets"] for row in target["tokens"]]
    assert {row["tenant"] for row in rows} == set(ADAPTERS)
    assert all(row["reference"] == row["target"] for row in rows)

    ids = torch.tensor([TOKENS])
    requests = [Request(name, tokens=TOKENS, max_new_tokens=NEW_TOKENS, ignore_eos=True) for name in ADAPTERS]
    with Session.open(build.bundle, verify=False) as session:
        made = {
            request.tenant: answer.tokens for request, answer in zip(requests, session.generate(requests), strict=True)
        }
    for name, model in theirs.items():
        expected = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
        assert made[name] == expected[0, -NEW_TOKENS:].tolist(), name
    assert len({tuple(tokens) for tokens in made.values()}) == len(made)  # the adapters matter


def test_a_stock_lora_joins_a_bundle_of_its_kind(tiny_build: TinyBuild, tmp_path: Path) -> None:
    """PEFT writes the names of the changed layers in any order."""
    for name, order in (("first", ["v_proj", "q_proj"]), ("second", ["q_proj", "v_proj"])):
        options = {"r": 2, "target_modules": order}
        stock(lambda: tiny_llama(num_hidden_layers=NUM_LAYERS), "LoraConfig", options).save_pretrained(tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": order}), encoding="utf-8")
    build = TinyBuild(tiny_build.model, {"first": tmp_path / "first"}, tiny_build.cache, tmp_path / "out")
    outcome = run(*build.arguments(build.bundle), "--past=1:64:160")
    assert outcome.code == 0, outcome.err
    file = tmp_path / "second.safetensors"
    flags = [f"--bundle={build.bundle}", f"--output={file}", "--peft-prompt-format=chat", "--json"]
    outcome = run("tenant", tmp_path / "second", *flags)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["prompt_format"] == "chat"
    assert BundleManifest.load(build.bundle).tenants[0].prompt_format == "plain"
    with Session.open(build.bundle, verify=False) as session:
        assert session.add_tenant(file) == "second"
