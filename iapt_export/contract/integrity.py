"""Whether a bundle is what its manifest says: its files, the manifest itself, who signed it, and its proof.

Standard library only, but for signatures: those need ``cryptography`` (the extra ``sign``).
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.manifest import (
    HASH_FILE,
    MANIFEST_FILE,
    OUTSIDE_MANIFEST,
    SIGNATURE_FILE,
    BundleManifest,
    file_sha256,
    hash_line,
    used_paths,
    write_atomically,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class Checks(TypedDict, total=False):
    """What is asked of a bundle before it is opened."""

    verify: bool
    """Check every file's hash and the manifest's, and that no file is there that the manifest does not name."""
    trust: str | Path | None
    """A public ed25519 key, in PEM; the bundle must be signed with its private key."""
    allow_unproven: bool
    """Open also a bundle whose comparison with PyTorch was not made, or failed."""


def open_manifest(
    bundle: Path, *, verify: bool = True, trust: str | Path | None = None, allow_unproven: bool = False
) -> BundleManifest:
    """Read a bundle's manifest and check what it says; see `Checks`.

    Raises:
        BundleError: the manifest is not valid, a check does not hold, or the signature is missing or another's.
        IaptError: the checks contradict each other, or ``trust`` is no public key.
    """
    if trust is not None and not verify:
        raise IaptError("a signature says nothing of files that are not checked; leave verify=False out")
    manifest = BundleManifest.load(bundle)
    if trust is not None:
        check_signature(bundle, Path(trust))
    if verify:
        verify_files(bundle, manifest)
    if manifest.parity.verdict != "pass" and not allow_unproven:
        raise BundleError(
            f"{bundle} is not proven to answer as PyTorch does: its verdict is {manifest.parity.verdict!r}, expected "
            "'pass'; build it again, or allow it (allow_unproven=True, --allow-unproven)"
        )
    return manifest


def verify_files(bundle: Path, manifest: BundleManifest) -> None:
    """Check that a bundle has the files that its manifest names, no others, with their sizes and hashes.

    Raises:
        BundleError: files are missing, altered or not named, or the manifest is not what was written; all are listed.
    """
    problems = [f"{name} is used but has no hash" for name in used_paths(manifest) if name not in manifest.files]
    problems += _seal_problems(bundle)
    for name, spec in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != spec.size_bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {spec.size_bytes}")
        elif file_sha256(path) != spec.sha256:
            problems.append(f"{name} was altered: its SHA-256 differs from the manifest's")
    named = {*manifest.files, *OUTSIDE_MANIFEST}
    problems += [f"{name} is not in the manifest" for name in _files(bundle) if name not in named]
    if problems:
        raise BundleError(f"{bundle} is damaged: " + "; ".join(problems) + ". Copy or build the bundle again")


def _seal_problems(bundle: Path) -> list[str]:
    seal = bundle / HASH_FILE
    if not seal.is_file():
        return [f"{HASH_FILE} is missing"]
    if seal.read_bytes() != hash_line((bundle / MANIFEST_FILE).read_bytes()).encode():
        return [f"{MANIFEST_FILE} was altered: its SHA-256 differs from that in {HASH_FILE}"]
    return []


def _files(bundle: Path) -> Iterator[str]:
    """Every file of a bundle, and every link to a folder, by its path in the bundle."""
    for folder, folders, names in os.walk(bundle):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield (Path(folder) / name).relative_to(bundle).as_posix()


def sign(bundle: Path, key: Path) -> None:
    """Write ``manifest.sig``: an ed25519 signature over the bytes of ``manifest.json``, in base64.

    Args:
        bundle: a finished bundle.
        key: the private key, in PEM, without a passphrase.

    Raises:
        IaptError: ``key`` is no such key.
    """
    signature = load_private_key(key).sign((bundle / MANIFEST_FILE).read_bytes())
    write_atomically(bundle / SIGNATURE_FILE, base64.b64encode(signature) + b"\n")


def check_signature(bundle: Path, key: Path) -> None:
    """Check that a bundle's manifest was signed with the private key of ``key``.

    Raises:
        BundleError: it was not.
        IaptError: ``key`` is no public key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    what = "a public ed25519 key in PEM, as 'openssl pkey -pubout' writes it"
    try:
        public = load_pem_public_key(_key_bytes(key, what))
    except ValueError as error:
        raise IaptError(f"{key} is not {what}") from error
    if not isinstance(public, Ed25519PublicKey):
        raise IaptError(f"{key} is not {what}")
    path = bundle / SIGNATURE_FILE
    if not path.is_file():
        raise BundleError(f"{bundle} is not signed: it has no {SIGNATURE_FILE}; build it with --sign")
    try:
        public.verify(base64.b64decode(path.read_bytes().strip(), validate=True), (bundle / MANIFEST_FILE).read_bytes())
    except (InvalidSignature, binascii.Error) as error:
        raise BundleError(
            f"{bundle} is not signed by {key}: {SIGNATURE_FILE} does not fit {MANIFEST_FILE}; do not use the bundle, "
            "or name the key of who built it"
        ) from error


def is_signed_with(bundle: Path, key: Path) -> bool:
    """Whether a bundle's manifest carries the signature that `sign` would write.

    Raises:
        IaptError: ``key`` is no private key.
    """
    path = bundle / SIGNATURE_FILE
    signature = load_private_key(key).sign((bundle / MANIFEST_FILE).read_bytes())  # ed25519 has one for each message
    return path.is_file() and path.read_bytes().strip() == base64.b64encode(signature)


def load_private_key(key: Path) -> Ed25519PrivateKey:
    """A private key to `sign` with; loaded before a build, so that a wrong one is found then.

    Raises:
        IaptError: it is none.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    what = "a private ed25519 key in PEM without a passphrase, as 'openssl genpkey -algorithm ed25519' writes it"
    try:
        private = load_pem_private_key(_key_bytes(key, what), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IaptError(f"{key} is not {what}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise IaptError(f"{key} is not {what}")
    return private


def _key_bytes(key: Path, what: str) -> bytes:
    try:
        return key.read_bytes()
    except OSError as error:
        raise IaptError(f"{key} cannot be read ({error.strerror}); expected {what}") from error
