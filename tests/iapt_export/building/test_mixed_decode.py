"""A bundle of every method, some of which act on generated tokens too; and what is computed once at export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from engines.serving.session import Request, Session
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import (
    METHOD,
    NEW_TOKENS,
    Outcome,
    TinyBuild,
    change_manifest,
    rehash,
    run,
    save_tiny_adapter,
    tokens_of,
)
from tests.validation.sabotage import between
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import (
    ADePTConfig,
    DePTConfig,
    LAMPConfig,
    LoPAConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)

ADEPT = ADePTConfig(prompt_length=5, bottleneck=4, decode_offset=True)
CONFIGS: dict[str, Any] = {
    "movies": METHOD,
    "scaled": dataclasses.replace(METHOD, scale=True),
    "raw": dataclasses.replace(METHOD, normalize=False),
    "topics": PromptTuningConfig(prompt_length=4),
    "mood": LAMPConfig(init_length=20, rank=3, window=5),
    "style": PrefixTuningConfig(prompt_length=7, projection=True, projection_width=8),
    "taste": LoPAConfig(prompt_length=6, rank=2),
    "words": ADEPT,
    "places": DePTConfig(prompt_length=3, rank=2, max_length=16),
    "low": LoRAConfig(rank=2, target_modules=("q_proj", "v_proj", "down_proj")),
}
TEXTS = ("the film is a quiet joy", "a dull and noisy story that nobody will remember", "yes")
pytestmark = pytest.mark.slow


def built(root: Path, tiny_build: TinyBuild, names: list[str], *flags: str) -> TinyBuild:
    """A bundle of some of the tenants, its report identical to PyTorch's in every row."""
    fingerprint = load_backbone(str(tiny_build.model)).fingerprint
    adapters = {
        name: save_tiny_adapter(root / name, list(CONFIGS).index(name), fingerprint, CONFIGS[name]) for name in names
    }
    build = TinyBuild(tiny_build.model, adapters, tiny_build.cache, root / "bundle")
    outcome = run(*build.arguments(build.bundle), "--tenants=1:9:16", "--json", *flags)
    assert outcome.code == 0, outcome.err
    for target in json.loads(outcome.out)["targets"]:
        assert {row["tenant"] for row in target["tokens"]} == set(names)
        assert all(row["reference"] == row["target"] for row in target["tokens"])
    return build


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> TinyBuild:
    return built(tmp_path_factory.mktemp("all"), tiny_build, list(CONFIGS))


@pytest.fixture
def bundle(build: TinyBuild, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(build.bundle, tmp_path / "bundle"))


def inputs(path: Path) -> set[str]:
    """The methods that a graph takes something of."""
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    return {name.partition(".")[0] for name in names if "." in name} - {"past_key_values"}


def test_the_step_takes_what_acts_on_generated_tokens_and_nothing_else(build: TinyBuild) -> None:
    manifest = BundleManifest.load(build.bundle)
    assert inputs(build.bundle / "decode.onnx") == {"adept", "lora"}
    assert inputs(build.bundle / "prefill.onnx") == {method.name for method in manifest.methods}
    assert {method.name for method in manifest.methods if method.in_decode} == {"adept", "lora"}
    assert [manifest.tenant(name).method for name in ("movies", "scaled")] == ["iapt", "iapt_2"]


def test_every_tenant_answers_through_the_command_line(build: TinyBuild) -> None:
    with Session.open(build.bundle) as session:
        for tenant in CONFIGS:
            argv = ("generate", build.bundle, f"--tenant={tenant}", f"--prompt={TEXTS[0]}", "--max-new-tokens=6")
            outcome = run(*argv, "--json")
            assert outcome.code == 0, outcome.err
            wanted = tokens_of(session, [Request(tenant, TEXTS[0], max_new_tokens=6)])[0]
            assert json.loads(outcome.out)[0]["tokens"] == wanted


def test_a_row_answers_among_all_methods_what_it_answers_alone(build: TinyBuild) -> None:
    requests = [
        Request(name, TEXTS[row % 3], max_new_tokens=NEW_TOKENS, ignore_eos=True) for row, name in enumerate(CONFIGS)
    ]
    with Session.open(build.bundle) as session:
        for batch in (requests[:8], requests[1:], requests[6:]):
            assert tokens_of(session, batch) == [tokens_of(session, [request])[0] for request in batch]


def edit_tenant(bundle: Path, name: str, **fields: Any) -> None:
    tenants = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["tenants"]
    change_manifest(bundle, tenants=[t | fields if t["name"] == name else t for t in tenants])


SABOTAGES = {
    "a method that its file happens to fit": (
        lambda b: edit_tenant(b, "scaled", method="iapt"),
        {"prefill logits", "greedy tokens"},
        set(),
    ),
    "no LoRA in the steps": (
        lambda b: between(b, "decode.onnx", "lora.tenant_index", "Min", -1),
        {"decode logits", "decode cache", "greedy tokens"},
        {"generator", "prefill logits", "prefill cache"},
    ),
    "everybody's tokens are offset": (
        lambda b: between(b, "decode.onnx", "adept.tenant_index", "Max", 0),
        {"decode logits", "decode cache"},
        {"generator", "prefill logits", "prefill cache"},
    ),
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_sabotage_is_found(bundle: Path, sabotage: str) -> None:
    damage, must_fail, must_hold = SABOTAGES[sabotage]
    damage(bundle)
    rehash(bundle)
    if sabotage.startswith("a method"):  # the last of a method is gone, and with it its stack
        spare = BundleManifest.load(bundle)
        assert spare.tenants_of("iapt_2") == []
        edit_tenant(bundle, "movies", method="iapt_2")
        rehash(bundle)
    outcome = validate(bundle)
    assert outcome.code == 3, outcome.err
    targets = json.loads(outcome.out)["targets"]
    failed = {check["stage"] for target in targets for check in target["checks"] if not check["passed"]}
    assert must_fail <= failed and not must_hold & failed


def validate(bundle: Path) -> Outcome:
    return run("validate", bundle, "--json", "--quiet", f"--new-tokens={NEW_TOKENS}")


def answers(bundle: Path, tenant: str) -> list[list[int]]:
    requests = [Request(tenant, text, max_new_tokens=NEW_TOKENS, ignore_eos=True) for text in TEXTS]
    with Session.open(bundle) as session:
        return tokens_of(session, requests)


def test_folded_offsets_answer_as_unfolded_ones(tmp_path: Path, tiny_build: TinyBuild, build: TinyBuild) -> None:
    folded = built(tmp_path, tiny_build, ["words", "topics"], "--fold-embeddings")
    manifest = BundleManifest.load(folded.bundle)
    assert (manifest.tenant("words").method, manifest.tenant("words").trained_form) == ("token_table", "ADEPT")
    assert manifest.tenant("words").trained == "tenants/trained/words.safetensors"
    assert inputs(folded.bundle / "decode.onnx") == {"token_table"}
    assert answers(folded.bundle, "words") == answers(build.bundle, "words")


def test_a_merged_adapter_answers_as_one_beside_others(tmp_path: Path, tiny_build: TinyBuild, build: TinyBuild) -> None:
    merged = built(tmp_path, tiny_build, ["low"], "--merge-lora")
    manifest = BundleManifest.load(merged.bundle)
    assert manifest.methods == [] and (manifest.tenants[0].method, manifest.tenants[0].path) == (None, None)
    assert inputs(merged.bundle / "prefill.onnx") == inputs(merged.bundle / "decode.onnx") == set()
    assert answers(merged.bundle, "low") == answers(build.bundle, "low")
    shown = run("inspect", merged.bundle)
    assert "low: LORA, merged" in shown.out
