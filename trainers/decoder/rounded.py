"""A backbone with the weights that a quantised target multiplies with: rounded as an export stores them, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainers.decoder.quantise import BLOCK_SIZE, bits_for, quantise


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Round a backbone's matrices in place: embeddings by rows, linear layers by inputs, what both share once."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    done: set[Tensor] = set()
    for module in model.modules():
        if not isinstance(module, nn.Embedding | nn.Linear | Conv1D) or module.weight in done:
            continue
        weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T  # [K, N]
        is_table = isinstance(module, nn.Embedding)
        if weight.shape[0] < BLOCK_SIZE or (
            is_table and (weight.shape[0] % BLOCK_SIZE or weight.shape[1] < BLOCK_SIZE)
        ):
            continue
        chosen = bits_for(weight.shape, bits, is_end=is_table or module is head)
        weight.copy_(torch.from_numpy(quantise(weight.contiguous().float().numpy(), chosen).restored()))
        done.add(module.weight)
