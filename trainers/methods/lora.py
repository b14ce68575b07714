"""LoRA (arXiv 2106.09685): a low-rank change of chosen linear layers, at every token.

    y = x W^T + s (x A^T) B^T        A [R, M], B [N, R], s = alpha / R (alpha / sqrt(R) with rslora)

DoRA (arXiv 2402.09353, equation 5) gives each row of W + s B A a learned length m, so that with f = m / |W + s B A|

    y = b + f (x W^T + s (x A^T) B^T) = z + (f - 1) (z - b) + s (x A^T) (f B)^T        z = x W^T + b

f is known once W is. So a DoRA tenant is a LoRA tenant with f B for B, a gain f - 1 and a shift (1 - f) b, which are
zero for other tenants of a stack. It is read from PEFT and not trained here.

Initial values and layout are PEFT's: A as ``nn.Linear``, B zero, so that training starts at the plain backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from iapt_export.contract.errors import IaptError
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import decoder_layers, linear_layers
from trainers.decoder.method import Method, Weights
from trainers.methods.configs import LoRAConfig

GAINS = ("gain", "shift")
"""DoRA's own tensors of a linear layer."""


class LoRA(Method):
    """Two tensors per changed linear, stacked over the layers: ``self_attn__q_proj__A [L, R, M]``, ``..__B [L, N, R]``.

    Two underscores stand for the dots that parameter names may not have. DoRA has two more, ``..__gain [L, N]`` and
    ``..__shift [L, N]``.

    Raises:
        IaptError: when made, if a target module does not exist in the backbone.
    """

    config: LoRAConfig
    learning_rate = 5e-4
    in_decode = True
    is_mergeable = True

    @staticmethod
    def shapes(config: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`.

        Raises:
            IaptError: a target module does not exist.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name in targets(config.target_modules, sizes):
            inputs, outputs = sizes.linears[name]
            shapes[tensor_name(name, "A")] = (sizes.num_layers, config.rank, inputs)
            shapes[tensor_name(name, "B")] = (sizes.num_layers, outputs, config.rank)
            if config.dora:
                shapes |= {tensor_name(name, own): (sizes.num_layers, outputs) for own in GAINS}
        return shapes

    @staticmethod
    def why_untrained(config: Any) -> str:
        """See `trainers.decoder.method.Method.why_untrained`."""
        return "DoRA is not trained here; train it with PEFT, whose adapters build takes" if config.dora else ""

    def reset_parameters(self) -> None:
        """Draw A as PEFT does, from a uniform distribution of bound 1 / sqrt(M); B is zero."""
        for name in self.linear_names:
            for layer in self.get_parameter(tensor_name(name, "A")).data:
                nn.init.kaiming_uniform_(layer, a=math.sqrt(5))
            nn.init.zeros_(self.get_parameter(tensor_name(name, "B")))

    def project(self, weights: Weights, layer: int, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The linear layer's outputs, changed by the low-rank product, and in DoRA by gain and shift."""
        down = weights[tensor_name(name, "A")][:, layer].transpose(1, 2)  # [1 or B, M, R]
        up = weights[tensor_name(name, "B")][:, layer].transpose(1, 2)  # [1 or B, R, N]
        change = (inputs @ down) @ up * self.config.scaling
        if self.config.dora:
            gain, shift = (weights[tensor_name(name, own)][:, layer, None] for own in GAINS)  # [1 or B, 1, N]
            change = change + outputs * gain + shift
        return outputs + change

    @property
    def linear_names(self) -> tuple[str, ...]:
        """See `trainers.decoder.method.Method.linear_names`."""
        return targets(self.config.target_modules, self.sizes)

    @classmethod
    def stack_config(cls, configs: list[LoRAConfig], sizes: Sizes, rank: int | None = None) -> LoRAConfig | None:
        """See `trainers.decoder.method.Method.stack_config`: the highest rank, and every linear that anyone changes."""
        highest = max(config.rank for config in configs)
        if rank is not None and rank < highest:
            raise IaptError(f"a LoRA adapter has rank {highest}, more than --max-lora-rank {rank}; raise that")
        changed = [frozenset(targets(config.target_modules, sizes)) for config in configs]
        own = {(each.rank, each.scaling, each.dora, names) for each, names in zip(configs, changed, strict=True)}
        if len(own) == 1 and rank in (None, highest):
            return None
        names = frozenset.union(*changed)
        chosen = tuple(name for name in sizes.linears if name in names)
        dora = any(config.dora for config in configs)
        return LoRAConfig(rank=rank or highest, alpha=rank or highest, target_modules=chosen, dora=dora)

    def in_stack(self, config: LoRAConfig, sizes: Sizes) -> Method:
        """See `trainers.decoder.method.Method.in_stack`: zeros where this one has nothing, the scale in B."""
        rank, stacked = self.config.rank, LoRA(config, sizes)
        if rank > config.rank or not set(self.linear_names) <= set(stacked.linear_names):
            return self
        if self.config.dora and not config.dora:
            return self
        with torch.no_grad():
            for name in stacked.linear_names:
                down, up = (stacked.get_parameter(tensor_name(name, side)).zero_() for side in "AB")
                for own in GAINS if self.config.dora and name in self.linear_names else ():
                    stacked.get_parameter(tensor_name(name, own)).copy_(self.get_parameter(tensor_name(name, own)))
                if name in self.linear_names:
                    down[:, :rank] = self.get_parameter(tensor_name(name, "A"))
                    factor = self.config.scaling / config.scaling
                    up[:, :, :rank] = self.get_parameter(tensor_name(name, "B")) * factor
        return stacked.eval()

    @contextmanager
    def merged(self, backbone: Any) -> Iterator[None]:
        """W + s B A, in DoRA (1 + gain) W + s B A, in place of W; made in fp32, rounded once to the backbone's type."""
        before: list[tuple[nn.Module, Tensor]] = []
        try:
            with torch.no_grad():
                for index, layer in enumerate(decoder_layers(backbone)):
                    linears = linear_layers(layer)
                    for name in self.linear_names:
                        before.append((linears[name], linears[name].weight.data))  # type: ignore[arg-type]
                        linears[name].weight.data = _merged_weight(self, index, name, linears[name])
            yield
        finally:
            for module, weight in before:
                module.weight.data = weight


def tensor_name(linear: str, side: str) -> str:
    """Our name of a stacked tensor; ``side`` is A, B or one of `GAINS`."""
    return f"{linear.replace('.', '__')}__{side}"


def targets(target_modules: tuple[str, ...], sizes: Sizes) -> tuple[str, ...]:
    """The linear layers whose name ends with one of ``target_modules``, PEFT's rule, in the backbone's order.

    Raises:
        IaptError: a target module does not exist.
    """
    unknown = [target for target in target_modules if not any(_matches(name, target) for name in sizes.linears)]
    if unknown:
        raise IaptError(
            f"LoRA's target_modules {', '.join(unknown)}: the backbone's layers have no linear of that name; "
            f"use some of {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in sizes.linears)) or 'none'}"
        )
    return tuple(name for name in sizes.linears if any(_matches(name, target) for target in target_modules))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _merged_weight(method: LoRA, index: int, name: str, linear: nn.Module) -> Tensor:
    weight: Tensor = linear.weight.data  # type: ignore[assignment]
    sides = (method.get_parameter(tensor_name(name, side))[index].float().to(weight.device) for side in "BA")
    up, down = sides
    change = method.config.scaling * (up @ down)  # [N, M]
    before = weight.float()
    if method.config.dora:
        gain = method.get_parameter(tensor_name(name, GAINS[0]))[index].float().to(weight.device)
        change += gain[:, None] * (before.T if isinstance(linear, Conv1D) else before)
    if isinstance(linear, Conv1D):  # stores its weight as [M, N]
        change = change.T
    return (before + change).to(weight.dtype)
