"""An adapter becomes a file that a running session takes in, and bad ones are refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.serving.session import Session
from engines.serving.tenants import read_tenant_file
from iapt_export.contract.tenant_card import OLDER, TenantCard
from tests.bundles import METHOD, TinyBuild, run, save_tiny_adapter, tokens_of
from tests.engines.serving.test_serving import request
from trainers.decoder.backbone import config_fingerprint, load_backbone
from trainers.methods.configs import METHOD_CONFIGS, IAPTConfig, PromptTuningConfig


@pytest.fixture(scope="module")
def fingerprint(tiny_build: TinyBuild) -> str:
    return config_fingerprint(load_backbone(str(tiny_build.model)).model.config)


def test_an_adapters_file_serves_like_the_built_tenant(tiny_build: TinyBuild, tmp_path: Path) -> None:
    path = tmp_path / "guest.safetensors"
    words = [f"guest={tiny_build.adapters['beta']}", f"--bundle={tiny_build.bundle}", f"--output={path}"]
    outcome = run("tenant", *words)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{path} holds tenant guest (IAPT); Session.add_tenant takes it\n"
    with Session.open(tiny_build.bundle, verify=False) as session:
        assert session.add_tenant(path) == "guest"
        one = request(1)
        assert one.tenant == "beta"
        (wanted,) = tokens_of(session, [one])
        (made,) = tokens_of(session, [type(one)("guest", tokens=one.tokens, max_new_tokens=12, ignore_eos=True)])
    assert made == wanted
    assert json.loads(run("tenant", *words, "--json").out)["name"] == "guest"
    assert [file.name for file in tmp_path.iterdir()] == ["guest.safetensors"]


def test_how_weights_were_found_does_not_count(tiny_build: TinyBuild, tmp_path: Path, fingerprint: str) -> None:
    config = IAPTConfig(bottleneck=METHOD.bottleneck, init_function="relu")
    adapter = save_tiny_adapter(tmp_path / "other-start", 5, fingerprint, config)
    path = tmp_path / "file.safetensors"
    assert run("tenant", adapter, f"--bundle={tiny_build.bundle}", f"--output={path}").code == 0
    assert "init_function" not in read_tenant_file(path)[0].config
    with Session.open(tiny_build.bundle, verify=False) as session:
        assert session.add_tenant(path) == "other-start"


def card(form: str, **config: object) -> TenantCard:
    return TenantCard(
        name="guest",
        form=form,
        config=config,
        backbone="tiny",
        fingerprint="0",
        trained_form=form,
        prompt_format="plain",
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_files_older_than_a_field_fit_only_what_computes_the_same(normalize: bool) -> None:
    assert card("IAPT", bottleneck=8).fits("IAPT", {"bottleneck": 8, "normalize": normalize}) is not normalize
    assert card("IAPT", bottleneck=8, normalize=normalize).fits("IAPT", {"bottleneck": 8}) is not normalize


def test_cards_and_configurations_agree_on_older_files() -> None:
    assert {name: cls.older for name, cls in METHOD_CONFIGS.items() if hasattr(cls, "older")} == OLDER


def test_the_order_of_target_modules_does_not_count() -> None:
    """A card sorts them, a manifest has them as they were given."""
    assert card("LORA", target_modules=["q_proj", "v_proj"]).fits("LORA", {"target_modules": ["v_proj", "q_proj"]})
    assert not card("LORA", target_modules=["q_proj"]).fits("LORA", {"target_modules": ["v_proj", "q_proj"]})


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (IAPTConfig(bottleneck=4), "has no method IAPT with {"),
        (PromptTuningConfig(prompt_length=4), "has no method PROMPT_TUNING with {'prompt_length': 4}"),
    ],
)
def test_a_method_that_the_bundle_lacks(
    tiny_build: TinyBuild, tmp_path: Path, fingerprint: str, method: object, text: str
) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", 5, fingerprint, method)
    outcome = run("tenant", adapter, f"--bundle={tiny_build.bundle}", f"--output={tmp_path / 'x.safetensors'}")
    assert outcome.code == 1 and text in outcome.err and "build a bundle with an adapter of that kind" in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_backbone(tiny_build: TinyBuild, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", 5, "another")
    outcome = run("tenant", adapter, f"--bundle={tiny_build.bundle}", f"--output={tmp_path / 'x.safetensors'}")
    assert outcome.code == 1 and "backbone" in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
