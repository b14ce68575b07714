"""ADePT (Tang, Hu, Liu, arXiv 2501.03291), the method, in one file: a prompt, and a shared offset for every token.

    E'    = E + ReLU(E A + a) B + b                               [B, T, D]
    input = concat(prompt [P, D], E')

with A [D, R], a [R], B [R, D], b [D]. The prompt has no offset. The equation, the initial values (A Kaiming-uniform
as it is laid out here, B, a, b zero, so that training starts without offset) and two learning rates, the prompt's the
larger, are those of the published code.

Our choices (docs/methods.md): which tokens have an offset is one setting for training and serving. The published code
trains a decoder with the responses offset and then generates without; here ``decode_offset`` says yes or no for
both. The learning rates' values, and the prompt's initial text, are ours too.

An offset depends on its token's id alone, so all V can be computed beforehand: `ADePT.folded`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.method import Weights
from trainers.methods.configs import ADePTConfig
from trainers.methods.prompt_tuning import SoftPrompt


class ADePT(SoftPrompt):
    """A prompt and the offset network; the LM head keeps the backbone's own table, also where the two are tied."""

    config: ADePTConfig
    decayed = ("down_weight", "up_weight")
    learning_rate = 3e-2
    folded_form = "TOKEN_TABLE"

    def __init__(self, config: ADePTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.in_decode = config.decode_offset

    @staticmethod
    def shapes(config: ADePTConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        width, rank = sizes.hidden_size, config.bottleneck
        return {
            "prompt": (config.prompt_length, width),
            "down_weight": (width, rank),
            "down_bias": (rank,),
            "up_weight": (rank, width),
            "up_bias": (width,),
        }

    def reset_parameters(self) -> None:
        """Draw the prompt and the down-projection; what follows it stays zero, and with it the offset."""
        nn.init.normal_(self.get_parameter("prompt"), std=0.02)
        nn.init.kaiming_uniform_(self.get_parameter("down_weight"), a=5**0.5)

    def learning_rate_factors(self) -> dict[str, float]:
        """The network moves every token, instructions included, and wants smaller steps than the prompt."""
        return dict.fromkeys(("down_weight", "down_bias", "up_weight", "up_bias"), 1 / 30)

    def embed(self, weights: Weights, input_ids: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """E' at the tokens that have an offset, E at all others."""
        return offset_where(self.config.decode_offset, mask, offset(weights, embeddings), embeddings)

    @torch.no_grad()
    def folded(self, embedding_table: Tensor) -> TokenTable:
        """The same adapter as one table of offset embeddings; see `trainers.decoder.method.Method.folded`."""
        weights = {name: tensor.to(embedding_table.device) for name, tensor in self.weights().items()}
        config = TokenTableConfig(prompt_length=self.config.prompt_length, decode_offset=self.config.decode_offset)
        table = TokenTable(config, dataclasses.replace(self.sizes, vocab_size=len(embedding_table)))
        dtype = weights["prompt"].dtype
        tensors = {"prompt": weights["prompt"][0], "table": offset(weights, embedding_table.to(dtype)[None])[0]}
        table.load_state_dict(tensors, assign=True)
        return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTableConfig:
    """The settings of a folded ADePT."""

    prompt_length: int
    """Soft tokens (P)."""
    decode_offset: bool
    """Take generated tokens' embeddings from the table as well."""


class TokenTable(SoftPrompt):
    """A folded ADePT: ``prompt [P, D]``, and ``table [V, D]`` with the offset embedding of every token.

    Its ``weights`` may hold a whole bank ``table [N, V, D]`` and, for each row, the table that is the row's:
    ``table_row [B]`` int64. Rows are then read out of the bank, and no table is copied for any row.
    """

    config: TokenTableConfig

    def __init__(self, config: TokenTableConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.in_decode = config.decode_offset

    @staticmethod
    def shapes(config: TokenTableConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        width = sizes.hidden_size
        return {"prompt": (config.prompt_length, width), "table": (sizes.vocab_size, width)}

    def picked(self, stacks: Weights, index: Tensor) -> Weights:
        """A table of the whole vocabulary is not copied for each row."""
        rows = super().picked({name: stack for name, stack in stacks.items() if name != "table"}, index)
        return {**rows, "table": stacks["table"], "table_row": index}

    def embed(self, weights: Weights, input_ids: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The table's rows at the tokens that have an offset, the backbone's embeddings at all others."""
        table = weights["table"]  # [1 or B, V, D], or [N, V, D] with table_row
        if "table_row" in weights:
            row = weights["table_row"]
        else:  # 0, 0, ... for one table, 0, 1, 2, ... for one each: without asking a traced size which it is
            row = torch.arange(table.shape[0], device=table.device).expand(input_ids.shape[0])
        return offset_where(self.config.decode_offset, mask, table[row[:, None], input_ids], embeddings)


def offset(weights: Weights, embeddings: Tensor) -> Tensor:
    """E' of embeddings E ``[B, T, D]``, or of ``[1, V, D]``: the paper's equation."""
    hidden = torch.relu(embeddings @ weights["down_weight"] + weights["down_bias"][:, None])  # [B, T, R]
    return embeddings + hidden @ weights["up_weight"] + weights["up_bias"][:, None]


def offset_where(everywhere: bool, mask: Tensor, changed: Tensor, embeddings: Tensor) -> Tensor:
    """``changed [B, T, D]`` where ``mask [B, T]`` is nonzero, or everywhere; in the embeddings' type."""
    changed = changed.to(embeddings.dtype)
    return changed if everywhere else torch.where(mask[..., None] != 0, changed, embeddings)
