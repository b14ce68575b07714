"""A bundle holds what its manifest names and nothing else, carries its proof, and can be signed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from safetensors import safe_open
from safetensors.numpy import save

from engines.serving.session import Session
from iapt_export import build
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.integrity import check_signature, load_private_key, open_manifest, sign
from iapt_export.contract.manifest import BundleManifest, Parity
from tests.bundles import TinyBuild, rehash, run, seal
from trainers.adapters.directory import load_adapter, save_adapter


def refusal(bundle: Path, **checks: object) -> str:
    with pytest.raises(IaptError) as caught:
        open_manifest(bundle, **checks)  # type: ignore[arg-type]
    return str(caught.value)


def test_only_what_this_build_made_is_signed(tiny_build: TinyBuild, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """Whoever may write the folder can make a bundle that is up to date by its own words."""
    request = tiny_build.request(tmp_path / "bundle", "gamma", tenants="1:1:4", depth="quick", sign=str(keys[0]))
    build(request)
    path = request.output / "tenants/gamma.safetensors"
    honest = path.read_bytes()
    with safe_open(path, "numpy") as file:
        card, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    path.write_bytes(save({name: array * np.float32(-3) for name, array in tensors.items()}, card))
    rehash(request.output)
    assert "is not signed by" in refusal(request.output, trust=keys[1])
    build(request)
    open_manifest(request.output, trust=keys[1])
    assert path.read_bytes() == honest
    steps: list[str] = []
    build(request, lambda step, *_: steps.append(step))
    assert steps[-1] == "looking for an up-to-date bundle", "signed by this key, it is up to date"
    (request.output / "manifest.sig").unlink()
    build(request)
    check_signature(request.output, keys[1])


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    return write_keys(tmp_path / "key.pem")


def write_keys(path: Path) -> tuple[Path, Path]:
    private, public = Ed25519PrivateKey.generate(), path.with_suffix(".pub.pem")
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path, public


def as_another_user(folder: Path) -> str:
    """What ``nobody`` meets who opens the bundle and reads every file of its folder; empty for nothing."""
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.chdir(folder)  # the folders above are this user's alone
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for path in Path().rglob("*"):
                _ = path.is_dir() or path.read_bytes()
            if Path("manifest.json").exists():
                open_manifest(Path())
        except BaseException as error:
            os.write(sender, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    with os.fdopen(receiver, encoding="utf-8") as stream:
        return stream.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_opens_what_was_built_under_a_usual_umask(tiny_build: TinyBuild, tmp_path: Path) -> None:
    bundle, before = tmp_path / "out" / "bundle", os.umask(0o022)
    try:
        adapter = load_adapter(tiny_build.adapters["alpha"])
        save_adapter(tmp_path / "adapter", adapter.config, adapter.tensors)
        build(tiny_build.request(bundle, "alpha", prove=False))
    finally:
        os.umask(before)
    assert as_another_user(tmp_path / "adapter") == ""
    assert as_another_user(bundle).startswith("BundleError: . is not proven"), "all else was read and checked"
    (bundle / "weights.data").chmod(0o600)
    assert as_another_user(bundle).startswith("PermissionError"), "this test can fail"


@pytest.mark.parametrize(
    "name", ["weights.data", "tokenizer.json", "chat_template.jinja", "serve.onnx", "tenants/alpha.safetensors"]
)
def test_a_changed_byte_in_anything_that_is_used_is_refused(tiny_bundle: Path, name: str) -> None:
    assert name in BundleManifest.load(tiny_bundle).files
    data = bytearray((tiny_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tiny_bundle / name).write_bytes(data)
    assert f"{name} was altered: its SHA-256 differs from the manifest's" in refusal(tiny_bundle)


@pytest.mark.parametrize("name", ["chat_template.jinja.bak", "tenants/delta.safetensors", "engines/x/note"])
def test_a_file_that_the_manifest_does_not_name_is_refused(tiny_bundle: Path, name: str) -> None:
    (tiny_bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (tiny_bundle / name).write_text("mine")
    assert f"{name} is not in the manifest" in refusal(tiny_bundle)


def test_a_link_to_a_folder_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tiny_bundle / "more").symlink_to(tmp_path)
    assert "more is not in the manifest" in refusal(tiny_bundle)


def test_a_template_that_the_manifest_was_made_to_forget_is_refused(tiny_bundle: Path) -> None:
    manifest = BundleManifest.load(tiny_bundle)
    files = {name: spec for name, spec in manifest.files.items() if name != "chat_template.jinja"}
    dataclasses.replace(manifest, files=files).save(tiny_bundle)
    assert "chat_template.jinja is not in the manifest" in refusal(tiny_bundle)


def test_a_changed_manifest_is_refused(tiny_bundle: Path) -> None:
    path = tiny_bundle / "manifest.json"
    path.write_text(path.read_text().replace('"prompt_format": "chat"', '"prompt_format": "plain"'))
    text = "manifest.json was altered: its SHA-256 differs from that in manifest.sha256"
    assert text in refusal(tiny_bundle)
    (tiny_bundle / "manifest.sha256").unlink()
    assert "manifest.sha256 is missing" in refusal(tiny_bundle)
    seal(tiny_bundle)
    assert open_manifest(tiny_bundle).tenant("beta").prompt_format == "plain"


@pytest.mark.parametrize("verdict", ["fail", "not run"])
def test_a_bundle_without_proof_opens_only_where_that_is_allowed(tiny_bundle: Path, verdict: str) -> None:
    dataclasses.replace(BundleManifest.load(tiny_bundle), parity=Parity(verdict)).save(tiny_bundle)
    assert refusal(tiny_bundle) == (
        f"{tiny_bundle} is not proven to answer as PyTorch does: its verdict is {verdict!r}, expected 'pass'; build it "
        "again, or allow it (allow_unproven=True, --allow-unproven)"
    )
    with pytest.raises(BundleError, match="is not proven"):
        Session.open(tiny_bundle)
    assert Session.open(tiny_bundle, allow_unproven=True).manifest.parity.verdict == verdict
    asked = ["generate", tiny_bundle, "--tenant=alpha", "--prompt=the film", "--max-new-tokens=2"]
    assert run(*asked).code == 1
    assert run(*asked, "--allow-unproven").code == 0


def test_a_signed_bundle_opens_for_who_trusts_its_key_alone(
    tiny_bundle: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    _, other = write_keys(tmp_path / "other.pem")
    assert f"{tiny_bundle} is not signed: it has no manifest.sig; build it with --sign" in refusal(
        tiny_bundle, trust=public
    )
    sign(tiny_bundle, private)
    assert open_manifest(tiny_bundle, trust=public) == open_manifest(tiny_bundle)
    assert Session.open(tiny_bundle, trust=public).tenants == ["alpha", "beta", "gamma"]
    assert f"is not signed by {other}: manifest.sig does not fit manifest.json" in refusal(tiny_bundle, trust=other)
    manifest = BundleManifest.load(tiny_bundle)
    dataclasses.replace(manifest, build_key="other").save(tiny_bundle)  # with a hash that fits
    assert "manifest.sig does not fit manifest.json" in refusal(tiny_bundle, trust=public)
    assert open_manifest(tiny_bundle).build_key == "other"
    (tiny_bundle / "manifest.sig").write_bytes(b"not base64!")
    assert "manifest.sig does not fit manifest.json" in refusal(tiny_bundle, trust=public)
    assert "a signature says nothing of files that are not checked" in refusal(tiny_bundle, trust=public, verify=False)


def test_keys_that_are_none_are_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    (tmp_path / "text").write_text("text")
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    (tmp_path / "locked").write_bytes(locked)
    for path in (public, tmp_path / "text", tmp_path / "locked", tmp_path / "none", tmp_path):
        with pytest.raises(IaptError, match="private ed25519 key in PEM without a passphrase"):
            load_private_key(path)
    for path in (private, tmp_path / "text", tmp_path / "none"):
        with pytest.raises(IaptError, match="a public ed25519 key in PEM"):
            check_signature(tmp_path, path)


def test_build_signs_and_generate_asks(tiny_build: TinyBuild, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    output = tmp_path / "bundle"
    broken = run(*tiny_build.arguments(output), f"--sign={public}")
    assert broken.code == 1 and "is not a private ed25519 key" in broken.err and not output.exists()
    assert run(*tiny_build.arguments(output), f"--sign={private}").code == 0
    asked = ["generate", output, "--tenant=alpha", "--prompt=the film", "--max-new-tokens=2", f"--trust={public}"]
    assert run(*asked).code == 0
    (output / "manifest.sig").unlink()
    refused = run(*asked)
    assert refused.code == 1 and "is not signed" in refused.err
    again = run(*tiny_build.arguments(output), f"--sign={private}")  # finds it up to date, and signs it
    assert again.code == 0 and run(*asked).code == 0
