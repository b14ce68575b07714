"""Directories that stock PEFT saved are built as they are, side by side, and answer as PEFT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.serving.session import Request, Session
from iapt_export import build
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


def adapter(name: str) -> Any:
    """A backbone with an adapter of PEFT's own."""
    kind, options = ADAPTERS[name]
    return stock(lambda: tiny_llama(num_hidden_layers=NUM_LAYERS), kind, options)


@pytest.fixture(scope="module")
def bundle(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    for name in ADAPTERS:
        adapter(name).save_pretrained(root / name)
    adapters = {name: root / name for name in ADAPTERS}
    made = TinyBuild(tiny_build.model, adapters, tiny_build.cache, root / "out")
    build(made.request(made.bundle))
    return made.bundle


def test_stock_adapters_of_three_methods_in_one_bundle(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    rows = [row for target in report["targets"] for row in target["tokens"]]
    assert {row["tenant"] for row in rows} == set(ADAPTERS)
    assert all(row["reference"] == row["target"] for row in rows)

    ids = torch.tensor([TOKENS])
    requests = [Request(name, tokens=TOKENS, max_new_tokens=NEW_TOKENS, ignore_eos=True) for name in ADAPTERS]
    with Session.open(bundle, verify=False) as session:
        made = {
            request.tenant: answer.tokens for request, answer in zip(requests, session.generate(requests), strict=True)
        }
    for name in ADAPTERS:
        expected = adapter(name).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
        assert made[name] == expected[0, -NEW_TOKENS:].tolist(), name
    assert len({tuple(tokens) for tokens in made.values()}) == len(made)  # the adapters matter


def test_a_stock_lora_joins_a_bundle_of_its_kind(bundle: Path, tmp_path: Path) -> None:
    """PEFT writes the names of the changed layers in any order."""
    adapter("lora").save_pretrained(tmp_path / "second")
    path = tmp_path / "second" / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    order = ["down_proj", "q_proj", "v_proj"]
    assert sorted(written["target_modules"]) == order and BundleManifest.load(bundle).methods[-1].form == "LORA"
    for number, names in enumerate((order, order[::-1])):
        path.write_text(json.dumps({**written, "target_modules": names}), encoding="utf-8")
        file = tmp_path / f"second-{number}.safetensors"
        flags = [f"--bundle={bundle}", f"--output={file}", "--peft-prompt-format=chat", "--json"]
        outcome = run("tenant", tmp_path / "second", *flags)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["prompt_format"] == "chat"
        with Session.open(bundle, verify=False) as session:
            assert session.add_tenant(file) == "second"
    assert BundleManifest.load(bundle).tenants[-1].prompt_format == "plain"
