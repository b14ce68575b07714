"""Lay out a bundle's files and describe them in its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from iapt_export import __version__
from iapt_export.building.plain_tenant import new_card
from iapt_export.building.plan import TenantPlan
from iapt_export.building.probes import make_probes
from iapt_export.building.stage_cache import place, stage_files
from iapt_export.contract.errors import BundleError, shown
from iapt_export.contract.graphs import ENCODER, KINDS, VERIFY, step_graphs
from iapt_export.contract.integrity import is_signed_with, verify_files
from iapt_export.contract.manifest import (
    OUTSIDE_MANIFEST,
    TENANT_INDEX,
    BackboneSpec,
    BundleManifest,
    FileSpec,
    GraphSpec,
    MethodSpec,
    Parity,
    TargetSpec,
    TenantSpec,
    file_sha256,
    write_atomically,
)
from iapt_export.contract.probes import PROBES_FILE
from iapt_export.contract.sizes import BackboneSizes
from iapt_export.contract.tenant_card import TenantCard
from iapt_export.graphs.export import PASSES_FILE
from iapt_export.graphs.installed import Installed
from iapt_export.graphs.interface import weight_specs
from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION
from trainers.adapters.adapter import CONFIG_FILE, EXAMPLES_FILE, WEIGHTS_FILE, Adapter
from trainers.decoder.family import max_positions, remote_code_sha256
from trainers.decoder.insertion import sizes_of
from trainers.decoder.instruction import is_token_id, padding_id
from trainers.decoder.stored import weights_sha256
from trainers.methods.forms import form_name

TENANTS_FOLDER = "tenants"
TRAINED_FOLDER = "trained"
MODEL_CODE = "code"
ROOT = Path(__file__).resolve().parents[2]
EXPORTING_ROOMS = (
    "iapt_export/graphs",
    "iapt_export/contract",
    "trainers/decoder",
    "trainers/methods",
    "trainers/adapters",
)
"""Whose code shapes an export; whole rooms, so that no file is forgotten."""
ENGINE_ROOMS = ("engines/tensorrt", "engines/cuda", "engines/native.py", "iapt_export/contract")
"""Whose code shapes an engine."""
BUNDLE_ROOMS = ("trainers", "iapt_export", "engines", "validation")
"""Whose code shapes a bundle and its proof."""
EXPORT_PACKAGES = ("iapt-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir")
"""Packages whose versions may change what an export writes; ONNX Runtime's quantiser besides, where it is used."""
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
)


def backbone_spec(backbone: Any, adapters: Iterable[Adapter] = ()) -> BackboneSpec:
    """Describe a loaded backbone; hashes all of its weights.

    What ends an answer is the union of what the model's settings, its tokenizer and the adapters' training say.
    """
    config = backbone.model.config.get_text_config()
    sizes = sizes_of(backbone.model)
    eos = getattr(backbone.model.generation_config, "eos_token_id", None)
    # not every configuration has them: CodeGen's names no padding
    eos = getattr(config, "eos_token_id", None) if eos is None else eos
    own = [] if eos is None else eos if isinstance(eos, list) else [eos]
    trained = [adapter.config.eos_token_id for adapter in adapters]
    ends = dict.fromkeys([*own, getattr(backbone.tokenizer, "eos_token_id", None), *trained])
    eos_ids = [token for token in ends if is_token_id(token, sizes.vocab_size)]
    pad = padding_id(backbone.tokenizer, sizes.vocab_size, getattr(config, "pad_token_id", None), *eos_ids)
    return BackboneSpec(
        name_or_path=backbone.name_or_path,
        revision=backbone.revision,
        fingerprint=backbone.fingerprint,
        weights_sha256=weights_sha256(backbone.model),
        model_type=config.model_type,
        eos_token_ids=eos_ids,
        pad_token_id=pad,
        max_positions=max_positions(backbone.model),
        **{item.name: getattr(sizes, item.name) for item in dataclasses.fields(BackboneSizes)},
    )


def check_weights(backbone: Any, spec: BackboneSpec) -> None:
    """Refuse a loaded backbone of a bundle's architecture with other weights, and sizes that are not the backbone's.

    Raises:
        BundleError: the weights differ, or the manifest was changed.
    """
    if weights_sha256(backbone.model) != spec.weights_sha256:
        raise BundleError(
            f"{backbone.name_or_path} has the architecture but not the weights of the bundle's backbone, "
            f"{spec.name_or_path}; give the same revision with --model and --revision"
        )
    sizes = sizes_of(backbone.model)
    names = [item.name for item in dataclasses.fields(BackboneSizes)]
    if wrong := [name for name in names if getattr(spec, name) != getattr(sizes, name)]:
        told = ", ".join(f"{name} {shown(getattr(spec, name))} for {shown(getattr(sizes, name))}" for name in wrong)
        raise BundleError(f"the manifest has other sizes than the bundle's backbone: {told}; build the bundle again")


def method_spec(item: Installed) -> MethodSpec:
    """The contract that every tenant of a method meets; tenants' files hold fp32."""
    return MethodSpec(
        name=item.name,
        form=form_name(item.stacked),
        config=dataclasses.asdict(item.stacked.config),
        prompt_length=item.method.num_slots,
        weights=weight_specs(item, "fp32"),
        in_decode=item.method.in_decode,
    )


def tenant_card(name: str, plan: TenantPlan, backbone: BackboneSpec) -> TenantCard:
    """What a tenant's file says of itself."""
    (item,) = (item for item in plan.installed if item.name == plan.owner[name])
    card = new_card(name, plan.adapters[name].config, backbone, form_name(item.stacked), item.stacked.config)
    return dataclasses.replace(card, prompt_length=item.method.num_slots)


def place_tenants(plan: TenantPlan, bundle: Path, backbone: BackboneSpec) -> list[TenantSpec]:
    """Write every tenant's weights as the graphs take them, as it was trained, and its example prompts."""
    (bundle / TENANTS_FOLDER).mkdir()
    return [_place_tenant(name, plan, bundle, backbone) for name in plan.adapters]


def _place_tenant(name: str, plan: TenantPlan, bundle: Path, backbone: BackboneSpec) -> TenantSpec:
    adapter, owner = plan.adapters[name], plan.owner[name]
    shipped = None
    if owner is not None:
        shipped = plan.shipped[name]
        save_tenant(shipped, bundle / TENANTS_FOLDER / f"{name}.safetensors", tenant_card(name, plan, backbone))
    trained = shipped is None or not are_equal(shipped, adapter.tensors)
    if trained:
        (bundle / TENANTS_FOLDER / TRAINED_FOLDER).mkdir(exist_ok=True)
        save_tenant(adapter.tensors, bundle / TENANTS_FOLDER / TRAINED_FOLDER / f"{name}.safetensors")
    examples = None if adapter.path is None else adapter.path / EXAMPLES_FILE
    if examples is not None and examples.is_file():
        (bundle / TENANTS_FOLDER / f"{name}.{EXAMPLES_FILE}").write_bytes(examples.read_bytes())
    else:
        examples = None
    return new_tenant(
        name,
        adapter,
        method=owner,
        path=f"{TENANTS_FOLDER}/{name}.safetensors" if shipped else None,
        trained=f"{TENANTS_FOLDER}/{TRAINED_FOLDER}/{name}.safetensors" if trained else None,
        examples=f"{TENANTS_FOLDER}/{name}.{EXAMPLES_FILE}" if examples else None,
    )


def new_tenant(name: str, adapter: Adapter, **places: str | None) -> TenantSpec:
    """What a manifest says of an adapter as a tenant, given its method and its files."""
    return TenantSpec(
        name=name,
        trained_form=adapter.config.peft_type,
        trained_config=dataclasses.asdict(adapter.config.method),
        prompt_format=adapter.config.prompt_format,
        system_prompt=adapter.config.system_prompt,
        labels=list(adapter.config.labels),
        **places,
    )


def are_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two have the same tensors under the same names."""
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def save_tenant(tensors: dict[str, Tensor], path: Path, card: TenantCard | None = None) -> None:
    """Write a tenant's tensors in fp32, with its card."""
    metadata = None if card is None else card.to_metadata()
    stored = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    # not safetensors' save_file, which gives files that only their owner may read, whatever the umask
    write_atomically(path, safetensors.torch.save(stored, metadata))


def place_files(source: Path, bundle: Path) -> None:
    """Bring a finished stage's files into the bundle, and nothing that others left beside them."""
    bundle.mkdir(parents=True, exist_ok=True)
    for name in sorted(stage_files(source) - {PASSES_FILE}):
        place(source / name, bundle)


def pass_notes(graphs: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What the passes over these graphs say, as the manifest has it."""
    notes = json.loads((graphs / PASSES_FILE).read_text(encoding="utf-8"))
    return {name: notes[name] for name in names}


def place_tokenizer(backbone: Any, bundle: Path) -> None:
    """Write the model's configuration and tokenizer in Hugging Face's form, with probes of the tokenizer."""
    backbone.model.config.save_pretrained(bundle)
    backbone.model.generation_config.save_pretrained(bundle)
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(bundle)
        make_probes(backbone.tokenizer).save(bundle)


MODEL_CONFIG = "config.json"


def text_hashes(folder: Path, model: Any) -> dict[str, str]:
    """File to SHA-256 of what `place_tokenizer` wrote into an empty folder, so that a change of any is a change.

    The backbone's fingerprint has of its configuration what an adapter must agree with; what it computes depends on
    more, such as an epsilon or an activation. The type in which weights happen to be loaded is left out. A model whose
    code came with it has that as well, as `MODEL_CODE`.
    """
    found = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != PROBES_FILE}
    config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    told = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype", "_name_or_path")}
    found[MODEL_CONFIG] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return found | ({MODEL_CODE: code} if (code := remote_code_sha256(model)) else {})


def engine_specs(specs: dict[str, GraphSpec], target: str) -> dict[str, GraphSpec]:
    """Interfaces of the engines of a target, at their places in the bundle."""
    return {
        name: dataclasses.replace(specs[name], path=f"engines/{target}/{name}.engine") for name in engine_graphs(specs)
    }


def engine_graphs(specs: dict[str, GraphSpec]) -> tuple[str, ...]:
    """The graphs that TensorRT engines are built from: over a cache in place, where the opset has what that needs."""
    standard = [name for name in specs if not KINDS[name].needs_onnxruntime]
    steps = step_graphs(standard, in_place=True) or step_graphs(standard, in_place=False)
    return tuple(name for name in specs if name in (ENCODER, *steps))


def served_graphs(specs: dict[str, GraphSpec]) -> dict[str, GraphSpec]:
    """The graphs that ONNX Runtime serves from; the others are for engines, other readers and comparison."""
    steps = step_graphs(specs, in_place=True)
    return {name: spec for name, spec in specs.items() if name in (ENCODER, VERIFY, *steps)}


def new_manifest(plan: Any, tenants: list[TenantSpec], targets: list[TargetSpec]) -> BundleManifest:
    """A manifest that knows no files and no parity yet.

    Args:
        plan: the `iapt_export.building.jobs.BuildPlan`, which only the build itself may import.
        tenants: of `place_tenants`.
        targets: with their graphs.
    """
    methods = [method_spec(item) for item in plan.tenants.installed]
    return BundleManifest(
        versions=versions(),
        build_key=plan.key,
        backbone=plan.backbone,
        methods=methods,
        ranges=plan.ranges,
        tenants=tenants,
        targets=targets,
        parity=Parity("not run"),
        files={},
        op_domain=DOMAIN,
        op_version=DOMAIN_VERSION,
        serves_backbone=_serves_backbone(methods, tenants, targets),
    )


def _serves_backbone(methods: list[MethodSpec], tenants: list[TenantSpec], targets: list[TargetSpec]) -> bool:
    """Nobody is merged into the backbone, and each graph that reads instructions can be told to leave a row alone."""
    reading = [spec for target in targets for name, spec in target.graphs.items() if KINDS[name].reads]
    taken = [{tensor.name for tensor in spec.inputs} for spec in reading]
    told = all(f"{method.name}.{TENANT_INDEX}" in names for method in methods for names in taken)
    return told and all(tenant.method is not None for tenant in tenants)


def with_files(manifest: BundleManifest, bundle: Path) -> BundleManifest:
    """The manifest with the hash and size of every file that stands in the bundle now."""
    paths = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name not in OUTSIDE_MANIFEST)
    files = {path.relative_to(bundle).as_posix(): FileSpec(file_sha256(path), path.stat().st_size) for path in paths}
    return dataclasses.replace(manifest, files=files)


def code_sha256(rooms: Sequence[str]) -> str:
    """SHA-256 over the names and contents of the Python files of folders of this project."""
    paths = {
        path for room in rooms for path in ((ROOT / room).rglob("*.py") if (ROOT / room).is_dir() else [ROOT / room])
    }
    files = [(path.relative_to(ROOT).as_posix(), file_sha256(path)) for path in sorted(paths)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def export_versions(*, quantises: bool = False) -> dict[str, str]:
    """What may change graphs besides their inputs: this project's code, and versions of libraries."""
    packages = (*EXPORT_PACKAGES, "onnxruntime") if quantises else EXPORT_PACKAGES
    found = {name: version for name, version in versions().items() if name in packages}
    return found | {"code": code_sha256(EXPORTING_ROOMS)}


def engine_versions(runtime: str, plugin: Path | None = None) -> dict[str, str]:
    """What may change an engine besides its graph and options.

    Args:
        runtime: version of the TensorRT that builds it.
        plugin: the library of ours that it is built with, if any.
    """
    found = {"iapt-export": __version__, "runtime": runtime, "code": code_sha256(ENGINE_ROOMS)}
    return found | ({"plugin": file_sha256(plugin)} if plugin else {})


def adapter_hashes(tenants: dict[str, Adapter]) -> dict[str, list[Any]]:
    """Tenant to the hashes of its adapter's files, and to what was said of one of stock PEFT."""
    hashes: dict[str, list[Any]] = {}
    for name, adapter in tenants.items():
        assert adapter.path is not None
        files = [adapter.path / file for file in (CONFIG_FILE, WEIGHTS_FILE, EXAMPLES_FILE)]
        hashes[name] = [file_sha256(path) for path in files if path.is_file()]
        hashes[name] += [adapter.config.prompt_format, adapter.peft_task] if adapter.from_peft else []
    return hashes


def build_inputs(spec: BackboneSpec, tenants: dict[str, Adapter], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that a finished bundle depends on; equal inputs mean an equal bundle."""
    return {
        "backbone": dataclasses.asdict(spec),
        "tenants": adapter_hashes(tenants),
        "order": list(tenants),
        "settings": settings,
        "versions": versions() | {"code": code_sha256(BUNDLE_ROOMS)},
    }


def is_current(bundle: Path, build_key: str, sign: str | Path | None) -> bool:
    """Whether a whole, proven bundle with this key stands there already, signed where that is asked for.

    Hashes and the key say nothing of who wrote them, so one without the signature is not signed now but built again.
    """
    try:
        manifest = BundleManifest.load(bundle)
        if manifest.build_key != build_key or manifest.parity.verdict != "pass":
            return False
        verify_files(bundle, manifest)
    except BundleError:
        return False
    return not sign or is_signed_with(bundle, Path(sign))


def versions() -> dict[str, str]:
    """This tool's version and those of the libraries that shape its output, as far as installed."""
    found = {"iapt-export": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
