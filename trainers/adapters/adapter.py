"""An adapter in memory: its configuration, its tensors, and how both are read from the files of PEFT's convention.

Light to import, so that a machine without torch reads an adapter's configuration.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from iapt_export.contract.errors import IaptError
from iapt_export.contract.kinds import found_at
from iapt_export.contract.low_bits import rounding_problems
from iapt_export.contract.prompt_format import PromptFormat
from iapt_export.contract.schema import read_object
from iapt_export.contract.settings import choice_problems, config_from_dict, raise_problems, type_problems
from iapt_export.contract.sizes import MOST, MOST_LAYERS
from trainers.decoder.backbone_sizes import Sizes
from trainers.methods.configs import METHOD_CONFIGS, method_name

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.decoder.method import Method

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EXAMPLES_FILE = "examples.jsonl"
"""Optional: a ``prompt`` on each line, inputs that the adapter was made for; validation uses them."""
SCHEMA_VERSION = 1
MOST_LINEARS = 200_000
"""Linear layers of a whole decoder, experts included; each may have a tensor that is looked for."""
METHOD_FIELD = "method_config"
"""Where the fields of a method stand that stock PEFT has too, apart from PEFT's own."""

PEFT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "LORA")
"""Our methods whose directories stock PEFT reads and writes, by its names."""
REQUIRED = ("base_model_name_or_path", "backbone_fingerprint", "hidden_size", "num_layers")
"""Fields without a default."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Sizes):
    """``adapter_config.json``: which method, for which backbone, fed how."""

    base_model_name_or_path: str
    """The backbone as the trainer was given it."""
    backbone_fingerprint: str
    """`trainers.decoder.backbone.config_fingerprint` of that backbone."""
    backbone_weights_sha256: str = ""
    """`trainers.decoder.stored.weights_sha256` of that backbone in fp32, before any rounding; empty where not known."""
    method: Any
    """The method's own fields: one of `trainers.methods.configs`."""
    revision: str | None = None
    """The backbone's hub commit, if known."""
    prompt_format: PromptFormat = "plain"
    """chat: the instruction is one user message in the tokenizer's chat template; plain: text as it is; newline: text
    and a line break."""
    system_prompt: str | None = None
    """What all training examples began with; empty for no system prompt, None where they differ or it is not known."""
    eos_token_id: int | None = None
    """What ended the answers in training; None where it is not known."""
    weights: Literal["fp32", "int8", "int4", "fp8", "nvfp4"] = "fp32"
    """What the backbone's weights were rounded to in training."""
    quantise: str = ""
    """What of that was not as the type has it, such as ``block=64``; in the file only where there is something."""
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
        problems = choice_problems(self) + type_problems(type(self), vars(self))
        if self.peft_type != name:
            problems.append(f"peft_type={self.peft_type!r} is not the name of the method given, {name}")
        problems += rounding_problems(self.quantise, self.weights)
        limits = {"hidden_size": (1, MOST), "num_layers": (1, MOST_LAYERS)}
        limits |= dict.fromkeys(("num_kv_heads", "head_dim", "value_dim", "vocab_size"), (0, MOST))
        for name, (least, most) in limits.items():
            if not _is_count(getattr(self, name), least, most):
                problems.append(f"{name}={getattr(self, name)!r} is not an integer from {least} to {most}")
        if not isinstance(self.linears, dict) or not all(map(_is_pair, self.linears.values())):
            problems.append(f"linears={self.linears!r} does not give each name its inputs and outputs, two integers")
        elif not problems and len(self.linears) * self.num_layers > MOST_LINEARS:
            problems.append(f"{len(self.linears)} linears in {self.num_layers} layers are more than {MOST_LINEARS}")
        raise_problems("adapter configuration", problems)

    @property
    def sizes(self) -> Sizes:
        """The backbone's sizes alone."""
        return Sizes(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Sizes)})


def is_in_peft(form: str, value_dim: int) -> bool:
    """Whether PEFT has a method for a backbone; its prefixes have keys and values of one width, see `Sizes`."""
    return form in PEFT_TYPES and not (form == "PREFIX_TUNING" and value_dim)


def doubt_of_weights(adapter: str, config: AdapterConfig, ours: str, sha256: str = "") -> str:
    """What should be known of an adapter that was trained on other weights of the same architecture; mostly nothing.

    It is no refusal: weights that were rounded, merged or cast since answer nearly as those before.

    Args:
        adapter: what to call it.
        config: its configuration, which fits the backbone's sizes and settings.
        ours: the backbone that is given.
        sha256: of its weights, as ``backbone_weights_sha256`` has it. Where one of them is not known, names are
            compared, of which the same weights have many.
    """
    theirs, known = config.base_model_name_or_path, config.backbone_weights_sha256
    if known and sha256:
        if known == sha256:
            return ""
        return (
            f"{adapter} was trained on other weights than those of {ours}, with the same sizes and settings; its "
            f"answers may be wrong: train it on these, or give the {theirs} that it was trained on"
        )
    if Path(theirs).name.lower() == Path(ours).name.lower():
        return ""
    return (
        f"{adapter} was trained for {theirs}, and {ours} is given: their sizes agree, and that is all that can be "
        "checked; if these are other weights, its answers are wrong"
    )


def backbone_problems(adapter: AdapterConfig, theirs: tuple[int, int, str], where: str) -> list[str]:
    """What tells a backbone from the one that an adapter was trained for, a line each.

    Args:
        adapter: the adapter's configuration.
        theirs: the backbone's hidden size, number of layers and fingerprint.
        where: who says so, for the text.
    """
    mine = {
        "hidden size": adapter.hidden_size,
        "number of layers": adapter.num_layers,
        "fingerprint": adapter.backbone_fingerprint,
    }
    return [
        f"{name} is {own} in the adapter and {other} in the {where}"
        for (name, own), other in zip(mine.items(), theirs, strict=True)
        if own != other
    ]


@dataclass
class Adapter:
    """A method's trained tensors with the configuration that gives them meaning."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    """Name to fp32 tensor, as the method's `trainers.decoder.method.Method.shapes` lists them."""
    path: Path | None = None
    """Where it was read from."""
    from_peft: bool = False
    """Whether stock PEFT wrote it."""
    peft_task: int | None = None
    """Which task of its multitask prompt."""

    def module(self) -> Method:
        """The method with these weights, in evaluation mode."""
        from trainers.methods.forms import new_method

        module = new_method(self.config.method, self.config.sizes)
        module.load_state_dict(self.tensors)
        return module.eval()


def read_fields(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as it is.

    Raises:
        IaptError: it is missing, also where the folder only holds folders of adapters, or it is no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        # PEFT's save_pretrained writes an adapter that is not called "default" into a folder of its name
        if inner := sorted(item.parent for item in folder.glob(f"*/{CONFIG_FILE}")):
            flags = ", ".join(f"--adapter {item.name}={item}" for item in inner)
            raise IaptError(f"{folder} is no adapter but holds {len(inner)} in folders of their own; give {flags}")
        raise IaptError(
            f"{folder}: {CONFIG_FILE} is missing; expected an adapter directory written by a trainer, "
            f"found {found_at(folder)}"
        )
    return read_object(path, "copy or train the adapter again")


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check our ``adapter_config.json``.

    Raises:
        IaptError: it is missing, no JSON, stock PEFT's, of an unknown method, a newer schema, or has unknown or bad
            fields.
    """
    path, fields = folder / CONFIG_FILE, read_fields(folder)
    if is_stock_peft(fields):
        raise IaptError(
            f"{path} was written by stock PEFT and does not say which sizes its backbone has; load it together with "
            "its backbone, as the build command does with --model"
        )
    if (version := fields.get("schema_version")) != SCHEMA_VERSION:
        raise IaptError(
            f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}; upgrade iapt-export"
        )
    name = fields.get("peft_type")
    if not isinstance(name, str) or name not in METHOD_CONFIGS:
        raise IaptError(f"{path}: peft_type {name!r} is not a known method; known: {', '.join(METHOD_CONFIGS)}")
    known = {item.name for item in dataclasses.fields(AdapterConfig)}
    missing = [f"field {key} is missing" for key in REQUIRED if key not in fields]
    if name in PEFT_TYPES and not isinstance(fields.get(METHOD_FIELD), dict):
        missing.append(f"field {METHOD_FIELD}, an object with the method's settings, is missing")
    raise_problems(f"{path}", missing)
    if name in PEFT_TYPES:
        method = fields[METHOD_FIELD]
        fields = {key: value for key, value in fields.items() if key in known}  # the rest is for stock PEFT
    else:
        names = {item.name for item in dataclasses.fields(METHOD_CONFIGS[name])}
        method = {key: fields.pop(key) for key in sorted(names & set(fields))}
    if isinstance(linears := fields.get("linears"), dict):
        fields["linears"] = {key: tuple(pair) if isinstance(pair, list) else pair for key, pair in linears.items()}
    fields["method"] = config_from_dict(METHOD_CONFIGS[name], method, str(path))
    return config_from_dict(AdapterConfig, fields, str(path))


def is_stock_peft(fields: dict[str, Any]) -> bool:
    """Whether PEFT wrote this: it has no schema version, and not the name of a method that only we have."""
    only_ours = METHOD_CONFIGS.keys() - PEFT_TYPES
    return "schema_version" not in fields and "peft_type" in fields and fields["peft_type"] not in list(only_ours)


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
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise IaptError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated: copy or train it again"
        ) from error


def _is_count(value: Any, least: int, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


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
        elif not tensor.float().isfinite().all():  # 8 bits have no isfinite of their own
            problems.append(f"tensor {name} holds NaN or infinity; train the adapter again with a lower learning rate")
    return problems
