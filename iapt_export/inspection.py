"""Describe what a path holds: an adapter directory, a bundle, an ONNX graph, or an engine with its record."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import MANIFEST_FILE, BundleManifest, TensorSpec


def describe(path: Path) -> dict[str, Any]:
    """What stands at a path, as plain data with a ``kind``.

    Raises:
        IaptError: nothing stands there, or nothing that this tool writes.
    """
    if not path.exists():
        raise IaptError(f"{path} does not exist; expected an adapter directory, a bundle, a .onnx or a .engine file")
    if (path / MANIFEST_FILE).is_file():
        return _describe_bundle(path)
    if (path / "adapter_config.json").is_file():
        return _describe_adapter(path)
    if path.suffix == ".onnx":
        return _describe_graph(path)
    if path.suffix == ".engine":
        return _describe_engine(path)
    raise IaptError(f"{path} is no adapter directory, no bundle, no .onnx and no .engine file")


def table(found: dict[str, Any]) -> Any:
    """A description as a rich table, nested values indented."""
    from rich.table import Table

    result = Table(show_header=False, box=None, pad_edge=False)
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in found.items():
        result.add_row(name.replace("_", " "), _shown(value))
    return result


def _describe_bundle(path: Path) -> dict[str, Any]:
    manifest = BundleManifest.load(path)
    fields = dataclasses.asdict(manifest)
    return {
        "kind": "bundle",
        "verdict": manifest.parity.verdict,
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


def _target_line(target: Any) -> str:
    built_for = f", compute capability {target.compute_capability}" if target.compute_capability else ""
    return f"{target.name} {target.dtype}, opset {target.opset}, runtime {target.runtime_version}{built_for}"


def _describe_adapter(path: Path) -> dict[str, Any]:
    from trainers.adapters.directory import load_adapter

    adapter = load_adapter(path)
    config = dataclasses.asdict(adapter.config)
    return {
        "kind": "adapter",
        **{name: config[name] for name in ("peft_type", "base_model_name_or_path", "prompt_format", "labels")},
        "backbone": f"{config['num_layers']} layers, width {config['hidden_size']}, "
        f"fingerprint {config['backbone_fingerprint']}",
        "method": config["method"],
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "tensors": {name: list(tensor.shape) for name, tensor in adapter.tensors.items()},
    }


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
    fields = json.loads(record.read_text(encoding="utf-8"))
    return {"kind": "engine", **fields}


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
