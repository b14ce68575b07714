"""What a build will make: targets with dtype and opset, ranges, tenants; decided and checked before long work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from iapt_export.building.adapter_argument import parse_adapters
from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import DEQUANTISED, QUANTISED, Rounding, rounding_of
from iapt_export.contract.manifest import Range, Ranges, served_name
from iapt_export.contract.types import FLOATS, OPSETS
from iapt_export.graphs.installed import Installed, deploy, install
from trainers.adapters.adapter import Adapter
from trainers.adapters.directory import check_adapter_fits, doubt_of_backbone, load_adapter
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import Method
from trainers.decoder.stored import weights_sha256
from trainers.methods.forms import FORMS

LOGGER = logging.getLogger("iapt_export")
DEFAULT_OPSET = 23
TENSORRT = ("tensorrt-rtx", "tensorrt")
TARGETS = ("onnxruntime", *TENSORRT)
DEFAULT_DTYPE = {"onnxruntime": "fp32", "tensorrt-rtx": "fp16", "tensorrt": "fp16"}


@dataclass(frozen=True)
class TargetPlan:
    """A target to build for."""

    name: str
    dtype: str
    """``fp32``, ``fp16``, ``bf16``; a coarser one, such as ``int8``, for weights in it, all else in `graph_dtype`."""
    opset: int
    quantise: str = ""
    """What of its rounding is not as its type has it, see `Rounding.quantise`."""

    @property
    def variant(self) -> str:
        """Targets with the same variant share ONNX graphs."""
        kind = "dequantised-" if self.rounding and self.rounding.is_scaled else ""
        return f"{kind}{self.dtype}-opset{self.opset}"

    @property
    def graph_dtype(self) -> str:
        """The type that the graphs compute in, and that their inputs and outputs have."""
        if self.rounding is None:
            return self.dtype
        return "fp16" if self.rounding.is_scaled else "fp32"

    @property
    def rounding(self) -> Rounding | None:
        """How the backbone's weights are stored where they are rounded."""
        return rounding_of(self.name, self.dtype, self.quantise)


def plan_targets(
    requested: Sequence[str], dtype: str | None, opset: int | None, quantise: str = ""
) -> list[TargetPlan]:
    """Turn ``NAME`` or ``NAME:DTYPE`` into targets.

    Args:
        requested: as on the command line; empty means ONNX Runtime.
        dtype: for the targets that name none; None takes each target's default.
        opset: for all targets; None takes 23.
        quantise: how those that round store the weights; see `rounding_problems`.

    Raises:
        IaptError: unknown or repeated target, unknown dtype or opset, or rounding that no target does.
    """
    if opset not in (None, *OPSETS):
        raise IaptError(f"opset {opset} is not supported; use one of {', '.join(map(str, OPSETS))}")
    plans: list[TargetPlan] = []
    for text in requested or ["onnxruntime"]:
        name, _, suffix = text.partition(":")
        if name not in TARGETS:
            raise IaptError(f"target {name!r} is not known; use one of {', '.join(TARGETS)}, as NAME or NAME:DTYPE")
        chosen = suffix or dtype or DEFAULT_DTYPE[name]
        _check_dtype(text, name, chosen)
        if any(plan.name == name for plan in plans):
            raise IaptError(f"target {name!r} is given twice; build a second bundle for another dtype")
        rounding = rounding_of(name, chosen, quantise)
        plans.append(TargetPlan(name, chosen, opset or DEFAULT_OPSET, rounding.quantise if rounding else ""))
    if quantise and not any(plan.rounding for plan in plans):
        built = ", ".join(f"{plan.name}:{plan.dtype}" for plan in plans)
        raise IaptError(
            f"--quantise says how int8, int4, fp8 and nvfp4 store the weights, and what is built is {built}; leave it "
            "out, or take --target onnxruntime:int4"
        )
    return plans


def check_auto(targets: list[TargetPlan], device: str) -> None:
    """Refuse a search for how weights are stored where it could not measure what will run.

    Raises:
        IaptError: no target stores weights in few bits, one does that a GPU runs, or the comparison is on a GPU.
    """
    built = ", ".join(f"{plan.name}:{plan.dtype}" for plan in targets)
    if not any(plan.rounding for plan in targets):
        raise IaptError(
            f"--quantise auto measures how int8 and int4 store the weights, and what is built is {built}; leave it "
            "out, or take --target onnxruntime:int4"
        )
    others = ", ".join(f"{plan.name}:{plan.dtype}" for plan in targets if plan.rounding and plan.rounding.is_scaled)
    if others or device != "cpu":
        of, remedy = (
            (others, "build --target onnxruntime:int4 alone") if others else (f"--device {device}", "leave it out")
        )
        raise IaptError(
            f"--quantise auto measures ONNX Runtime on this machine's CPU, which says nothing of {of}; give settings, "
            f"such as --quantise block=64, or {remedy}"
        )


def _check_dtype(text: str, name: str, dtype: str) -> None:
    """Refuse a type that is not known, or that a target does not have."""
    known = tuple(dict.fromkeys((*FLOATS, *QUANTISED, *DEQUANTISED)))
    if dtype not in known:
        raise IaptError(f"dtype {dtype!r} of target {text!r} is not known; use one of {', '.join(known)}")
    if dtype not in FLOATS and rounding_of(name, dtype) is None:
        able = [target for target in TARGETS if rounding_of(target, dtype)]
        raise IaptError(
            f"{dtype} weights are for {' and '.join(able)}; for {name} use one of "
            f"{', '.join(kind for kind in known if kind in FLOATS or rounding_of(name, kind))}"
        )


def check_device(targets: list[TargetPlan], device: str) -> None:
    """Refuse what ONNX Runtime cannot run on the device that the comparison will use.

    Raises:
        IaptError: bf16 on the CPU, where ONNX Runtime has no matrix product in it.
    """
    if device == "cpu" and any((target.name, target.dtype) == ("onnxruntime", "bf16") for target in targets):
        raise IaptError(
            "ONNX Runtime multiplies no bf16 matrices on the CPU, so onnxruntime:bf16 could not be compared; "
            "use fp32 or fp16, or --device cuda on a machine with an NVIDIA GPU"
        )


def onnx_variant(targets: list[TargetPlan]) -> str:
    """The variant whose ONNX graphs the bundle holds: ONNX Runtime's, which runs them, wherever it stands."""
    return next((target.variant for target in targets if target.name == "onnxruntime"), targets[0].variant)


def parse_range(text: str, name: str) -> Range:
    """Read ``MAX`` or ``MIN:OPT:MAX``.

    Raises:
        IaptError: not numbers, or not ordered.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise IaptError(f"--{name} {text!r} is not MAX or MIN:OPT:MAX in whole numbers, for example 8 or 1:4:8")
    values = [int(part) for part in parts]
    if len(values) == 1:
        values = [1, max(1, values[0] // 2), values[0]]
    low, opt, high = values
    if not 1 <= low <= opt <= high:
        raise IaptError(f"--{name} {text!r} is not ordered: expected 1 <= MIN <= OPT <= MAX")
    return Range(low, opt, high)


def plan_ranges(texts: dict[str, str]) -> Ranges:
    """Read the four ranges as on the command line; see `parse_range`."""
    return Ranges(**{name: parse_range(text, name) for name, text in texts.items()})


def check_ranges(
    ranges: Ranges, prompt_length: int, max_positions: int, num_tenants: int, fewest: int | None = 1
) -> None:
    """Refuse ranges that contradict each other, the backbone or the tenants.

    Raises:
        IaptError: with every problem listed.
    """
    problems = []
    if ranges.batch.min > 1:
        problems.append(f"--batch starts at {ranges.batch.min}, but a session also serves a single row; start at 1")
    if ranges.past.max < ranges.sequence.max + prompt_length:
        problems.append(
            f"--past {ranges.past.max} cannot hold {prompt_length} prompt rows and --sequence {ranges.sequence.max}"
        )
    if ranges.past.max + 1 > max_positions:
        problems.append(
            f"--past {ranges.past.max} is more than the backbone's {max_positions} positions less one; "
            f"give --past {max_positions - 1} or less"
        )
    if ranges.past.min > prompt_length + ranges.sequence.min:
        problems.append(
            f"--past from {ranges.past.min} leaves out an instruction of {ranges.sequence.min} tokens after "
            f"{prompt_length} prompt rows"
        )
    if fewest is not None and fewest < ranges.tenants.min:
        problems.append(f"a method has {fewest} tenants, --tenants starts at {ranges.tenants.min}")
    if num_tenants > ranges.tenants.max:
        problems.append(f"{num_tenants} adapters are more than --tenants {ranges.tenants.max}")
    if problems:
        raise IaptError("; ".join(problems))


def load_tenants(
    arguments: Sequence[str | Path], backbone: Any, peft_prompt_format: str | None = None
) -> dict[str, Adapter]:
    """Load ``DIR`` or ``NAME=DIR`` for each tenant and check that they fit the backbone; none for the backbone alone.

    Args:
        arguments: as on the command line; the folder's name is the tenant's unless one is given. Behind a folder of
            stock PEFT may stand what it does not say: ``DIR,format=chat``, ``DIR,task=0``.
        backbone: a `trainers.decoder.backbone.Backbone`.
        peft_prompt_format: how prompts are fed to adapters that stock PEFT wrote, ``plain``, ``newline`` or ``chat``;
            needed where the tokenizer has a chat template.

    Raises:
        IaptError: a bad adapter, one for another backbone, or a name that another one or the backbone has.
    """
    tenants: dict[str, Adapter] = {}
    for name, (path, options) in parse_adapters(arguments).items():
        if name == served_name(backbone.name_or_path):
            raise IaptError(f"the adapter {path} is called {name!r}, as the backbone is; give it a name: NAME={path}")
        prompt_format = options.get("format", peft_prompt_format)
        task = int(options["task"]) if "task" in options else None
        adapter = load_adapter(path, backbone, peft_prompt_format=prompt_format, peft_task=task)
        if options and not adapter.from_peft:
            said = "".join(f",{option}={value}" for option, value in options.items())
            raise IaptError(f"--adapter {path}{said}: {path} was not written by stock PEFT and says all of this itself")
        check_adapter_fits(adapter.config, backbone, str(path))
        sha256 = weights_sha256(backbone.model) if adapter.config.backbone_weights_sha256 else ""
        if doubt := doubt_of_backbone(adapter, backbone, sha256):
            LOGGER.warning("%s", doubt)
        tenants[name] = adapter
    return tenants


@dataclass(frozen=True)
class TenantPlan:
    """The tenants of a bundle, and what is shipped for each."""

    adapters: dict[str, Adapter]
    """As they were trained."""
    installed: list[Installed]
    """The bundle's methods."""
    owner: dict[str, str | None]
    """Tenant to the name of its method; None where it is merged into the backbone."""
    shipped: dict[str, dict[str, Tensor]]
    """Tenant to its tensors as the graphs take them."""
    merged: Method | None = None
    """What is merged into the backbone's weights."""

    @property
    def num_slots(self) -> int:
        """Prompt slots of the bundle's cache."""
        return max((item.method.num_slots for item in self.installed), default=0)

    @property
    def fewest(self) -> int | None:
        """Tenants of the method that has fewest; None where there is no tenant."""
        owners = list(self.owner.values())
        return min((owners.count(owner) for owner in owners), default=None)


def plan_tenants(
    adapters: dict[str, Adapter],
    model: Any,
    *,
    merge_lora: bool = False,
    fold_embeddings: bool = False,
    max_lora_rank: int | None = None,
) -> TenantPlan:
    """Decide what is shipped for each tenant.

    Args:
        adapters: name to adapter.
        model: the backbone's transformers model.
        merge_lora: add the one tenant's LoRA to the backbone's weights, so that it costs nothing.
        fold_embeddings: ship ADePT's offsets as one embedding table for each tenant.
        max_lora_rank: rank of LoRA's stack; None takes the tenants' highest.

    Raises:
        IaptError: methods that one bundle cannot serve together, or nothing to merge or to fold.
    """
    forms = {name: adapter.config.peft_type for name, adapter in adapters.items()}
    methods = {name: FORMS[form] for name, form in forms.items()}
    if max_lora_rank is not None and not any(method.is_mergeable for method in methods.values()):
        raise IaptError("--max-lora-rank is for LoRA, and no adapter is of that method; leave it out")
    if fold_embeddings and not any(method.folded_form for method in methods.values()):
        raise IaptError("--fold-embeddings is for ADePT's offsets, and no adapter is of that method; leave it out")
    if merge_lora:
        if [method.is_mergeable for method in methods.values()] != [True]:
            shown = ", ".join(f"{name} ({form})" for name, form in forms.items()) or "none"
            raise IaptError(
                f"--merge-lora changes the backbone for everyone, so it needs exactly one LoRA adapter; got {shown}. "
                "Without it each row chooses its own"
            )
        ((name, adapter),) = adapters.items()
        return TenantPlan(adapters, [], {name: None}, {}, adapter.module())
    deployed = {name: deploy(adapter, model, fold_embeddings=fold_embeddings) for name, adapter in adapters.items()}
    deployed |= _in_shared_stacks(deployed, model, max_lora_rank)
    installed, owner = install(adapters, deployed)
    shipped: dict[str, dict[str, Tensor]] = {
        name: adapters[name].tensors if methods[name].is_encoder else dict(method.state_dict())
        for name, method in deployed.items()
    }
    return TenantPlan(adapters, installed, dict(owner), shipped)


def _in_shared_stacks(deployed: dict[str, Method], model: Any, rank: int | None) -> dict[str, Method]:
    """Tenants whose methods take a stack of common settings, in its tensors."""
    sizes = sizes_of(model)
    shared: dict[str, Method] = {}
    for kind in {type(method).stack_kind() for method in deployed.values()}:
        own = {name: method for name, method in deployed.items() if type(method).stack_kind() is kind}
        config = kind.stack_config([method.config for method in own.values()], sizes, rank)
        if config is not None:
            shared |= {name: method.in_stack(config, sizes) for name, method in own.items()}
    return shared
