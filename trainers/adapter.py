"""The adapter directory, PEFT's convention: ``adapter_config.json`` and ``adapter_model.safetensors``.

``peft_type`` is ``IAPT``, which stock PEFT does not know: the layout is shared, the loader is not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers.config import IAPTConfig, choice_problems, config_from_dict, raise_problems
from trainers.errors import IaptError
from trainers.iapt import IAPTGenerator, parameter_shapes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EXAMPLES_FILE = "examples.jsonl"
"""Optional: a ``prompt`` on each line, inputs that the adapter was made for; validation uses them."""
SCHEMA_VERSION = 1
METHODS = {"IAPT": IAPTConfig}
"""``peft_type`` to the method's configuration."""


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
    method: IAPTConfig
    """The method's own fields."""
    revision: str | None = None
    """The backbone's hub commit, if known."""
    prompt_format: Literal["chat", "plain"] = "plain"
    """chat: the instruction is one user message in the tokenizer's chat template; plain: text as it is."""
    labels: tuple[str, ...] = ()
    """The answers of a classification task; empty for free generation."""
    peft_type: str = "IAPT"
    """The method's name in PEFT's convention."""
    task_type: str = "CAUSAL_LM"
    """PEFT's name of the task."""
    schema_version: int = SCHEMA_VERSION
    """Version of this file's layout."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        if self.prompt_format not in ("chat", "plain"):
            problems.append(f"prompt_format={self.prompt_format!r} is not one of chat, plain")
        for name in ("hidden_size", "num_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                problems.append(f"{name}={value!r} is not a positive integer")
        raise_problems("adapter configuration", problems)


@dataclass
class Adapter:
    """A method's trained tensors with the configuration that gives them meaning."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    """Name to fp32 tensor, as `trainers.iapt.parameter_shapes` lists them."""
    path: Path | None = None
    """Where it was read from."""

    def generator(self) -> IAPTGenerator:
        """The module with these weights, in evaluation mode."""
        module = IAPTGenerator(self.config.method, self.config.hidden_size, self.config.num_layers)
        module.load_state_dict(self.tensors)
        return module.eval()


def save_adapter(folder: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter directory; each file appears whole or not at all.

    Args:
        folder: made if missing.
        config: written as ``adapter_config.json``.
        tensors: the trained tensors, stored as fp32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / (WEIGHTS_FILE + ".tmp")
    save_file({name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}, weights)
    os.replace(weights, folder / WEIGHTS_FILE)
    fields = dataclasses.asdict(config)
    fields.update(fields.pop("method"))
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    temporary = folder / (CONFIG_FILE + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def load_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter directory.

    Raises:
        IaptError: a file is missing, truncated, not safetensors, of an unknown method or schema, has
            tensors of other names, shapes or types than its configuration says, or holds NaN or infinity.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {', '.join(others)} is not read, because unpickling runs code: convert it" if others else ""
        raise IaptError(f"{folder}: {WEIGHTS_FILE} is missing; weights are read from safetensors only{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise IaptError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated: copy or train it again"
        ) from error
    raise_problems(f"{path}", _tensor_problems(config, tensors))
    return Adapter(config, {name: tensor.float() for name, tensor in tensors.items()}, folder)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        IaptError: it is missing, no JSON, of an unknown method, a newer schema, or has unknown or bad fields.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise IaptError(f"{folder}: {CONFIG_FILE} is missing; expected an adapter directory written by a trainer")
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IaptError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise IaptError(f"{path} holds a {type(fields).__name__}; expected a JSON object")
    if (version := fields.get("schema_version")) != SCHEMA_VERSION:
        raise IaptError(
            f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}; upgrade iapt-export"
        )
    method = fields.get("peft_type")
    if method not in METHODS:
        raise IaptError(f"{path}: peft_type {method!r} is not a known method; known: {', '.join(METHODS)}")
    names = {field.name for field in dataclasses.fields(METHODS[method])}
    method_fields = {name: fields.pop(name) for name in sorted(names & set(fields))}
    missing = [
        field.name
        for field in dataclasses.fields(AdapterConfig)
        if field.default is dataclasses.MISSING and field.name not in fields and field.name != "method"
    ]
    raise_problems(f"{path}", [f"field {name} is missing" for name in missing])
    fields["labels"] = tuple(fields.get("labels", ()))
    fields["method"] = config_from_dict(METHODS[method], method_fields, str(path))
    return config_from_dict(AdapterConfig, fields, str(path))


def check_adapter_fits(adapter: AdapterConfig, backbone: Any, source: str) -> None:
    """Refuse an adapter that was trained for another backbone.

    Args:
        adapter: the adapter's configuration.
        backbone: a `trainers.backbone.Backbone`.
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


def _tensor_problems(config: AdapterConfig, tensors: dict[str, Tensor]) -> list[str]:
    expected = parameter_shapes(config.method, config.hidden_size, config.num_layers)
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
