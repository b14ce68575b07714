"""Describe what a path holds: a model, an adapter, a tenant's file, a bundle, an ONNX graph, or an engine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.integrity import verify_files
from iapt_export.contract.low_bits import in_words
from iapt_export.contract.manifest import MANIFEST_FILE, BundleManifest, TensorSpec
from iapt_export.contract.schema import read_object
from iapt_export.contract.tenant_card import TenantCard
from iapt_export.contract.weights_header import read_header

if TYPE_CHECKING:
    from trainers.decoder.backbone import Backbone

FEW = 4
"""Lines of one value that are shown where not everything is asked for."""
COUNTED = ("measured", "files", "versions", "tensors")
"""What is counted then: long, and seldom asked for."""
EXPECTED = "an adapter directory, a tenant's file, a model (folder or .gguf), a bundle, a .onnx or a .engine file"


def describe(path: Path, model: str | None = None) -> dict[str, Any]:
    """What stands at a path, as plain data with a ``kind``.

    Args:
        path: any of `EXPECTED`.
        model: the backbone with which an adapter is compared; its weights are not read.

    Raises:
        IaptError: nothing stands there, nothing that is known, or a model is given for what is no adapter.
    """
    if not path.exists():
        raise IaptError(f"{path} does not exist; expected {EXPECTED} (doctor --model {path} asks the model hub)")
    if (path / "adapter_config.json").is_file():
        return _describe_adapter(path, model)
    if model is not None:
        raise IaptError(f"--model is for an adapter directory, with which it is compared; {path} is none")
    if (path / MANIFEST_FILE).is_file():
        return _describe_bundle(path)
    of_suffix = {".onnx": _describe_graph, ".engine": _describe_engine, ".safetensors": _describe_tenant}
    if path.is_file() and path.suffix in of_suffix:
        return of_suffix[path.suffix](path)
    if path.suffix == ".gguf" or (path / "config.json").is_file() or any(path.glob("*.gguf")):
        return describe_model(str(path))
    if any(path.glob("*/adapter_config.json")):
        from trainers.adapters.adapter import read_fields

        read_fields(path)  # says which adapters these are
    raise IaptError(f"{path} is none of what is known; expected {EXPECTED}")


def describe_model(name: str) -> dict[str, Any]:
    """What `train` and `build` say of a backbone, and its sizes; its weights need not be there.

    Args:
        name: Hugging Face id, local folder, or GGUF file or folder.

    Returns:
        ``verdict`` is ``supported``, ``supported by portable graphs only`` or ``refused``, the last with a ``reason``.
    """
    from trainers.decoder.backbone import load_outline, load_tokenizer
    from trainers.decoder.family import check_family
    from trainers.decoder.insertion import sizes_of

    try:
        if (Path(name) / MANIFEST_FILE).is_file():
            raise IaptError(f"{name} is a bundle, which holds no weights to train or build with; give its backbone")
        model = load_outline(name)
        family, sizes = check_family(model, name), sizes_of(model)
        load_tokenizer(name)
    except IaptError as error:
        return {"kind": "model", "verdict": "refused", "reason": str(error)}
    config = model.config.get_text_config()
    positions = family.max_positions or getattr(config, "max_position_embeddings", None)
    return {
        "kind": "model",
        "verdict": "supported" if family.in_place else "supported by portable graphs only",
        **({"restrictions": list(family.restrictions)} if family.restrictions else {}),
        "model_type": config.model_type,
        "layers": sizes.num_layers,
        "width": sizes.hidden_size,
        "vocabulary": sizes.vocab_size,
        "cache": f"{sizes.num_kv_heads} heads of {' and '.join(map(str, dict.fromkeys(sizes.cache_widths)))}",
        **({"positions": positions} if positions else {}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def table(found: dict[str, Any], everything: bool = True) -> Any:
    """A description as a rich table, nested values indented.

    Args:
        found: what `describe` found.
        everything: also the lines of long lists after `FEW`, and what `COUNTED` names.
    """
    from rich.table import Table

    result = Table(show_header=False, box=None, pad_edge=False)
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in found.items():
        result.add_row(name.replace("_", " "), _shown(value) if everything else _brief(name, value))
    return result


def _brief(name: str, value: Any) -> str:
    """A value in at most `FEW` lines, or how many things it holds."""
    if name in COUNTED and isinstance(value, dict):
        return f"{len(value)}; --all lists them"
    lines = _shown(value).split("\n")
    if len(lines) <= FEW:
        return "\n".join(lines)
    return "\n".join([*lines[: FEW - 1], f"and {len(lines) - FEW + 1} more lines; --all shows them"])


def _describe_bundle(path: Path) -> dict[str, Any]:
    manifest = BundleManifest.load(path)
    fields = dataclasses.asdict(manifest)
    return {
        "kind": "bundle",
        "verdict": manifest.parity.verdict,
        "intact": _whether_intact(path, manifest),
        "backbone": f"{manifest.backbone.name_or_path} ({manifest.backbone.model_type}, "
        f"{manifest.backbone.num_layers} layers, width {manifest.backbone.hidden_size})",
        "methods": [
            f"{method.name}: {method.form}, {method.prompt_length} prompt slots"
            + (", also in decode steps" if method.in_decode else "")
            for method in manifest.methods
        ],
        "tenants": [
            f"{tenant.name}: {tenant.trained_form}" + (f" as {tenant.method}" if tenant.method else ", merged")
            for tenant in manifest.tenants
        ],
        "targets": [_target_line(target) for target in manifest.targets],
        "ranges": {
            name: f"{size['min']} to {size['max']}, tuned for {size['opt']}" for name, size in fields["ranges"].items()
        },
        "measured": fields["parity"]["measured"],
        "size_bytes": sum(spec.size_bytes for spec in manifest.files.values()),
        "files": {name: spec.size_bytes for name, spec in manifest.files.items()},
        "versions": manifest.versions,
    }


def _whether_intact(path: Path, manifest: BundleManifest) -> str:
    """Whether the verdict is of the files that stand there."""
    try:
        verify_files(path, manifest)
    except BundleError as error:
        return f"no: {error}"
    return "yes, every file has the manifest's hash"


def _target_line(target: Any) -> str:
    built_for = f", compute capability {target.compute_capability}" if target.compute_capability else ""
    stored = in_words(target.dtype, target.quantise)
    return f"{target.name} {stored}, opset {target.opset}, runtime {target.runtime_version}{built_for}"


def _describe_adapter(path: Path, model: str | None) -> dict[str, Any]:
    from trainers.adapters.adapter import is_stock_peft, read_fields
    from trainers.adapters.directory import load_adapter

    fields = read_fields(path)
    if is_stock_peft(fields):
        return _describe_stock_adapter(path, fields, model)
    adapter = load_adapter(path)
    config = dataclasses.asdict(adapter.config)
    return {
        "kind": "adapter",
        **{name: config[name] for name in ("peft_type", "base_model_name_or_path", "prompt_format", "labels")},
        "backbone": f"{config['num_layers']} layers, width {config['hidden_size']}, "
        f"fingerprint {config['backbone_fingerprint']}",
        "trained_on": f"{in_words(config['weights'], config['quantise'])} weights",
        **({"build": _said_by_build(path, model)} if model else {}),
        **({"system_prompt": config["system_prompt"]} if config["system_prompt"] else {}),
        "method": config["method"],
        "example_prompts": _prompts_line(path),
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "tensors": {name: list(tensor.shape) for name, tensor in adapter.tensors.items()},
    }


def _prompts_line(path: Path) -> str:
    """How many prompts stand beside an adapter for the comparison with PyTorch."""
    from trainers.adapters.adapter import EXAMPLES_FILE

    if not (examples := path / EXAMPLES_FILE).is_file():
        return f"none in {EXAMPLES_FILE}: build compares general prompts"
    count = sum(bool(line.strip()) for line in examples.read_bytes().split(b"\n"))
    return f"{count} in {EXAMPLES_FILE}, which build compares and copies into the bundle"


def _describe_stock_adapter(path: Path, fields: dict[str, Any], model: str | None) -> dict[str, Any]:
    from trainers.adapters.adapter import read_tensors
    from trainers.adapters.peft_format import PEFT_METHODS

    method, tensors = fields["peft_type"], read_tensors(path)
    if model:
        said = _said_by_build(path, model)
    elif method not in PEFT_METHODS:
        said = f"refused: PEFT's method {method!r} is not supported; use one of {', '.join(PEFT_METHODS)}"
    else:
        said = "not checked: options and tensors are compared with those of its backbone; name that with --model"
    shown = ("r", "lora_alpha", "target_modules", "num_virtual_tokens", "num_tasks")
    return {
        "kind": "adapter of stock PEFT",
        "peft_type": method,
        "build": said,
        "base_model_name_or_path": fields.get("base_model_name_or_path"),
        **{name: fields[name] for name in shown if fields.get(name) is not None},
        **_others_inside(path),
        "example_prompts": _prompts_line(path),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


def _others_inside(path: Path) -> dict[str, str]:
    """Adapters that PEFT saved beside the one called "default", in folders of their names: each is a tenant itself."""
    inner = sorted(item.parent for item in path.glob("*/adapter_config.json"))
    return {"also_inside": ", ".join(f"--adapter {item}" for item in inner)} if inner else {}


def _said_by_build(path: Path, model: str) -> str:
    """What `build` says of an adapter and a backbone, whose weights are not read."""
    from trainers.adapters.directory import check_adapter_fits, doubt_of_backbone, load_adapter
    from trainers.adapters.peft_format import format_question
    from trainers.decoder.backbone import load_tokenizer
    from trainers.decoder.instruction import resolve_prompt_format

    try:
        backbone = _outline_of(model)
        adapter = load_adapter(path, backbone, peft_prompt_format="plain")
        check_adapter_fits(adapter.config, backbone, str(path))
        tokenizer = load_tokenizer(model)
        question = format_question(tokenizer, path) if adapter.from_peft else ""
        resolve_prompt_format(tokenizer, adapter.config.prompt_format, continues=True)
    except IaptError as error:
        return f"refused: {error}"
    said = f"supported as {adapter.config.peft_type}"
    return "; ".join(filter(None, (said, question and f"it {question}", doubt_of_backbone(adapter, backbone))))


def _outline_of(model: str) -> Backbone:
    from trainers.decoder.backbone import Backbone, load_outline
    from trainers.decoder.family import check_family

    outline = load_outline(model)
    check_family(outline, model)
    return Backbone(outline, None, model)


def _describe_tenant(path: Path) -> dict[str, Any]:
    try:
        metadata, entries = read_header(path)
    except (OSError, ValueError) as error:
        raise IaptError(f"{path} is no whole safetensors file: {error}") from error
    card = dataclasses.asdict(TenantCard.from_metadata(metadata, str(path)))
    return {"kind": "tenant's file", **card, "tensors": {name: entries[name].shape for name in sorted(entries)}}


def _describe_graph(path: Path) -> dict[str, Any]:
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's errors share no public base class
        raise IaptError(f"{path} is not an ONNX file: {error}") from error
    operators = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph)
    return {
        "kind": "ONNX graph",
        "opsets": dict(model.opset_imports),
        "functions": [f"{domain}::{name}" for domain, name, _ in model.functions],
        "inputs": [_value_line(value) for value in model.graph.inputs],
        "outputs": [_value_line(value) for value in model.graph.outputs],
        "operators": dict(operators.most_common()),
        "weights": f"{len(model.graph.initializers)} tensors, "
        f"{sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)} bytes",
    }


def _describe_engine(path: Path) -> dict[str, Any]:
    record = path.with_suffix(".json")
    if not record.is_file():
        raise IaptError(f"{path}: its record {record.name} is missing; an engine alone opens only on its GPU")
    return {"kind": "engine", **read_object(record, "it is the engine's record: build the bundle again")}


def _value_line(value: Any) -> str:
    return f"{value.name} {value.dtype} {[str(size) if not isinstance(size, int) else size for size in value.shape]}"


def _nested(value: Any) -> str:
    """A value after its name: beside it, or indented below it when it has names of its own."""
    text = _shown(value)
    return "\n  " + text.replace("\n", "\n  ") if isinstance(value, dict) else " " + text


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}:{_nested(item)}" for name, item in value.items())
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        return "\n".join(_shown(item) for item in value)
    if dataclasses.is_dataclass(value) or isinstance(value, TensorSpec):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
