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
from iapt_export.contract.settings import computing_fields
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import decoder_layers, linear_layers
from trainers.decoder.method import Method, Weights
from trainers.methods.configs import DoRAConfig, LoRAConfig

GAINS = ("gain", "shift")
"""DoRA's own tensors of a linear layer."""


class LoRA(Method):
    """Two tensors per changed linear, stacked over the layers: ``self_attn__q_proj__A [L, R, M]``, ``..__B [L, N, R]``.

    Two underscores stand for the dots that parameter names may not have.

    Raises:
        IaptError: when made, if a target module does not exist in the backbone.
    """

    config: LoRAConfig
    learning_rate = 5e-4
    in_decode = True
    is_mergeable = True

    def __init__(self, config: Any, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.decayed = tuple(self.shapes(config, sizes))

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
        return shapes

    def reset_parameters(self) -> None:
        """Draw A as PEFT does, from a uniform distribution of bound 1 / sqrt(M); B is zero."""
        for name in self.linear_names:
            for layer in self.get_parameter(tensor_name(name, "A")).data:
                nn.init.kaiming_uniform_(layer, a=math.sqrt(5))
            nn.init.zeros_(self.get_parameter(tensor_name(name, "B")))

    def project(self, weights: Weights, layer: int, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The linear layer's outputs, changed by the low-rank product."""
        down = weights[tensor_name(name, "A")][:, layer].transpose(1, 2)  # [1 or B, M, R]
        up = weights[tensor_name(name, "B")][:, layer].transpose(1, 2)  # [1 or B, R, N]
        return outputs + (inputs @ down) @ up * self.config.scaling

    @property
    def linear_names(self) -> tuple[str, ...]:
        """See `trainers.decoder.method.Method.linear_names`."""
        return targets(self.config.target_modules, self.sizes)

    @classmethod
    def stack_kind(cls) -> type[Method]:
        """See `trainers.decoder.method.Method.stack_kind`."""
        return LoRA

    @classmethod
    def stack_config(cls, configs: list[LoRAConfig], sizes: Sizes, rank: int | None = None) -> LoRAConfig | None:
        """See `trainers.decoder.method.Method.stack_config`: the highest rank, and every linear that anyone changes; a
        DoRA's where one is.
        """
        highest = max(config.rank for config in configs)
        if rank is not None and rank < highest:
            raise IaptError(f"a LoRA adapter has rank {highest}, more than --max-lora-rank {rank}; raise that")
        if len({(type(each), computing_fields(each)) for each in configs}) == 1 and rank in (None, highest):
            return None
        names = frozenset.union(*(frozenset(targets(config.target_modules, sizes)) for config in configs))
        chosen = tuple(name for name in sizes.linears if name in names)
        kind = DoRAConfig if DoRAConfig in map(type, configs) else LoRAConfig
        return kind(rank=rank or highest, alpha=rank or highest, target_modules=chosen)

    def in_stack(self, config: LoRAConfig, sizes: Sizes) -> Method:
        """See `trainers.decoder.method.Method.in_stack`: zeros where this one has nothing, the scale in B."""
        rank, stacked = self.config.rank, (DoRA if type(config) is DoRAConfig else LoRA)(config, sizes)
        if rank > config.rank or not set(self.linear_names) <= set(stacked.linear_names):
            return self
        if isinstance(self, DoRA) and not isinstance(stacked, DoRA):
            return self
        with torch.no_grad():
            for name in stacked.linear_names:
                down, up = (stacked.get_parameter(tensor_name(name, side)).zero_() for side in "AB")
                for own in GAINS if isinstance(self, DoRA) and name in self.linear_names else ():
                    stacked.get_parameter(tensor_name(name, own)).copy_(self.get_parameter(tensor_name(name, own)))
                if name in self.linear_names:
                    down[:, :rank] = self.get_parameter(tensor_name(name, "A"))
                    factor = self.config.scaling / config.scaling
                    up[:, :, :rank] = self.get_parameter(tensor_name(name, "B")) * factor
        return stacked.eval()

    @contextmanager
    def merged(self, backbone: Any) -> Iterator[None]:
        """W + s B A in place of W; the sum is made in fp32 and rounded once to the backbone's type."""
        before: list[tuple[nn.Module, Tensor]] = []
        try:
            with torch.no_grad():
                for index, layer in enumerate(decoder_layers(backbone)):
                    linears = linear_layers(layer)
                    for name in self.linear_names:
                        before.append((linears[name], linears[name].weight.data))  # type: ignore[arg-type]
                        linears[name].weight.data = self.merged_weight(index, name, linears[name])
            yield
        finally:
            for module, weight in before:
                module.weight.data = weight

    def merged_weight(self, index: int, name: str, linear: nn.Module) -> Tensor:
        """What `merged` puts in place of a linear layer's weight, with its shape and type."""
        weight: Tensor = linear.weight.data  # type: ignore[assignment]
        rows = (weight.T if isinstance(linear, Conv1D) else weight).float()  # [N, M]; Conv1D stores [M, N]
        up, down = (self.get_parameter(tensor_name(name, side))[index].float().to(weight.device) for side in "BA")
        made = (self.scaled_rows(index, name, rows) + self.config.scaling * (up @ down)).to(weight.dtype)
        return made.T.contiguous() if isinstance(linear, Conv1D) else made

    def scaled_rows(self, index: int, name: str, rows: Tensor) -> Tensor:
        """The rows ``[N, M]`` of a layer's weight in fp32 as this method leaves them, before the product is added."""
        return rows


class DoRA(LoRA):
    """LoRA's tensors, B with the factor in it, and two more: ``self_attn__q_proj__gain [L, N]`` and ``..__shift``."""

    config: DoRAConfig

    @staticmethod
    def shapes(config: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`.

        Raises:
            IaptError: a target module does not exist.
        """
        shapes = LoRA.shapes(config, sizes)
        for name in targets(config.target_modules, sizes):
            shapes |= {tensor_name(name, own): (sizes.num_layers, sizes.linears[name][1]) for own in GAINS}
        return shapes

    def project(self, weights: Weights, layer: int, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The linear layer's outputs, changed by the low-rank product, by gain and by shift."""
        gain, shift = (weights[tensor_name(name, own)][:, layer, None] for own in GAINS)  # [1 or B, 1, N]
        return super().project(weights, layer, name, inputs, outputs) + outputs * gain + shift

    def scaled_rows(self, index: int, name: str, rows: Tensor) -> Tensor:
        """See `LoRA.scaled_rows`; shifts undo in the bias what the gain does to it, so biases stay."""
        gain = self.get_parameter(tensor_name(name, GAINS[0]))[index].float().to(rows.device)
        return rows + gain[:, None] * rows


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
