"""The adapter directory, PEFT's convention: ``adapter_config.json`` and ``adapter_model.safetensors``.

Methods that stock PEFT has are written so that stock PEFT loads them too, see `trainers.peft_format`; of the others
only the layout is PEFT's.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers.backbone import Backbone
from trainers.config import choice_problems, config_from_dict, raise_problems
from trainers.errors import IaptError
from trainers.method import Method, Sizes
from trainers.method_configs import METHOD_CONFIGS, method_name
from trainers.methods import METHODS, new_method
from trainers.peft_format import PEFT_TYPES, adapter_from_peft, from_peft_tensors, peft_fields, to_peft_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EXAMPLES_FILE = "examples.jsonl"
"""Optional: a ``prompt`` on each line, inputs that the adapter was made for; validation uses them."""
SCHEMA_VERSION = 1
METHOD_FIELD = "method_config"
"""Where the fields of a method stand that stock PEFT has too, apart from PEFT's own."""

REQUIRED = ("base_model_name_or_path", "backbone_fingerprint", "hidden_size", "num_layers")
"""Fields without a default."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """``adapter_config.json``: which method, for which backbone, fed how."""

    base_model_name_or_path: str
    """The backbone as the trainer was given it."""
    backbone_fingerprint: str
    """`trainers.backbone.config_fingerprint` of that backbone."""
    hidden_size: int
    """D of the backbone."""
    num_layers: int
    """L of the backbone."""
    method: Any
    """The method's own fields: one of `trainers.method_configs`."""
    num_kv_heads: int = 0
    """H of the backbone, 0 where unknown, as are the next two."""
    head_dim: int = 0
    """K of the backbone."""
    vocab_size: int = 0
    """V of the backbone."""
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The linear layers that the method changes, see `trainers.method.Sizes`."""
    layers_path: str = "model.layers"
    """Name of the list of decoder layers within the model."""
    revision: str | None = None
    """The backbone's hub commit, if known."""
    prompt_format: Literal["chat", "plain"] = "plain"
    """chat: the instruction is one user message in the tokenizer's chat template; plain: text as it is."""
    labels: tuple[str, ...] = ()
    """The answers of a classification task; empty for free generation."""
    peft_type: str = ""
    """The method's name in PEFT's convention; empty takes that of ``method``."""
    task_type: str = "CAUSAL_LM"
    """PEFT's name of the task."""
    schema_version: int = SCHEMA_VERSION
    """Version of this file's layout."""

    def __post_init__(self) -> None:
        name = method_name(self.method)
        if not self.peft_type:
            object.__setattr__(self, "peft_type", name)
        problems = choice_problems(self)
        if self.peft_type != name:
            problems.append(f"peft_type={self.peft_type!r} is not the name of the method given, {name}")
        if self.prompt_format not in ("chat", "plain"):
            problems.append(f"prompt_format={self.prompt_format!r} is not one of chat, plain")
        for name in ("hidden_size", "num_layers"):
            if not _is_count(getattr(self, name), least=1):
                problems.append(f"{name}={getattr(self, name)!r} is not a positive integer")
        for name in ("num_kv_heads", "head_dim", "vocab_size"):
            if not _is_count(getattr(self, name), least=0):
                problems.append(f"{name}={getattr(self, name)!r} is not an integer of at least 0")
        if not isinstance(self.linears, dict) or not all(map(_is_pair, self.linears.values())):
            problems.append(f"linears={self.linears!r} does not give each name its inputs and outputs, two integers")
        raise_problems("adapter configuration", problems)

    @property
    def sizes(self) -> Sizes:
        """The backbone's sizes that the method's tensors depend on."""
        return Sizes(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Sizes)})


@dataclass
class Adapter:
    """A method's trained tensors with the configuration that gives them meaning."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    """Name to fp32 tensor, as the method's `trainers.method.Method.shapes` lists them."""
    path: Path | None = None
    """Where it was read from."""

    def module(self) -> Method:
        """The method with these weights, in evaluation mode."""
        module = new_method(self.config.method, self.config.sizes)
        module.load_state_dict(self.tensors)
        return module.eval()


def save_adapter(folder: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter directory; each file appears whole or not at all.

    Args:
        folder: made if missing.
        config: written as ``adapter_config.json``.
        tensors: the trained tensors, stored as fp32.
    """
    fields = dataclasses.asdict(config)
    method = fields.pop("method")
    if config.peft_type in PEFT_TYPES:
        fields = {**peft_fields(config.method, config.sizes), **fields, METHOD_FIELD: method}
        tensors = to_peft_tensors(config.method, tensors, config.sizes)
    else:
        fields.update(method)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / (WEIGHTS_FILE + ".tmp")
    save_file({name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}, weights)
    os.replace(weights, folder / WEIGHTS_FILE)
    # not sort_keys: the order of the linear layers is that of the method's tensors
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
    temporary = folder / (CONFIG_FILE + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def load_adapter(folder: str | Path, backbone: Backbone | None = None, *, peft_prompt_format: str = "plain") -> Adapter:
    """Read and check an adapter directory, ours or stock PEFT's.

    Args:
        folder: the directory.
        backbone: what the adapter is for; needed for a directory that stock PEFT wrote.
        peft_prompt_format: how prompts are fed to such a one, ``plain`` or ``chat``; ours say it themselves.

    Raises:
        IaptError: a file is missing, truncated, not safetensors, of an unknown method or schema, has
            tensors of other names, shapes or types than its configuration says, or holds NaN or infinity.
    """
    folder = Path(folder)
    path = folder / WEIGHTS_FILE
    if backbone is not None and _is_stock_peft(read_fields(folder)):
        adapter = adapter_from_peft(folder, backbone, peft_prompt_format)
        config, tensors = adapter.config, adapter.tensors
    else:
        config = read_adapter_config(folder)
        tensors = read_tensors(folder)
        if config.peft_type in PEFT_TYPES:
            tensors = from_peft_tensors(config.method, tensors, config.sizes, str(path))
    raise_problems(f"{path}", tensor_problems(METHODS[config.peft_type].shapes(config.method, config.sizes), tensors))
    return Adapter(config, {name: tensor.float() for name, tensor in tensors.items()}, folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors`` as it is.

    Raises:
        IaptError: it is missing, truncated, or not safetensors.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {', '.join(others)} is not read, because unpickling runs code: convert it" if others else ""
        raise IaptError(f"{folder}: {WEIGHTS_FILE} is missing; weights are read from safetensors only{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise IaptError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated: copy or train it again"
        ) from error


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check our ``adapter_config.json``.

    Raises:
        IaptError: it is missing, no JSON, stock PEFT's, of an unknown method, a newer schema, or has unknown or bad
            fields.
    """
    path, fields = folder / CONFIG_FILE, read_fields(folder)
    if _is_stock_peft(fields):
        raise IaptError(
            f"{path} was written by stock PEFT and does not say which sizes its backbone has; load it together with "
            "its backbone, as the build command does with --model"
        )
    if (version := fields.get("schema_version")) != SCHEMA_VERSION:
        raise IaptError(
            f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}; upgrade iapt-export"
        )
    name = fields.get("peft_type")
    if name not in METHOD_CONFIGS:
        raise IaptError(f"{path}: peft_type {name!r} is not a known method; known: {', '.join(METHOD_CONFIGS)}")
    own = {item.name for item in dataclasses.fields(AdapterConfig)}
    missing = [f"field {key} is missing" for key in REQUIRED if key not in fields]
    if name in PEFT_TYPES and not isinstance(fields.get(METHOD_FIELD), dict):
        missing.append(f"field {METHOD_FIELD}, an object with the method's settings, is missing")
    raise_problems(f"{path}", missing)
    if name in PEFT_TYPES:
        method = fields[METHOD_FIELD]
        fields = {key: value for key, value in fields.items() if key in own}  # the rest is for stock PEFT
    else:
        names = {item.name for item in dataclasses.fields(METHOD_CONFIGS[name])}
        method = {key: fields.pop(key) for key in sorted(names & set(fields))}
    fields["labels"] = tuple(fields.get("labels", ()))
    if isinstance(linears := fields.get("linears"), dict):
        fields["linears"] = {key: tuple(pair) if isinstance(pair, list) else pair for key, pair in linears.items()}
    fields["method"] = config_from_dict(METHOD_CONFIGS[name], method, str(path))
    return config_from_dict(AdapterConfig, fields, str(path))


def read_fields(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as it is.

    Raises:
        IaptError: it is missing or no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise IaptError(f"{folder}: {CONFIG_FILE} is missing; expected an adapter directory written by a trainer")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IaptError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise IaptError(f"{path} holds a {type(fields).__name__}; expected a JSON object")
    return fields


def check_adapter_fits(adapter: AdapterConfig, backbone: Backbone, source: str) -> None:
    """Refuse an adapter that was trained for another backbone.

    Args:
        adapter: the adapter's configuration.
        backbone: the backbone that it is to run on.
        source: the adapter's path, for the error text.

    Raises:
        IaptError: width, depth or fingerprint differ.
    """
    config = backbone.model.config
    problems = [
        f"{name} is {mine} in the adapter and {theirs} in the backbone"
        for name, mine, theirs in (
            ("hidden size", adapter.hidden_size, config.hidden_size),
            ("number of layers", adapter.num_layers, config.num_hidden_layers),
            ("fingerprint", adapter.backbone_fingerprint, backbone.fingerprint),
        )
        if mine != theirs
    ]
    if problems:
        raise IaptError(
            f"the adapter {source} was trained for {adapter.base_model_name_or_path}, not for "
            f"{backbone.name_or_path}: {'; '.join(problems)}. Give its own backbone with --model"
        )


def _is_stock_peft(fields: dict[str, Any]) -> bool:
    """Whether PEFT wrote this: it has no schema version, and not the name of a method that only we have."""
    own = set(METHOD_CONFIGS) - set(PEFT_TYPES)
    return "schema_version" not in fields and "peft_type" in fields and fields["peft_type"] not in own


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_count(size, least=1) for size in value)


def tensor_problems(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> list[str]:
    """One line for each tensor that is missing, strange, of another shape or type, or not finite."""
    problems = [f"tensor {name} is missing" for name in expected if name not in tensors]
    problems += [f"tensor {name} is not part of the method" for name in tensors if name not in expected]
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            problems.append(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            problems.append(f"tensor {name} has type {tensor.dtype}, expected a floating type")
        elif not torch.isfinite(tensor).all():
            problems.append(f"tensor {name} holds NaN or infinity; train the adapter again with a lower learning rate")
    return problems
