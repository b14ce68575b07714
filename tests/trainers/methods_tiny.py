"""What the methods' tests share: trained-looking weights, and a backbone that is fed by hand, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_llama
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.generate import greedy, prefill
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import Method, Part, Rows, rows_of

LENGTHS = [7, 3, 5]
"""Real tokens of the rows that the tests read."""
STEPS = 6
"""Tokens that the tests generate; none of the tiny backbones ends earlier, since no end is given."""


def count(method: type[Method], config: Any, sizes: Sizes) -> int:
    return sum(torch.Size(shape).numel() for shape in method.shapes(config, sizes).values())


def trained(method: type[Method], config: Any, model: Any, seed: int = 0) -> Any:
    """A method whose tensors are all far from zero, as after training."""
    module = method(config, sizes_of(model))
    source = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    return module.eval()


def stacked(methods: list[Method]) -> Rows:
    """Each row its own adapter of one method."""
    names = methods[0].weights()
    return Rows(Part(methods[0], {name: torch.cat([method.weights()[name] for method in methods]) for name in names}))


def logits_by_hand(model: Any, prompt: Tensor, embeddings: Tensor) -> Tensor:
    """Logits ``[t, V]`` of one row without padding: a prompt ``[P, D]`` before embeddings ``[t, D]``."""
    with torch.no_grad():
        return model(inputs_embeds=torch.cat([prompt, embeddings])[None]).logits[0, len(prompt) :]


def greedy_by_hand(model: Any, prompt: Tensor, embed: Callable[[list[int], int], Tensor], ids: list[int]) -> list[int]:
    """`STEPS` likeliest tokens without a cache; ``embed(ids, t)`` embeds an instruction of t tokens and a response."""
    tokens = list(ids)
    for _ in range(STEPS):
        tokens.append(int(logits_by_hand(model, prompt, embed(tokens, len(ids)))[-1].argmax()))
    return tokens[len(ids) :]


def real_rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep == 1].tolist() for row, keep in zip(ids, mask, strict=True)]


def last_logits(model: Any, method: Method | Rows, ids: Tensor, mask: Tensor) -> Tensor:
    rows = method if isinstance(method, Rows) else rows_of(method)
    return prefill(model, rows, ids, mask)[0]


def greedy_tokens(model: Any, method: Method | Rows, ids: Tensor, mask: Tensor) -> list[list[int]]:
    rows = method if isinstance(method, Rows) else rows_of(method)
    return greedy(model, rows, ids, mask, max_new_tokens=STEPS)[0]


def gradients(method: Method, ids: Tensor, mask: Tensor) -> dict[str, float]:
    """Largest gradient of every tensor for a loss on the last logits."""
    output = read_instruction(tiny_llama(), rows_of(method.train()), ids, mask)
    output.logits[:, -1].log_softmax(dim=-1)[:, 5].sum().backward()
    return {name: float(parameter.grad.abs().max()) for name, parameter in method.named_parameters()}
