"""Adapter directories of stock PEFT: prompt tuning, prefix tuning and LoRA, read and written in its own layout.

    PROMPT_TUNING    prompt_embeddings [P, D]
    PREFIX_TUNING    prompt_embeddings [P, 2 L H K]: keys, then values of layer 0, of layer 1, ...
    LORA             base_model.model.<layers_path>.<layer>.<linear>.lora_{A,B}.weight: [R, M], [N, R]

PEFT saves the table that a prefix's network makes, not the network. For a prefix with projection we write that table
and beside it our own tensors, which PEFT ignores and from which training resumes.

PEFT records neither a fingerprint of the backbone nor a chat template: shapes are checked against the backbone that
is given, and the prompt format is "plain". In a padded batch PEFT's forward counts padding as positions and ours does
not, so the two agree where padding stands on the right or not at all. Checked against peft 0.21.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iapt_export.contract.errors import IaptError
from iapt_export.contract.settings import raise_problems
from trainers.adapters.adapter import Adapter, AdapterConfig, read_fields, read_tensors, tensor_problems
from trainers.decoder.backbone import Backbone
from trainers.decoder.insertion import sizes_of
from trainers.decoder.instruction import resolve_prompt_format
from trainers.decoder.method import Sizes
from trainers.methods.configs import METHOD_CONFIGS, LoRAConfig, PrefixTuningConfig, PromptTuningConfig
from trainers.methods.lora import targets, tensor_name
from trainers.methods.prefix_tuning import PrefixTuning, from_table, to_table

PEFT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "LORA")
"""Methods whose directories stock PEFT reads and writes."""
TABLE = "prompt_embeddings"
LORA_TENSOR = re.compile(r"base_model\.model\.(.+?)\.(\d+)\.(?P<linear>.+)\.lora_[AB]\.weight")
_ANY = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"}
_ANY |= {"auto_mapping", "peft_version"}
_PROMPT = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
_INIT = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
_LORA = {"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "lora_dropout"}
_LORA |= {"init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying"}
_LORA |= {"layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"}
KNOWN_OPTIONS: dict[str, set[str]] = {
    "PROMPT_TUNING": _ANY | _PROMPT | _INIT,
    "PREFIX_TUNING": _ANY | _PROMPT | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "LORA": _ANY | _LORA,
}
"""Options that are read, or that matter in training alone; any other must be off."""
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""LoRA's initial weights that leave the backbone as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""
MAX_PROBLEMS = 8
"""Tensors named in one error text; a wrong backbone makes all of them wrong."""


def adapter_from_peft(folder: str | Path, backbone: Backbone, prompt_format: Any = "plain") -> Adapter:
    """Read an adapter directory that stock PEFT wrote.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        backbone: what it was trained for; PEFT keeps no fingerprint, so only shapes can be checked.
        prompt_format: ``plain`` or ``chat``, how it was fed; PEFT does not say.

    Returns:
        The adapter with fp32 tensors.

    Raises:
        IaptError: a file is missing or broken, the method or one of its options is not supported, or the tensors
            do not fit the backbone, or ``chat`` where the tokenizer has no chat template.
    """
    folder = Path(folder)
    fields, peft_tensors, sizes = read_fields(folder), read_tensors(folder), sizes_of(backbone.model)
    method = _method_config(fields, peft_tensors, sizes, str(folder))
    config = AdapterConfig(
        base_model_name_or_path=fields.get("base_model_name_or_path") or backbone.name_or_path,
        backbone_fingerprint=backbone.fingerprint,
        **asdict(replace(sizes, linears=_changed_linears(method, sizes))),
        revision=fields.get("revision"),
        prompt_format=resolve_prompt_format(backbone.tokenizer, prompt_format),
        method=method,
    )
    return Adapter(config, from_peft_tensors(method, peft_tensors, sizes, str(folder)), folder)


def peft_fields(method: Any, sizes: Sizes) -> dict[str, Any]:
    """What stock PEFT needs in ``adapter_config.json`` beside its type, task and backbone.

    Args:
        method: configuration of prompt tuning, prefix tuning or LoRA.
        sizes: of the backbone.
    """
    if isinstance(method, LoRAConfig):
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "use_rslora": method.rslora,
            "target_modules": list(method.target_modules),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
    fields = {
        "num_virtual_tokens": method.prompt_length,
        "num_transformer_submodules": 1,
        "num_layers": sizes.num_layers,
        "inference_mode": True,
    }
    if isinstance(method, PrefixTuningConfig):
        width = sizes.num_kv_heads * sizes.head_dim
        # The table is written, which is all that PEFT reads: to PEFT there is no projection any more.
        return fields | {"token_dim": width, "num_attention_heads": sizes.num_kv_heads, "prefix_projection": False}
    return fields | {"token_dim": sizes.hidden_size, "prompt_tuning_init": "RANDOM"}


def to_peft_tensors(method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Our trained tensors under PEFT's names.

    Args:
        method: configuration of prompt tuning, prefix tuning or LoRA.
        tensors: as `trainers.decoder.method.Method.shapes` lists them.
        sizes: of the backbone.
    """
    if isinstance(method, LoRAConfig):
        return {peft: tensors[own][layer].contiguous() for peft, (own, layer) in _lora_names(method, sizes).items()}
    if isinstance(method, PromptTuningConfig):
        return {TABLE: tensors["prompt"]}
    if not method.projection:
        return {TABLE: to_table(tensors["prefix"]).contiguous()}
    module = PrefixTuning(method, sizes)
    module.load_state_dict(tensors)
    return {**tensors, TABLE: to_table(module.deployed().get_parameter("prefix").detach()).contiguous()}


def from_peft_tensors(
    method: Any, peft_tensors: dict[str, Tensor], sizes: Sizes, source: str = "adapter"
) -> dict[str, Tensor]:
    """PEFT's tensors under our names, in fp32.

    Args:
        method: configuration of prompt tuning, prefix tuning or LoRA.
        peft_tensors: as PEFT or `to_peft_tensors` names them.
        sizes: of the backbone.
        source: where they come from, for error texts.

    Raises:
        IaptError: tensors are missing, unknown, of another shape than the backbone asks for, or not finite.
    """
    _check_tensors(method, peft_tensors, sizes, source)
    floats = {name: tensor.float() for name, tensor in peft_tensors.items()}
    if isinstance(method, PromptTuningConfig):
        return {"prompt": floats[TABLE]}
    if isinstance(method, PrefixTuningConfig):
        table = floats.pop(TABLE)
        return floats if method.projection else {"prefix": from_table(table, sizes).contiguous()}
    stacks: dict[str, list[Tensor]] = {}
    for peft, (own, _layer) in _lora_names(method, sizes).items():  # layers come in order
        stacks.setdefault(own, []).append(floats[peft])
    return {own: torch.stack(layers) for own, layers in stacks.items()}


def _lora_names(method: LoRAConfig, sizes: Sizes) -> dict[str, tuple[str, int]]:
    """PEFT's name of each LoRA tensor, to our stacked one and the layer in it."""
    return {
        f"base_model.model.{sizes.layers_path}.{layer}.{name}.lora_{side}.weight": (tensor_name(name, side), layer)
        for name in targets(method.target_modules, sizes)
        for side in "AB"
        for layer in range(sizes.num_layers)
    }


def _peft_shapes(method: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """PEFT's name of each tensor to its shape."""
    if isinstance(method, PromptTuningConfig):
        return {TABLE: (method.prompt_length, sizes.hidden_size)}
    if isinstance(method, PrefixTuningConfig):
        own = PrefixTuning.shapes(method, sizes) if method.projection else {}
        return {TABLE: (method.prompt_length, 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim), **own}
    shapes = {}
    for name in targets(method.target_modules, sizes):
        inputs, outputs = sizes.linears[name]
        shapes[tensor_name(name, "A")], shapes[tensor_name(name, "B")] = (method.rank, inputs), (outputs, method.rank)
    return {peft: shapes[own] for peft, (own, _layer) in _lora_names(method, sizes).items()}


def _check_tensors(method: Any, peft_tensors: dict[str, Tensor], sizes: Sizes, source: str) -> None:
    problems = tensor_problems(_peft_shapes(method, sizes), peft_tensors)
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[: MAX_PROBLEMS - 1], f"and {len(problems) - MAX_PROBLEMS + 1} tensors more"]
    raise_problems(f"{source}: the tensors do not fit the configuration and the backbone", problems)


def _method_config(fields: dict[str, Any], peft_tensors: dict[str, Tensor], sizes: Sizes, source: str) -> Any:
    """Our configuration of the method that PEFT's ``adapter_config.json`` describes.

    Raises:
        IaptError: another method, an option that is not supported, or sizes that are not the backbone's.
    """
    kind = fields.get("peft_type")
    if kind not in PEFT_TYPES:
        raise IaptError(
            f"{source}: PEFT's method {kind!r} is not supported; use one of {', '.join(PEFT_TYPES)}, or a method "
            "of this project's own trainer"
        )
    raise_problems(f"{source}: PEFT's {kind} is supported in its plain form only", _option_problems(fields, sizes))
    if kind == "LORA":
        return LoRAConfig(
            rank=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            rslora=bool(fields.get("use_rslora")),
            target_modules=_target_modules(peft_tensors, sizes, source),
        )
    # PEFT has computed a projection's table before it wrote it.
    return METHOD_CONFIGS[kind](prompt_length=fields.get("num_virtual_tokens"))


def _option_problems(fields: dict[str, Any], sizes: Sizes) -> list[str]:
    """One line for each option that this project does not carry out, or that contradicts the backbone."""
    kind = fields["peft_type"]
    known = KNOWN_OPTIONS[kind]
    problems = [
        f"{name}={value!r} is not supported" for name, value in sorted(fields.items()) if value and name not in known
    ]
    expected: dict[str, tuple[Any, ...]] = {"task_type": (None, "CAUSAL_LM")}
    if kind == "LORA":
        expected |= {"bias": (None, "none"), "init_lora_weights": HARMLESS_INITS}
    else:
        expected |= {"num_transformer_submodules": (None, 1), "num_layers": (None, sizes.num_layers)}
    if kind == "PROMPT_TUNING":
        expected |= {"token_dim": (None, sizes.hidden_size)}
    if kind == "PREFIX_TUNING":
        expected |= {
            "token_dim": (None, sizes.num_kv_heads * sizes.head_dim),
            "num_attention_heads": (None, sizes.num_kv_heads),
        }
    for name, values in expected.items():
        if fields.get(name) not in values:
            allowed = " or ".join(repr(value) for value in values if value is not None)
            problems.append(f"{name} is {fields[name]!r}, expected {allowed}")
    return problems


def _target_modules(peft_tensors: dict[str, Tensor], sizes: Sizes, source: str) -> tuple[str, ...]:
    """Which linears the file changes, by their last names where those say it, else by their names within a layer.

    The tensors tell: ``target_modules`` may be a list of last or full names, a pattern, or "all-linear".

    Raises:
        IaptError: there are none, or they stand outside the decoder layers' linears.
    """
    matches = [LORA_TENSOR.fullmatch(name) for name in peft_tensors]
    found = {match["linear"] for match in matches if match}
    unknown = sorted(found - sizes.linears.keys())
    if unknown or not found:
        raise IaptError(
            f"{source}: expected LoRA tensors of linear layers in the decoder, which are {', '.join(sizes.linears)}; "
            f"got {', '.join(unknown or sorted(peft_tensors)[:3]) or 'none'}. Give the backbone that it was trained for"
        )
    full = tuple(name for name in sizes.linears if name in found)
    last = tuple(dict.fromkeys(name.rpartition(".")[2] for name in full))
    return last if targets(last, sizes) == full else full


def _changed_linears(method: Any, sizes: Sizes) -> dict[str, tuple[int, int]]:
    if not isinstance(method, LoRAConfig):
        return {}
    return {name: sizes.linears[name] for name in targets(method.target_modules, sizes)}
