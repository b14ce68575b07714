"""An adapter becomes a file that a running session takes in, and bad ones are refused before anything is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.serving.session import Session
from engines.serving.tenants import read_tenant_file
from iapt_export import build
from iapt_export.building.layout import method_spec, tenant_card
from iapt_export.building.plain_tenant import plain_tenant
from iapt_export.building.plan import load_tenants, plan_tenants
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.tenant_card import OLDER, TenantCard
from tests.bundles import METHOD, TinyBuild, run, save_tiny_adapter, tokens_of
from tests.engines.serving.test_serving import request
from trainers.decoder.backbone import config_fingerprint, load_backbone
from trainers.methods.configs import METHOD_CONFIGS, ADePTConfig, IAPTConfig, PromptTuningConfig

ROOT = Path(__file__).resolve().parents[3]
SMALL = {
    "IAPT": functools.partial(IAPTConfig, bottleneck=8),
    "LOPA": functools.partial(METHOD_CONFIGS["LOPA"], prompt_length=6, rank=2),
    "LAMP": functools.partial(METHOD_CONFIGS["LAMP"], init_length=20, rank=3, window=5),
}


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


@pytest.mark.parametrize("name", ["my guest", ".guest", "a" * 129])
def test_a_file_that_no_server_would_find_is_not_written(tiny_build: TinyBuild, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.safetensors"
    refused = run("tenant", tiny_build.adapters["beta"], f"--bundle={tiny_build.bundle}", f"--output={path}")
    assert refused.code == 1 and f"tenant name {name!r} must be" in refused.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a/../b", "a b"])
def test_a_session_takes_no_name_that_is_none(tiny_build: TinyBuild, name: str) -> None:
    file = tiny_build.bundle / "tenants" / "beta.safetensors"
    with Session.open(tiny_build.bundle, verify=False) as session:
        with pytest.raises(IaptError, match="must be up to 128 letters"):
            session.add_tenant(file, name)
        assert session.add_tenant(file, "größe_2.b-") == "größe_2.b-"


def test_how_weights_were_found_does_not_count(tiny_build: TinyBuild, tmp_path: Path, fingerprint: str) -> None:
    config = IAPTConfig(bottleneck=METHOD.bottleneck, init_function="relu")
    adapter = save_tiny_adapter(tmp_path / "other-start", 5, fingerprint, config)
    path = tmp_path / "file.safetensors"
    assert run("tenant", adapter, f"--bundle={tiny_build.bundle}", f"--output={path}").code == 0
    assert "init_function" not in read_tenant_file(path)[0].config
    with Session.open(tiny_build.bundle, verify=False) as session:
        assert session.add_tenant(path) == "other-start"


WITHOUT_TORCH = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "accelerate"):
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Block())
from iapt_export.cli import main
main(sys.argv[1:])
"""


def run_without_torch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_machine_without_torch_writes_the_same_file(
    tiny_build: TinyBuild, tmp_path: Path, fingerprint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"guest={tiny_build.adapters['beta']}", f"--bundle={tiny_build.bundle}"]
    done = run_without_torch("tenant", *words, f"--output={tmp_path / 'light.safetensors'}")
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.setattr("iapt_export.building.tenant_file.plain_tenant", lambda *_: None)
    assert run("tenant", *words, f"--output={tmp_path / 'computed.safetensors'}").code == 0
    assert (tmp_path / "light.safetensors").read_bytes() == (tmp_path / "computed.safetensors").read_bytes()


def test_what_must_be_computed_asks_for_torch(tiny_build: TinyBuild, tmp_path: Path, fingerprint: str) -> None:
    adapter = save_tiny_adapter(tmp_path / "prompt", 5, fingerprint, PromptTuningConfig(prompt_length=4))
    output = f"--output={tmp_path / 'x.safetensors'}"
    done = run_without_torch("tenant", str(adapter), f"--bundle={tiny_build.bundle}", output)
    assert done.returncode == 1
    assert "is not installed and this command needs it; try: pip install -e '.[" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]


@pytest.mark.parametrize("damage", ["truncated", "nan", "shape", "config"], ids=lambda damage: f"damage={damage}")
def test_a_bad_adapter_is_refused_without_torch_too(
    tiny_build: TinyBuild, tmp_path: Path, fingerprint: str, damage: str
) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", 5, fingerprint)
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "config":
        config.write_text(config.read_text("utf-8").replace('"plain"', '"loud"').replace('"chat"', '"loud"'))
    else:
        tensors = dict(load_file(weights))
        name = next(iter(tensors))
        tensors[name] = tensors[name][:-1] if damage == "shape" else tensors[name] * np.float32("nan")
        save_file(tensors, weights)
    output = tmp_path / "x.safetensors"
    done = run_without_torch("tenant", str(adapter), f"--bundle={tiny_build.bundle}", f"--output={output}")
    text = {"truncated": "safetensors", "nan": "holds NaN", "shape": "has shape", "config": "loud"}[damage]
    assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr
    assert not output.exists()


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_methods_are_shipped_as_trained_or_computed(
    tiny_build: TinyBuild, tmp_path: Path, fingerprint: str, name: str
) -> None:
    """A bundle that has the method takes IAPT's, ADePT's and LoPA's tensors as training wrote them, and no others."""
    folder = save_tiny_adapter(tmp_path / "adapter", 5, fingerprint, SMALL.get(name, METHOD_CONFIGS[name])())
    backbone = load_backbone(str(tiny_build.model))
    plan = plan_tenants(load_tenants([folder], backbone), backbone.model)
    manifest = dataclasses.replace(
        BundleManifest.load(tiny_build.bundle), methods=[method_spec(item) for item in plan.installed]
    )
    made = plain_tenant(str(folder), manifest)
    assert (made is not None) == (name in ("IAPT", "ADEPT", "LOPA"))
    if made is not None:
        card, tensors = made
        assert card == tenant_card("adapter", plan, manifest.backbone)
        shipped = plan.shipped["adapter"]
        assert tensors.keys() == shipped.keys()
        assert all((tensors[key] == shipped[key].numpy()).all() for key in shipped)


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


def test_an_adapter_that_names_another_backbone_is_told(
    tiny_build: TinyBuild, tmp_path: Path, fingerprint: str
) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", 5, fingerprint)
    path = adapter / "adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": "some/other"}
    path.write_text(json.dumps(fields), encoding="utf-8")
    outcome = run("tenant", adapter, f"--bundle={tiny_build.bundle}", f"--output={tmp_path / 'x.safetensors'}")
    assert outcome.code == 0 and "was trained for some/other" in outcome.err
    assert "if these are other weights, its answers are wrong" in outcome.err
    own = BundleManifest.load(tiny_build.bundle).backbone.weights_sha256
    for sha256, said in ((own, False), ("0" * 64, True)):
        path.write_text(json.dumps(fields | {"backbone_weights_sha256": sha256}), encoding="utf-8")
        outcome = run("tenant", adapter, f"--bundle={tiny_build.bundle}", f"--output={tmp_path / 'x.safetensors'}")
        assert outcome.code == 0 and ("was trained on other weights than those of" in outcome.err) == said
        assert "was trained for some/other" not in outcome.err


def test_a_tenant_is_not_computed_with_other_weights(tiny_build: TinyBuild, tmp_path: Path, fingerprint: str) -> None:
    """A folded table depends on the backbone's embeddings, which may have been trained since."""
    model = Path(shutil.copytree(tiny_build.model, tmp_path / "model"))
    adapters = {name: save_tiny_adapter(tmp_path / name, 5, fingerprint, ADePTConfig()) for name in ("one", "late")}
    made = TinyBuild(model, adapters, tiny_build.cache, tmp_path / "bundle")
    build(made.request(made.bundle, "one", tenants="1:1:4", fold_embeddings=True, prove=False))
    words = ("tenant", adapters["late"], f"--bundle={made.bundle}", f"--output={tmp_path / 'late.safetensors'}")
    assert run(*words).code == 0
    (tmp_path / "late.safetensors").unlink()
    weights = model / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    outcome = run(*words)
    assert outcome.code == 1 and "has the architecture but not the weights of" in outcome.err
    assert not (tmp_path / "late.safetensors").exists()


def test_an_adapter_of_another_backbone(tiny_build: TinyBuild, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", 5, "another")
    outcome = run("tenant", adapter, f"--bundle={tiny_build.bundle}", f"--output={tmp_path / 'x.safetensors'}")
    assert outcome.code == 1 and "backbone" in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
