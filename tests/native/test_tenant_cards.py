"""A tenant's file says of itself what the manifest says of it, or neither language opens the bundle."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engines.serving.session import Session
from iapt_export.contract.errors import IaptError
from tests.bundles import rehash
from tests.native.built import RUNNER


def change_card(bundle: Path, **fields: Any) -> None:
    """Write other fields into a tenant's card, with hashes that fit; ``...`` takes a field out."""
    path = bundle / "tenants" / "beta.safetensors"
    with safe_open(path, framework="numpy") as file:
        card = json.loads(file.metadata()["iapt_tenant"])
    card = {name: value for name, value in {**card, **fields}.items() if value is not ...}
    save_file(load_file(path), path, {"iapt_tenant": json.dumps(card)})
    rehash(bundle)


def refusals(bundle: Path) -> list[str]:
    """What Python says, and C++ where it is built."""
    with pytest.raises(IaptError) as caught, Session.open(bundle):
        pass
    if not RUNNER.is_file():
        return [str(caught.value)]
    asked = [RUNNER, bundle, "--tenant=alpha", "--tokens=5", "--max-new-tokens=1"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return [str(caught.value), done.stderr]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "alpha"}, "name is "),
        ({"fingerprint": "0" * 16}, "fingerprint is "),
        ({"form": "PROMPT_TUNING"}, "form and config are not those of method iapt"),
        ({"config": {"bottleneck": 9}}, "form and config are not those of method iapt"),
        ({"config": {"another": [2, "x", None]}}, "form and config are not those of method iapt"),
        ({"prompt_format": "plain"}, "prompt_format is "),
        ({"prompt_length": 5}, "prompt_length is 5, and 4 in the manifest"),
        ({"prompt_length": ...}, "prompt_length is "),
        ({"trained_form": "LAMP"}, "trained_form is "),
        ({"system_prompt": "Be brief."}, "system_prompt is "),
        ({"labels": ["yes"]}, "labels is "),
        ({"eos_token_id": 77}, "eos_token_id is 77, which is none of the manifest's"),
        ({"name": 3}, "no valid tenant card: tenant card.name is 3, expected str"),
        ({"colour": 3}, "no valid tenant card: tenant card.colour is not a known field"),
        ({"backbone": ...}, "no valid tenant card: tenant card.backbone is missing"),
        ({"eos_token_id": 2**70}, "no valid tenant card"),
        ({"schema_version": 3}, "schema_version"),
    ],
)
def test_a_card_that_contradicts_the_manifest_is_refused(tiny_bundle: Path, fields: dict[str, Any], text: str) -> None:
    change_card(tiny_bundle, **fields)
    for told in refusals(tiny_bundle):
        assert text in told and "beta.safetensors" in told, told


def test_a_card_that_agrees_opens(tiny_bundle: Path) -> None:
    change_card(tiny_bundle)
    assert Session.open(tiny_bundle).tenants == ["alpha", "beta", "gamma"]


def test_two_tenants_that_change_places_are_refused(tiny_bundle: Path) -> None:
    files = [tiny_bundle / "tenants" / f"{name}.safetensors" for name in ("alpha", "beta")]
    alpha, beta = (path.read_bytes() for path in files)
    files[0].write_bytes(beta)
    files[1].write_bytes(alpha)
    rehash(tiny_bundle)
    for told in refusals(tiny_bundle):
        assert "is not what the manifest says of tenant alpha" in told


def test_a_bundle_without_proof_and_one_without_its_signature(tiny_bundle: Path) -> None:
    """`tests.iapt_export.contract.test_integrity` has the Python side."""
    if not RUNNER.is_file():
        pytest.skip("iapt_run is not built; 'make cpp' builds it")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    from iapt_export.contract.integrity import sign
    from tests.bundles import change_manifest

    def told(*flags: Any) -> str:
        asked = [RUNNER, tiny_bundle, "--tenant=alpha", "--tokens=5", "--max-new-tokens=1", *flags]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""

    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    private, public, other = (tiny_bundle.parent / name for name in ("private", "public", "other"))
    private.write_bytes(keys[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for path, key in zip((public, other), keys, strict=True):
        path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert "is not signed: it has no manifest.sig; build it with --sign" in told("--trust", public)
    sign(tiny_bundle, private)
    assert told("--trust", public) == ""
    assert f"is not signed by {other}" in told("--trust", other)
    assert "is not a public ed25519 key in PEM" in told("--trust", private)
    change_manifest(tiny_bundle, parity={"verdict": "not run", "tolerances": {}, "measured": {}})
    assert "is not signed by" in told("--trust", public)
    assert "its verdict is 'not run', expected 'pass'" in told()
    assert told("--allow-unproven") == ""
    (tiny_bundle / "extra").write_text("mine")
    assert "extra is not in the manifest" in told("--allow-unproven")
    (tiny_bundle / "extra").unlink()
    (tiny_bundle / "manifest.json").write_bytes((tiny_bundle / "manifest.json").read_bytes() + b" ")
    assert "manifest.json was altered" in told("--allow-unproven")
