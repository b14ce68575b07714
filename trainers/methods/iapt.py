"""IAPT, the method, in one file (Instruction-Aware Prompt Tuning, arXiv 2405.18203; methods in the paper's order).

    h   [B, T, D]  hidden states of the instruction right before the layer, each over its root mean square
    u   = h W_down + b_down                                       [B, T, R]
    p~  = softmax_T(u W_q)^T u      (self-attention pooling)      [B, P, R]
    a   = rational(p~)              (learned, per layer)          [B, P, R]
    p   = a W_up + b_up             (the layer's soft tokens)     [B, P, D]

The order is the paper's. That hidden states are normalised first (``normalize``), that the pooling has no scaling by
default, that prompts are prepended and replaced at every layer, and that both projections carry a bias, are our
choices (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.method import Method, Weights
from trainers.methods.configs import IAPTConfig
from trainers.methods.rational import COEFFICIENTS, initial_coefficients, random_coefficients, rational

FIXED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
SINK_SCALE = {True: 1.0, False: 10.0}
"""Root mean square of the initial up-projection bias, with normalised hidden states and without. The backbone
normalises prompts, so only its size relative to the generated part (0.02; 0.1 to 0.5) counts: large enough to act as
sink, small enough to be outweighed soon."""
EPSILON = 1e-6
"""Added to the mean square of a hidden state."""


class IAPT(Method):
    """One prompt generator per layer, projections shared by group.

    Tensors are stacked so that the adapter file, the tenant file of a bundle and the exported graph's inputs have
    the same names and shapes: ``down_weight [G, D, R]``, ``down_bias [G, R]``, ``query [L, R, P]``, ``numerator
    [L, m+1]``, ``denominator [L, n]``, ``up_weight [G, R, D]``, ``up_bias [G, D]``. Projections start from N(0, 0.02),
    biases from zero, and queries such that the scores of normalised hidden states spread by 1 (else N(0, 0.02)).
    """

    config: IAPTConfig
    decayed = ("down_weight", "up_weight", "query")
    generates = True
    rational = staticmethod(rational)

    def __init__(self, config: IAPTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        if config.activation == "rational":
            self.rational_form = (config.numerator_degree + 1, config.denominator_degree, config.rational_form)

    @staticmethod
    def shapes(config: IAPTConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        groups = max(config.groups(sizes.num_layers)) + 1
        width, rank, layers = sizes.hidden_size, config.bottleneck, sizes.num_layers
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

    @property
    def groups(self) -> tuple[int, ...]:
        """The sharing group of each layer."""
        return self.config.groups(self.sizes.num_layers)

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's current random state."""
        config, parameters = self.config, dict(self.named_parameters())
        for name, parameter in parameters.items():  # in this order, on which a seed's weights depend
            if name in self.decayed:
                nn.init.normal_(parameter, std=self._query_spread if name == "query" else 0.02)
        if config.activation != "rational":
            return
        degrees = config.numerator_degree, config.denominator_degree
        if config.init_function == "random":
            layers = self.sizes.num_layers
            values = [random_coefficients(layers, degree, lowest) for lowest, degree in enumerate(degrees)]
        else:
            fitted = initial_coefficients(config.init_function, *degrees, config.rational_form)
            values = [torch.from_numpy(row) for row in fitted]
        with torch.no_grad():
            for name, value in zip(COEFFICIENTS, values, strict=True):
                parameters[name].copy_(value.expand_as(parameters[name]))

    @property
    def _query_spread(self) -> float:
        """Standard deviation of the initial queries.

        A score is a sum over R of products with the entries of u, which spread by 0.02 sqrt(D). Scores that are all
        alike would make the P prompts begin as one.
        """
        if not self.config.normalize:
            return 0.02
        unscaled = 1 / (0.02 * (self.sizes.hidden_size * self.config.bottleneck) ** 0.5)
        return unscaled * self.config.bottleneck**0.5 if self.config.scale else unscaled

    def expanded(self, weights: Weights) -> Weights:
        """With self-attention pooling adds ``score [B, L, D, P]``, the queries as the tokens meet them: W_down W_q.

        A group's layers are one product in place of many with P columns each.
        """
        if self.config.pooling != "attention":
            return weights
        scores = []
        for group in range(max(self.groups) + 1):
            first, size = self.groups.index(group), self.groups.count(group)
            query = weights["query"][:, first : first + size].transpose(1, 2).flatten(2)  # [B, R, layers P]
            score = weights["down_weight"][:, group] @ query  # [B, D, layers P]
            scores.append(score.unflatten(2, (size, self.config.prompt_length)).transpose(1, 2))
        return {**weights, "score": torch.cat(scores, dim=1)}

    def layer_kind(self, layer: int) -> int | None:
        """The layer's group, where groups are neither one layer each nor all layers."""
        return self.groups[layer] if self.config.sharing == "groups" else None

    def slots(self, weights: Weights, layer: int, slots: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """This layer's prompts ``[B, P, D]``, made of the instruction; what the layer before left is dropped."""
        config, group = self.config, self.groups[layer]
        down = weights["down_weight"][:, group]  # [B, D, R]
        bias = weights["down_bias"][:, group, None] if config.bias else 0.0
        if config.normalize:
            tokens = normalised(tokens)
        if config.pooling == "max":
            pooled = max_pool(tokens @ down + bias, mask, config.prompt_length)  # [B, P, R]
        else:
            # Both other kinds are linear in u, so tokens are mixed before they are projected: P products with W_down
            # instead of T. The bias adds the same to every token's score, and shares sum to 1.
            score = weights["score"][:, layer] if config.pooling == "attention" else None  # [B, D, P]
            pooled = token_shares(tokens, mask, score, config) @ tokens @ down + bias
        if config.activation == "rational":
            numerator, denominator = (weights[name][:, layer : layer + 1] for name in ("numerator", "denominator"))
            active = self.rational(pooled, numerator, denominator, config.rational_form)
        else:
            active = FIXED_ACTIVATIONS[config.activation](pooled)
        prompt = active @ weights["up_weight"][:, group]  # [B, P, D]
        return prompt + weights["up_bias"][:, group, None] if config.bias else prompt

    @torch.no_grad()
    def start(self, backbone: Any, tokenizer: Any, instruction: list[int]) -> None:
        """Point the prompts' bias along the backbone's attention sink, and make the generator blind to the sink.

        A pretrained decoder parks unneeded attention on its first token, whose hidden state it drives to one
        dominant direction (the attention sink, arXiv 2309.17453). Prompts stand before that token and take the
        place away: with randomly drawn prompts SmolLM2's loss starts at 17 instead of the plain backbone's 5.
        Prompts that begin in the sink's direction serve as sink themselves, and the loss starts at 5.7 (both figures
        with raw input). The method is unchanged: only initial values are. The down-projection loses its component along
        the sink, which is all that the first token's hidden state shows, in every instruction.
        """
        ids = torch.tensor([instruction[:1]], device=backbone.device)
        states = backbone(input_ids=ids, output_hidden_states=True).hidden_states
        before = torch.stack([state[0, 0].float() for state in states[: self.sizes.num_layers]])  # [L, D]
        parameters = dict(self.named_parameters())
        down = parameters["down_weight"]
        for group in range(max(self.groups) + 1):
            members = [layer for layer, mine in enumerate(self.groups) if mine == group]
            sink = before[members].mean(dim=0).to(down.device)
            sink = sink / sink.norm().clamp(min=1e-12)  # [D]
            down[group] -= torch.outer(sink, sink @ down[group])
            if self.config.bias:
                parameters["up_bias"][group] = sink * SINK_SCALE[self.config.normalize] * self.sizes.hidden_size**0.5


def normalised(tokens: Tensor) -> Tensor:
    """Each of ``tokens [B, T, D]`` over its root mean square, which is taken in fp32.

    Hidden states grow with depth and differ a hundredfold between tokens, while all layers share the projections.
    """
    width = tokens.shape[-1]
    return F.rms_norm(tokens, (width,), tokens.new_ones(width), EPSILON)  # with ones, because exporters want a weight


def token_shares(tokens: Tensor, mask: Tensor, score: Tensor | None, config: IAPTConfig) -> Tensor:
    """Shares ``[B, P, T]`` of the tokens in each prompt, summing to 1 over those that ``mask [B, T]`` keeps.

    Args:
        tokens: ``[B, T, D]``.
        mask: 1 at the tokens that count.
        score: ``[B, D, P]``, scores the tokens for self-attention pooling; None gives those of a bin equal shares.
        config: the method's.
    """
    if score is None:
        bins = adaptive_bins(mask, config.prompt_length)  # [B, P, T]
        return bins.to(tokens.dtype) / bins.sum(dim=2, keepdim=True).to(tokens.dtype)
    scores = (tokens @ score).float()  # [B, T, P]
    if config.scale:
        scores = scores / config.bottleneck**0.5
    scores = scores.masked_fill(mask[:, :, None] == 0, float("-inf"))
    return scores.softmax(dim=1).to(tokens.dtype).transpose(1, 2)


def max_pool(u: Tensor, mask: Tensor, num_bins: int) -> Tensor:
    """The largest of ``u [B, T, R]`` in each bin ``[B, P, R]``."""
    bins = adaptive_bins(mask, num_bins)  # [B, P, T]
    return u[:, None].masked_fill(~bins[..., None], float("-inf")).amax(dim=2)


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
