"""IAPT, the method, in one file (Instruction-Aware Prompt Tuning, arXiv 2405.18203; methods in the paper's order).

    h   [B, T, D]  hidden states of the instruction right before the layer
    u   = h W_down + b_down                                       [B, T, R]
    p~  = softmax_T(u W_q)^T u      (self-attention pooling)      [B, P, R]
    a   = rational(p~)              (learned, per layer)          [B, P, R]
    p   = a W_up + b_up             (the layer's soft tokens)     [B, P, D]

The order is the paper's. That the pooling has no scaling by default, that prompts are prepended and
replaced at every layer, and that both projections carry a bias, are our choices (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config import IAPTConfig
from trainers.rational import initial_coefficients, rational

FIXED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class LayerWeights(NamedTuple):
    """One layer's generator. Each tensor may carry a leading ``B``: one tenant's weights per row."""

    down_weight: Tensor
    """``[D, R]``"""
    down_bias: Tensor | None
    """``[R]``"""
    query: Tensor | None
    """``[R, P]``, the learned pooling queries; None for mean and max pooling."""
    numerator: Tensor | None
    """``[m+1]``; None for a fixed activation."""
    denominator: Tensor | None
    """``[n]``"""
    up_weight: Tensor
    """``[R, D]``"""
    up_bias: Tensor | None
    """``[D]``"""


def prompt_from_instruction(
    hidden: Tensor,
    mask: Tensor,
    weights: LayerWeights,
    config: IAPTConfig,
    rational: Callable[[Tensor, Tensor, Tensor, str], Tensor] = rational,
) -> Tensor:
    """Generate one layer's soft tokens from the instruction's hidden states.

    Args:
        hidden: ``[B, T, D]``, any floating type.
        mask: ``[B, T]``, nonzero at instruction tokens (never padding, never the response).
        weights: the layer's generator, for all rows or one per row.
        config: the method's settings.
        rational: evaluates the activation; an export passes its traceable operator.

    Returns:
        Prompt tokens ``[B, P, D]`` in the type of ``hidden``.
    """
    u = hidden @ weights.down_weight  # [B, T, R]
    if weights.down_bias is not None:
        u = u + _rows(weights.down_bias)
    pooled = pool(u, mask, weights.query, config)  # [B, P, R]
    if weights.numerator is None or weights.denominator is None:
        active = FIXED_ACTIVATIONS[config.activation](pooled)
    else:
        active = rational(pooled, _rows(weights.numerator), _rows(weights.denominator), config.rational_form)
    prompt = active @ weights.up_weight  # [B, P, D]
    return prompt if weights.up_bias is None else prompt + _rows(weights.up_bias)


def pool(u: Tensor, mask: Tensor, query: Tensor | None, config: IAPTConfig) -> Tensor:
    """Pool ``u [B, T, R]`` over the tokens that ``mask [B, T]`` keeps into ``[B, P, R]``."""
    if query is not None:
        scores = (u @ query).float()  # [B, T, P]
        if config.scale:
            scores = scores / config.bottleneck**0.5
        scores = scores.masked_fill(mask[:, :, None] == 0, float("-inf"))
        return scores.softmax(dim=1).to(u.dtype).transpose(1, 2) @ u
    bins = adaptive_bins(mask, config.prompt_length)  # [B, P, T]
    if config.pooling == "mean":
        share = bins.to(u.dtype) / bins.sum(dim=2, keepdim=True).to(u.dtype)
        return share @ u
    spread = u[:, None].masked_fill(~bins[..., None], float("-inf"))  # [B, P, T, R]
    return spread.amax(dim=2)


def adaptive_bins(mask: Tensor, num_bins: int) -> Tensor:
    """Which tokens fall into which pooling bin, as ``[B, P, T]`` booleans.

    Bin i covers tokens ``floor(i t / P)`` to ``ceil((i+1) t / P)`` of a row's t real tokens, the rule
    of adaptive pooling in late prompt tuning (arXiv 2210.11292); bins overlap when P does not divide t.
    """
    kept = (mask != 0).long()
    rank = (kept.cumsum(dim=1) - 1)[:, None, :]  # [B, 1, T] position among the row's real tokens
    count = kept.sum(dim=1)[:, None, None]  # [B, 1, 1]
    index = torch.arange(num_bins, device=mask.device)[None, :, None]  # [1, P, 1]
    first = index * count // num_bins
    last = ((index + 1) * count + num_bins - 1) // num_bins
    return (rank >= first) & (rank < last) & (kept[:, None, :] == 1)


class IAPTGenerator(nn.Module):
    """The trained part of an adapter: one prompt generator per layer, projections shared by group.

    Parameters are stacked so that the adapter file, the tenant file of a bundle and the exported
    graph's inputs have the same names and shapes: ``down_weight [G, D, R]``, ``down_bias [G, R]``,
    ``query [L, R, P]``, ``numerator [L, m+1]``, ``denominator [L, n]``, ``up_weight [G, R, D]``,
    ``up_bias [G, D]``. Projections and queries start from N(0, 0.02), biases from zero.
    """

    def __init__(self, config: IAPTConfig, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.layer_groups = config.groups(num_layers)
        for name, shape in parameter_shapes(config, hidden_size, num_layers).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's current random state."""
        config = self.config
        for name, parameter in self.named_parameters():
            if name in ("down_weight", "up_weight", "query"):
                nn.init.normal_(parameter, std=0.02)
        if config.activation == "rational":
            numerator, denominator = initial_coefficients(
                config.init_function, config.numerator_degree, config.denominator_degree, config.rational_form
            )
            parameters = dict(self.named_parameters())
            with torch.no_grad():
                for name, values in (("numerator", numerator), ("denominator", denominator)):
                    parameters[name].copy_(torch.from_numpy(values).expand_as(parameters[name]))

    def layer_weights(self, layer: int) -> LayerWeights:
        """The weights that act at ``layer``."""
        return layer_weights(dict(self.named_parameters()), layer, self.layer_groups[layer])

    def forward(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Soft tokens ``[B, P, D]`` of ``layer`` for ``hidden [B, T, D]`` under ``mask [B, T]``."""
        return prompt_from_instruction(hidden, mask, self.layer_weights(layer), self.config)


def layer_weights(tensors: dict[str, Tensor], layer: int, group: int, stacked_rows: bool = False) -> LayerWeights:
    """Pick one layer's tensors from ``[G or L, ...]``, or from ``[B, G or L, ...]`` with ``stacked_rows``."""

    def pick(name: str, index: int) -> Tensor | None:
        tensor = tensors.get(name)
        return None if tensor is None else tensor.select(1 if stacked_rows else 0, index)

    down, up = pick("down_weight", group), pick("up_weight", group)
    assert down is not None
    assert up is not None
    return LayerWeights(
        down_weight=down,
        down_bias=pick("down_bias", group),
        query=pick("query", layer),
        numerator=pick("numerator", layer),
        denominator=pick("denominator", layer),
        up_weight=up,
        up_bias=pick("up_bias", group),
    )


def parameter_shapes(config: IAPTConfig, hidden_size: int, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Name to shape of every trained tensor, in the order in which files and graphs carry them."""
    groups = max(config.groups(num_layers)) + 1
    width, rank, layers = hidden_size, config.bottleneck, num_layers
    shapes: dict[str, tuple[int, ...]] = {"down_weight": (groups, width, rank)}
    if config.bias:
        shapes["down_bias"] = (groups, rank)
    if config.pooling == "attention":
        shapes["query"] = (layers, rank, config.prompt_length)
    if config.activation == "rational":
        shapes["numerator"] = (layers, config.numerator_degree + 1)
        shapes["denominator"] = (layers, config.denominator_degree)
    shapes["up_weight"] = (groups, rank, width)
    if config.bias:
        shapes["up_bias"] = (groups, width)
    return shapes


def _rows(vector: Tensor) -> Tensor:
    """Let a per-row vector ``[B, W]`` broadcast over a row's tokens as ``[B, 1, W]``; ``[W]`` does already."""
    return vector[:, None, :] if vector.dim() == 2 else vector
