"""Lay out a bundle's files and describe them in its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from iapt_export import __version__
from iapt_export.errors import BundleError
from iapt_export.interface import ModelShape, weight_specs
from iapt_export.manifest import (
    MANIFEST_FILE,
    BackboneSpec,
    BundleManifest,
    FileSpec,
    GeneratorSpec,
    GraphSpec,
    Parity,
    Ranges,
    TargetSpec,
    TenantSpec,
    file_sha256,
    verify_files,
)
from iapt_export.ops import DOMAIN, DOMAIN_VERSION
from iapt_export.stages import STAGE_FILE, place
from trainers.adapter import CONFIG_FILE, EXAMPLES_FILE, WEIGHTS_FILE, Adapter
from trainers.config import IAPTConfig

TENANTS_FOLDER = "tenants"
ENGINE_GRAPHS = ("prefill", "decode")
"""The graphs that engines are built from; the generators alone are only ever compared, not served."""
EXPORT_PACKAGES = ("iapt-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir")
"""Packages whose versions may change what an export writes."""
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tensorrt-rtx", "tensorrt")


def backbone_spec(backbone: Any) -> BackboneSpec:
    """Describe a loaded backbone; hashes all of its weights."""
    config = backbone.model.config
    shape = ModelShape.from_config(config)
    eos = getattr(backbone.model.generation_config, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    tokenizer_pad = getattr(backbone.tokenizer, "pad_token_id", None)
    pad = next((token for token in (tokenizer_pad, config.pad_token_id, *eos_ids) if token is not None), 0)
    return BackboneSpec(
        name_or_path=backbone.name_or_path,
        revision=backbone.revision,
        fingerprint=backbone.fingerprint,
        weights_sha256=weights_sha256(backbone.model),
        model_type=config.model_type,
        eos_token_ids=eos_ids,
        pad_token_id=pad,
        **dataclasses.asdict(shape),
    )


def weights_sha256(model: Any) -> str:
    """SHA-256 over the names and bytes of a model's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).numpy().view("uint8").data)
    return digest.hexdigest()


def generator_spec(config: IAPTConfig, shape: ModelShape) -> GeneratorSpec:
    """The contract that every tenant meets; tenants' files hold fp32."""
    return GeneratorSpec(
        method="IAPT",
        config=dataclasses.asdict(config),
        prompt_length=config.prompt_length,
        weights=weight_specs(config, shape, "fp32"),
        op_domain=DOMAIN,
        op_version=DOMAIN_VERSION,
    )


def place_tenants(tenants: dict[str, Adapter], bundle: Path) -> list[TenantSpec]:
    """Copy the adapters' weights, byte for byte, and their example prompts into the bundle."""
    folder = bundle / TENANTS_FOLDER
    folder.mkdir()
    specs = []
    for name, adapter in tenants.items():
        assert adapter.path is not None
        data = (adapter.path / WEIGHTS_FILE).read_bytes()
        path = folder / f"{name}.safetensors"
        path.write_bytes(data)
        examples = adapter.path / EXAMPLES_FILE
        if examples.is_file():
            (folder / f"{name}.{EXAMPLES_FILE}").write_bytes(examples.read_bytes())
        specs.append(
            TenantSpec(
                name=name,
                path=f"{TENANTS_FOLDER}/{path.name}",
                sha256=hashlib.sha256(data).hexdigest(),
                prompt_format=adapter.config.prompt_format,
                labels=list(adapter.config.labels),
                examples=f"{TENANTS_FOLDER}/{name}.{EXAMPLES_FILE}" if examples.is_file() else None,
            )
        )
    return specs


def place_files(source: Path, bundle: Path) -> None:
    """Bring a finished stage's files into the bundle."""
    bundle.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.name != STAGE_FILE:
            place(path, bundle)


def place_tokenizer(backbone: Any, bundle: Path) -> None:
    """Write the model's configuration and tokenizer in Hugging Face's form."""
    backbone.model.config.save_pretrained(bundle)
    backbone.model.generation_config.save_pretrained(bundle)
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(bundle)


def engine_specs(specs: dict[str, GraphSpec], target: str) -> dict[str, GraphSpec]:
    """Interfaces of the engines of a target, at their places in the bundle."""
    return {name: dataclasses.replace(specs[name], path=f"engines/{target}/{name}.engine") for name in ENGINE_GRAPHS}


def new_manifest(
    backbone: BackboneSpec,
    generator: GeneratorSpec,
    ranges: Ranges,
    tenants: list[TenantSpec],
    targets: list[TargetSpec],
    build_key: str,
) -> BundleManifest:
    """A manifest that knows no files and no parity yet."""
    return BundleManifest(
        versions=versions(),
        build_key=build_key,
        backbone=backbone,
        generator=generator,
        ranges=ranges,
        tenants=tenants,
        targets=targets,
        parity=Parity("not run"),
        files={},
    )


def with_files(manifest: BundleManifest, bundle: Path) -> BundleManifest:
    """The manifest with the hash and size of every file that stands in the bundle now."""
    paths = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    files = {path.relative_to(bundle).as_posix(): FileSpec(file_sha256(path), path.stat().st_size) for path in paths}
    return dataclasses.replace(manifest, files=files)


def export_versions() -> dict[str, str]:
    """What may change an export besides its inputs: library versions, and a hash over this project's own part of it."""
    root = Path(__file__).resolve().parent
    exporter = [root / f"{name}.py" for name in ("export", "interface", "save", "trace", "twins")]
    exporter += sorted((root / "passes").glob("*.py")) + sorted((root / "ops").glob("*.py"))
    traced = [root.parent / "trainers" / f"{name}.py" for name in ("iapt", "insertion", "rational")]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in exporter + traced)).hexdigest()
    return {name: version for name, version in versions().items() if name in EXPORT_PACKAGES} | {"code": code}


def build_inputs(spec: BackboneSpec, tenants: dict[str, Adapter], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that a finished bundle depends on; equal inputs mean an equal bundle."""
    hashes = {}
    for name, adapter in tenants.items():
        assert adapter.path is not None
        files = [adapter.path / file for file in (CONFIG_FILE, WEIGHTS_FILE, EXAMPLES_FILE)]
        hashes[name] = [file_sha256(path) for path in files if path.is_file()]
    return {
        "backbone": dataclasses.asdict(spec),
        "tenants": hashes,
        "order": list(tenants),
        "settings": settings,
        "versions": [versions(), export_versions()],
    }


def is_current(bundle: Path, build_key: str) -> bool:
    """Whether a whole, proven bundle with this key stands there already."""
    try:
        manifest = BundleManifest.load(bundle)
        if manifest.build_key != build_key or manifest.parity.verdict != "pass":
            return False
        verify_files(bundle, manifest)
    except BundleError:
        return False
    return True


def versions() -> dict[str, str]:
    """This tool's version and those of the libraries that shape its output, as far as installed."""
    found = {"iapt-export": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
