"""DePT (Shi, Lipani, arXiv 2309.05173), the method, in one file: a shorter prompt, and an offset by position.

    E'[j] = E[j] + c (A B)[j]    for the j-th instruction token, j < S;    c = alpha / sqrt(R)
    input = concat(prompt [P, D], E')

with A [S, R] (here ``left``) and B [R, D] (``right``). The equation, the square root in c, the initial values (A
Kaiming-uniform as it is laid out here, B zero, so that training starts without offset) and two learning rates, the
prompt's the larger, are those of the published code. That code pads every input to S tokens.

Our choices (docs/methods.md): j counts a row's instruction tokens, so that neither length nor side of padding
matters; tokens from the S-th on keep their embeddings; in a decoder only the instruction has offsets, so that the
decode step is the plain backbone's. The learning rates' values, and the prompt's initial text, are ours too.

The offset is the same for every input, so c A B is computed beforehand: `DePT.deployed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.method import Weights
from trainers.methods.configs import DePTConfig
from trainers.methods.prompt_tuning import SoftPrompt


class DePT(SoftPrompt):
    """Three tensors: ``prompt [P, D]``, ``left [S, R]`` and ``right [R, D]``."""

    config: DePTConfig
    decayed = ("left", "right")
    learning_rate = 3e-2

    @staticmethod
    def shapes(config: DePTConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        width = sizes.hidden_size
        return {
            "prompt": (config.prompt_length, width),
            "left": (config.max_length, config.rank),
            "right": (config.rank, width),
        }

    @property
    def scale(self) -> float:
        """c, what the low-rank product is multiplied by."""
        return float(self.config.alpha / self.config.rank**0.5)

    def reset_parameters(self) -> None:
        """Draw the prompt and the left factor; the right one stays zero, and with it the offset."""
        nn.init.normal_(self.get_parameter("prompt"), std=0.02)
        nn.init.kaiming_uniform_(self.get_parameter("left"), a=5**0.5)

    def learning_rate_factors(self) -> dict[str, float]:
        """The factors move many tokens at once, and want smaller steps than the prompt."""
        return dict.fromkeys(("left", "right"), 1 / 30)

    def embed(self, weights: Weights, input_ids: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """E' at the first S instruction tokens, E at all others."""
        left, has_offset = by_position(weights["left"], mask)  # [B, T, R]
        changed = embeddings + self.scale * (left @ weights["right"])
        return torch.where(has_offset, changed.to(embeddings.dtype), embeddings)

    @torch.no_grad()
    def deployed(self) -> PositionTable:
        """The same adapter with c A B computed."""
        config = PositionTableConfig(prompt_length=self.config.prompt_length, max_length=self.config.max_length)
        table = PositionTable(config, self.sizes)
        offset = self.scale * (self.get_parameter("left") @ self.get_parameter("right"))
        table.load_state_dict({"prompt": self.get_parameter("prompt").clone(), "offset": offset}, assign=True)
        return table


@dataclass(frozen=True, kw_only=True)
class PositionTableConfig:
    """The settings of a deployed DePT."""

    prompt_length: int
    """Soft tokens (P)."""
    max_length: int
    """Instruction tokens that get an offset (S)."""


class PositionTable(SoftPrompt):
    """A deployed DePT: ``prompt [P, D]``, and ``offset [S, D]`` with what is added to the j-th instruction token."""

    config: PositionTableConfig

    @staticmethod
    def shapes(config: PositionTableConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        width = sizes.hidden_size
        return {"prompt": (config.prompt_length, width), "offset": (config.max_length, width)}

    def embed(self, weights: Weights, input_ids: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The embeddings plus the offset of their position, as `DePT.embed` has it."""
        offset, has_offset = by_position(weights["offset"], mask)  # [B, T, D]
        return torch.where(has_offset, (embeddings + offset).to(embeddings.dtype), embeddings)


def by_position(table: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The row of a table that belongs to each token's position.

    Args:
        table: ``[1 or B, S, N]``, row j for the j-th instruction token.
        mask: ``[B, T]``, nonzero at instruction tokens.

    Returns:
        The rows ``[B, T, N]``, and booleans ``[B, T, 1]``: whether the token has one. Where not, the row is any.
    """
    kept = mask != 0
    rank = kept.long().cumsum(dim=1) - 1  # [B, T] position among the row's instruction tokens
    length = table.shape[1]
    # 0, 0, ... for one table, 0, 1, 2, ... for one each: without asking a traced size which it is
    row = torch.arange(table.shape[0], device=table.device).expand(mask.shape[0])
    return table[row[:, None], rank.clamp(0, length - 1)], (kept & (rank < length))[..., None]
