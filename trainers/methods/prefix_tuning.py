"""P-tuning v2 (arXiv 2110.07602), prefix tuning: P trained keys and values stand before a layer's own.

    table [P, 2 L H K] = tanh(E W_1^T + b_1) W_2^T + b_2          (with projection)
    prefix [L, 2, H, P, K] = table, keys then values              (without: trained as it is)
    keys_l = concat(prefix[l, 0], RoPE(K_l)),   values_l = concat(prefix[l, 1], V_l)

Layout and network are those of PEFT's ``PrefixEncoder``: E is ``[P, H K]`` whatever the number of query heads, and
no rotary position is applied to the prefix. Where keys and values differ in width (latent attention, whose cache holds
latents in place of keys, and their rotary part in place of values), K is the wider one, and the end of the other is
not used; PEFT has no such prefix. Initial values are ours: PEFT draws its table, which is the weight of
an ``nn.Embedding``, from N(0, 1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.family import cache_argument
from trainers.decoder.method import Method, Weights
from trainers.methods.configs import INITIAL_TEXT, PrefixTuningConfig


class PrefixTuning(Method):
    """One tensor ``prefix [L, 2, H, P, K]``, or with projection the network that makes it.

    The network: ``embedding [P, E]``, ``hidden_weight [W, E]``, ``hidden_bias [W]``, ``output_weight [2 L E, W]``,
    ``output_bias [2 L E]``, where E is H K and W the projection's width.
    """

    config: PrefixTuningConfig
    decayed = ("hidden_weight", "output_weight")
    learning_rate = 1e-2

    @staticmethod
    def shapes(config: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        length, layers = config.prompt_length, sizes.num_layers
        if not config.projection:
            return {"prefix": (layers, 2, sizes.num_kv_heads, length, max(sizes.cache_widths))}
        width, hidden = prefix_width(sizes), config.projection_width
        return {
            "embedding": (length, width),
            "hidden_weight": (hidden, width),
            "hidden_bias": (hidden,),
            "output_weight": (2 * layers * width, hidden),
            "output_bias": (2 * layers * width,),
        }

    def reset_parameters(self) -> None:
        """Draw the prefix from N(0, 0.02); the network as PEFT does: embedding N(0, 1), layers as ``nn.Linear``."""
        if not self.config.projection:
            nn.init.normal_(self.get_parameter("prefix"), std=0.02)
            return
        nn.init.normal_(self.get_parameter("embedding"))
        for layer in ("hidden", "output"):
            weight = self.get_parameter(f"{layer}_weight")
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(self.get_parameter(f"{layer}_bias"), -bound, bound)

    @torch.no_grad()
    def start(self, backbone: Any, tokenizer: Any, instruction: list[int]) -> None:
        """Begin with the keys and values that the frozen backbone computes for a real text, see `initial_prefix`.

        A network starts there too: its last layer is set by least squares, exact where it is at least P - 1 wide.
        """
        prefix = initial_prefix(self.config.prompt_length, backbone, tokenizer, instruction)
        if not self.config.projection:
            self.get_parameter("prefix").copy_(prefix)
            return
        table = to_table(prefix)
        mean = table.mean(dim=0)
        hidden = _hidden({name: parameter.cpu()[None] for name, parameter in self.named_parameters()})[0]
        self.get_parameter("output_bias").copy_(mean)
        self.get_parameter("output_weight").copy_((torch.linalg.pinv(hidden) @ (table - mean)).T)

    def learning_rate_factors(self) -> dict[str, float]:
        """A network's weights move at a tenth: a step of Adam changes all outputs at once."""
        return {name: 0.1 for name, _ in self.named_parameters()} if self.config.projection else {}

    @torch.no_grad()
    def deployed(self) -> Method:
        """The prefix that the network makes; it depends on nothing else."""
        if not self.config.projection:
            return self
        method = PrefixTuning(PrefixTuningConfig(prompt_length=self.config.prompt_length), self.sizes)
        method.get_parameter("prefix").copy_(self.weights()["prefix"][0])
        return method.to(self.get_parameter("embedding").device)

    def expanded(self, weights: Weights) -> Weights:
        """With projection adds ``prefix [1 or B, L, 2, H, P, K]``, which the network makes."""
        if not self.config.projection:
            return weights
        table = _hidden(weights) @ weights["output_weight"].transpose(1, 2) + weights["output_bias"][:, None]
        return {**weights, "prefix": from_table(table, self.sizes)}

    def key_value(self, weights: Weights, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's prefix; what the slots' own hidden states gave is dropped."""
        prefix = weights["prefix"][:, layer]  # [1 or B, 2, H, P, K]
        keys, values = prefix[:, 0, ..., : key.shape[-1]], prefix[:, 1, ..., : value.shape[-1]]
        return keys.expand_as(key), values.expand_as(value)

    @property
    def changes_cache(self) -> bool:
        """The prefix enters there."""
        return True


def prefix_width(sizes: Sizes) -> int:
    """H K, the numbers of a prefix's key or value in all heads."""
    return sizes.num_kv_heads * max(sizes.cache_widths)


def _hidden(weights: Weights) -> Tensor:
    """The network's hidden layer ``[1 or B, P, W]``."""
    return torch.tanh(weights["embedding"] @ weights["hidden_weight"].transpose(1, 2) + weights["hidden_bias"][:, None])


def from_table(table: Tensor, sizes: Sizes) -> Tensor:
    """PEFT's table ``[..., P, 2 L H K]`` as a prefix ``[..., L, 2, H, P, K]``."""
    heads, width = sizes.num_kv_heads, max(sizes.cache_widths)
    return table.unflatten(-1, (sizes.num_layers, 2, heads, width)).movedim(-5, -2)


def to_table(prefix: Tensor) -> Tensor:
    """A prefix ``[..., L, 2, H, P, K]`` as PEFT's table ``[..., P, 2 L H K]``."""
    return prefix.movedim(-2, -5).flatten(-4)


@torch.no_grad()
def initial_prefix(length: int, backbone: Any, tokenizer: Any, instruction: list[int]) -> Tensor:
    """Keys and values ``[L, 2, H, length, K]`` of real tokens at positions 0 to length - 1.

    The first token is the one that instructions begin with, where a pretrained decoder parks unneeded attention (the
    attention sink, arXiv 2309.17453); a neutral text follows, repeated. The backbone then reads the instruction as
    if that text stood before it, which is far nearer to its habits than random keys.

    Args:
        length: entries.
        backbone: the frozen causal LM.
        tokenizer: its tokenizer.
        instruction: token ids of one instruction.
    """
    text = tokenizer(INITIAL_TEXT, add_special_tokens=False)["input_ids"] or instruction
    ids = (instruction[:1] + text * (length // len(text) + 1))[:length]
    cache = DynamicCache()  # of the model's own making, a layer with a window would keep no more than that
    tokens = torch.tensor([ids], device=backbone.device)
    backbone(input_ids=tokens, use_cache=True, **cache_argument(backbone, cache))
    sides = [[layer.keys[0], layer.values[0]] for layer in cache.layers]
    widest = max(side.shape[-1] for side in sides[0])
    sides = [[nn.functional.pad(side, (0, widest - side.shape[-1])) for side in pair] for pair in sides]
    return torch.stack([torch.stack(pair) for pair in sides]).float().cpu()
