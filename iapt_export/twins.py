"""Export twins: modules that trace well, take and return plain tensors, and compute what the trained ones do.

Each twin has a test against the module it stands for. Tenants enter as stacked weights with
``tenant_index [B]`` picking a row's tenant, so one graph serves any number of them.

Shapes: B batch, T instruction tokens, P prompt tokens, S cache length, N tenants, L layers, D hidden
width, H key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import iapt_export.ops.rational  # noqa: F401  (registers torch.ops.iapt.rational)
from trainers.config import IAPTConfig
from trainers.iapt import layer_weights, parameter_shapes, prompt_from_instruction
from trainers.insertion import forward_with_prompts, last_token


class TenantGenerators(nn.Module):
    """Twin of `trainers.iapt.IAPTGenerator` whose weights are inputs, one tenant's per row."""

    def __init__(self, config: IAPTConfig, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.groups = config.groups(num_layers)
        self.names = tuple(parameter_shapes(config, hidden_size, num_layers))

    def rows(self, tenant_index: Tensor, stacked: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Each row's own weights: ``[N, ...]`` picked by ``tenant_index [B]`` into ``[B, ...]``."""
        return {name: tensor.index_select(0, tenant_index) for name, tensor in zip(self.names, stacked, strict=True)}

    def prompt(self, layer: int, hidden: Tensor, mask: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """Soft tokens ``[B, P, D]`` of ``layer``; see `trainers.iapt.prompt_from_instruction`."""
        weights = layer_weights(rows, layer, self.groups[layer], stacked_rows=True)
        return prompt_from_instruction(hidden, mask, weights, self.config, torch.ops.iapt.rational)


class PrefillTwin(nn.Module):
    """Instruction in, last-token logits and a filled KV cache (prompts included) out."""

    def __init__(self, backbone: Any, generators: TenantGenerators) -> None:
        super().__init__()
        self.backbone = backbone
        self.generators = generators

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, tenant_index: Tensor, stacked: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """``input_ids, attention_mask [B, T]``, ``tenant_index [B]`` to ``logits [B, 1, V]``, K, V of P+T entries."""
        rows = self.generators.rows(tenant_index, stacked)
        num_prompts = self.generators.config.prompt_length
        index = last_token(attention_mask) + num_prompts  # [B]
        cache = DynamicCache()
        output = forward_with_prompts(
            self.backbone,
            lambda layer, hidden, mask: self.generators.prompt(layer, hidden, mask, rows),
            num_prompts,
            input_ids,
            attention_mask,
            select=lambda hidden: hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1])),
            past_key_values=cache,
        )
        return (output.logits, *flatten(cache))


class DecodeTwin(nn.Module):
    """One plain backbone step over a cache of plain tensors; it knows no tenants."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """``input_ids, position_ids [B, 1]``, ``attention_mask [B, S+1]``, K, V of S entries to logits, K, V of S+1."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (output.logits, *flatten(cache))


class GeneratorTwin(nn.Module):
    """The generators alone: every layer's prompts from every layer's hidden states."""

    def __init__(self, generators: TenantGenerators, num_layers: int) -> None:
        super().__init__()
        self.generators = generators
        self.num_layers = num_layers

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, tenant_index: Tensor, stacked: tuple[Tensor, ...]
    ) -> tuple[Tensor]:
        """``hidden_states [B, L, T, D]``, ``attention_mask [B, T]`` to ``prompts [B, L, P, D]``."""
        rows = self.generators.rows(tenant_index, stacked)
        prompts = [
            self.generators.prompt(layer, hidden_states[:, layer], attention_mask, rows)
            for layer in range(self.num_layers)
        ]
        return (torch.stack(prompts, dim=1),)


def flatten(cache: DynamicCache) -> list[Tensor]:
    """Key and value of layer 0, of layer 1, and so on."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
