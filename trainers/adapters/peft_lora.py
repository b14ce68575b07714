"""How PEFT lays out LoRA and DoRA, and how their options tell which layers they change. Checked with 0.21.

LORA    base_model.model.<layers_path>.<layer>.<linear>.lora_{A,B}.weight: [R, M], [N, R]; DoRA has
<linear>.lora_magnitude_vector [N] as well
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from iapt_export.contract.errors import IaptError
from trainers.adapters.peft_forms import ANY_OPTIONS, PeftForm, check_tensors
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.decoder.stored import stored_weight
from trainers.methods.configs import DoRAConfig, LoRAConfig
from trainers.methods.lora import GAINS, DoRA, LoRA, targets, tensor_name

LORA_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""LoRA's initial weights that leave the backbone as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""
REMEDY = (
    "merge it into the backbone with PEFT's merge_and_unload(), save that model with its tokenizer, and build it with "
    "--model, without --adapter"
)
"""For what changes the backbone in a way that no stack of tenants holds."""


class _LoRA(PeftForm):
    """A low-rank change of linear layers. PEFT's may differ in rank and alpha from layer to layer, and leave some out.

    Such adapters get one stack of the highest rank, filled up with zeros, and the scale goes into B.
    """

    options = ANY_OPTIONS | {
        *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "fan_in_fan_out", "bias"),
        *("lora_dropout", "init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
        *("ensure_weight_tying", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
        *("rank_pattern", "alpha_pattern", "layers_to_transform", "use_dora"),
    }
    remedy = REMEDY

    def allowed(self, sizes: Sizes) -> dict[str, tuple[Any, ...]]:
        return super().allowed(sizes) | {"bias": (None, "none"), "init_lora_weights": HARMLESS_INITS}

    def read(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], model: Any, source: str, task: int | None
    ) -> tuple[Any, dict[str, Tensor]]:
        if any(".lora_embedding_" in name for name in tensors):
            raise IaptError(f"{source}: LoRA of the embeddings is not supported; {REMEDY}")
        sizes = sizes_of(model)
        try:
            configs = _configs(fields, tensors, sizes, source)
        except (TypeError, AttributeError, re.error) as error:
            raise IaptError(
                f"{source}: which layers it changes, or their ranks, cannot be read from its configuration ({error}); "
                "expected what PEFT writes"
            ) from error
        shapes: dict[str, tuple[int, ...]] = {}
        for module, config in configs.items():
            inputs, outputs = sizes.linears[_linear(module)]
            shapes[_peft_name(module, "A")] = (config.rank, inputs)
            shapes[_peft_name(module, "B")] = (outputs, config.rank)
            if fields.get("use_dora"):
                shapes[_peft_length(module)] = (outputs,)
        check_tensors(shapes, tensors, source)
        lengths = {module: tensors[_peft_length(module)].float() for module in configs if fields.get("use_dora")}
        method, weights = self._of_rank(configs, tensors, sizes)
        return (method, weights) if not lengths else _dora(method, weights, lengths, model, sizes)

    def _of_rank(
        self, configs: dict[str, LoRAConfig], tensors: dict[str, Tensor], sizes: Sizes
    ) -> tuple[LoRAConfig, dict[str, Tensor]]:
        """One configuration for all modules, and our tensors without DoRA's."""
        first = next(iter(configs.values()))
        names = _lora_names(first, sizes)
        if len(set(configs.values())) == 1 and names.keys() <= tensors.keys():
            return first, self.from_peft(first, tensors, sizes)
        rank = max(config.rank for config in configs.values())
        method = replace(first, rank=rank, alpha=rank, rslora=False)
        weights = {name: torch.zeros(shape) for name, shape in LoRA.shapes(method, sizes).items()}
        for module, config in configs.items():
            (down, layer), (up, _) = (names[_peft_name(module, side)] for side in "AB")
            weights[down][layer, : config.rank] = tensors[_peft_name(module, "A")].float()
            weights[up][layer, :, : config.rank] = tensors[_peft_name(module, "B")].float() * config.scaling
        return method, weights

    def fields(self, method: Any, sizes: Sizes) -> dict[str, Any]:
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "use_rslora": method.rslora,
            "target_modules": list(method.target_modules),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }

    def shapes(self, method: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        stack_shapes = LoRA.shapes(method, sizes)
        return {peft: stack_shapes[stack][1:] for peft, (stack, _layer) in _lora_names(method, sizes).items()}

    def to_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        return {peft: tensors[stack][layer].contiguous() for peft, (stack, layer) in _lora_names(method, sizes).items()}

    def from_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        stacks: dict[str, list[Tensor]] = {}
        for peft, (stack, _layer) in _lora_names(method, sizes).items():  # layers come in order
            stacks.setdefault(stack, []).append(tensors[peft].float())
        return {stack: torch.stack(layers) for stack, layers in stacks.items()}

    def linears(self, method: Any, sizes: Sizes) -> dict[str, tuple[int, int]]:
        return {name: sizes.linears[name] for name in targets(method.target_modules, sizes)}


LORA_FORM = _LoRA()


def _configs(fields: dict[str, Any], tensors: dict[str, Tensor], sizes: Sizes, source: str) -> dict[str, LoRAConfig]:
    """Each changed module's own rank and alpha, in the backbone's order.

    Raises:
        IaptError: there are no tensors, they stand outside the decoder layers' linears, or the fields leave them out.
    """
    there = {match["module"] for name in tensors if (match := LORA_TENSOR.fullmatch(name))}
    modules = [f"{sizes.layers_path}.{n}.{name}" for n in range(sizes.num_layers) for name in sizes.linears]
    if not there or not there <= set(modules):
        got = sorted({_linear(module) for module in there.difference(modules)}) or sorted(tensors)[:3] or ["none"]
        raise IaptError(
            f"{source}: expected LoRA tensors of linear layers in the decoder's {sizes.num_layers} layers, which are "
            f"{', '.join(sizes.linears)}; got {', '.join(got)}. Give the backbone that it was trained for"
        )
    asked = {module for module in modules if _is_target(fields, module)}
    if fields.get("target_modules") in (None, "all-linear"):  # PEFT's own choice, of which the tensors tell
        asked = {module for module in asked if _linear(module) in map(_linear, there)}
    if left_out := sorted(there - asked):
        raise IaptError(
            f"{source}: its configuration leaves out {left_out[0]}, of which it has tensors ({len(left_out)} modules "
            "so): PEFT would not use them; expected the configuration that was saved with them"
        )
    linears = {_linear(module) for module in asked}
    full = tuple(name for name in sizes.linears if name in linears)
    last = tuple(dict.fromkeys(name.rpartition(".")[2] for name in full))
    chosen = last if targets(last, sizes) == full else full
    return {
        module: LoRAConfig(
            rank=_by_pattern(fields, "rank_pattern", module, fields.get("r", 8)),
            alpha=_by_pattern(fields, "alpha_pattern", module, fields.get("lora_alpha", 8)),
            rslora=bool(fields.get("use_rslora")),
            target_modules=chosen,
        )
        for module in modules
        if module in asked
    }


def _linear(module: str) -> str:
    """A linear layer's name within its decoder layer."""
    return re.sub(r"^.+?\.\d+\.", "", module)


def _peft_name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _lora_names(method: LoRAConfig, sizes: Sizes) -> dict[str, tuple[str, int]]:
    """PEFT's name of each LoRA tensor, to our stacked one and the layer in it."""
    return {
        _peft_name(f"{sizes.layers_path}.{layer}.{name}", side): (tensor_name(name, side), layer)
        for name in targets(method.target_modules, sizes)
        for side in "AB"
        for layer in range(sizes.num_layers)
    }


def _peft_length(module: str) -> str:
    return f"base_model.model.{module}.lora_magnitude_vector"


def _dora(
    method: LoRAConfig, weights: dict[str, Tensor], lengths: dict[str, Tensor], model: Any, sizes: Sizes
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """LoRA's configuration and tensors with what DoRA makes of the backbone's weights, see `trainers.methods.lora`.

    Args:
        method: LoRA's.
        weights: LoRA's, changed in place.
        lengths: module to its magnitudes ``[N]``.
        model: the backbone's; on the meta device nothing can be computed, so gains are zero: for `inspect` alone.
        sizes: of the backbone.
    """
    dora = DoRAConfig(**asdict(method))
    found = {name: torch.zeros(shape) for name, shape in DoRA.shapes(dora, sizes).items()} | weights
    for module, length in lengths.items():
        weight = stored_weight(model, f"{module}.weight")
        if weight.is_meta:
            continue
        name, layer = _linear(module), int(module.removeprefix(f"{sizes.layers_path}.").partition(".")[0])
        down, up, gain, shift = (found[tensor_name(name, own)][layer] for own in ("A", "B", *GAINS))
        linear = model.get_submodule(module)
        before = (weight.T if isinstance(linear, Conv1D) else weight).float()
        factor = length / torch.linalg.vector_norm(before + method.scaling * (up @ down), dim=1)
        up *= factor[:, None]
        gain += factor - 1
        if linear.bias is not None:
            shift -= gain * stored_weight(model, f"{module}.bias").float()
    return dora, found


def _by_pattern(fields: dict[str, Any], name: str, module: str, default: Any) -> Any:
    """A module's own rank or alpha: the first pattern that ends its name, as PEFT looks it up."""
    patterns = fields.get(name) or {}
    found = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
    if len({patterns[pattern] for pattern in found}) > 1:
        logging.getLogger(__name__).warning(
            "%s: %r and %r of its %s fit, and the first one counts; PEFT saves them in alphabetical order, so it may "
            "have been trained with another one",
            module,
            *found[:2],
            name,
        )
    return patterns[found[0]] if found else default


def _is_target(fields: dict[str, Any], module: str) -> bool:
    """Whether PEFT changes this module, as far as its name and layer tell: then its tensors must be there."""
    if _matches(fields.get("exclude_modules"), module):
        return False
    wanted = fields.get("target_modules")
    if wanted and wanted != "all-linear" and not _matches(wanted, module):
        return False
    layers = fields.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = fields.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", module):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _matches(wanted: Any, module: str) -> bool:
    """A pattern must fit the whole name, an entry of a list its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted or ())
