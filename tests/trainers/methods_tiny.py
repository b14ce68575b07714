"""What the methods' tests share: trained-looking weights, and a backbone that is fed by hand, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_llama
from trainers.decoder.generate import greedy, prefill
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import Method, Part, Rows, Sizes, rows_of

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


class Exported(torch.nn.Module):
    """What a graph does before its first layer: prepare, embed, and fill the slots, each row with its own weights."""

    def __init__(self, method: Method, model: Any) -> None:
        super().__init__()
        self.method, self.model = method, model

    def forward(self, weights: dict[str, Tensor], input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.method.prepare(weights, self.model, input_ids, mask)
        embeddings = self.model.get_input_embeddings()(input_ids)
        tokens = self.method.embed(weights, input_ids, embeddings, mask)
        slots = embeddings.new_zeros(embeddings.shape[0], self.method.num_slots, embeddings.shape[2])
        return tokens, self.method.slots(weights, 0, slots, tokens, mask)


def check_traceable(
    method: Method, model: Any, weights: dict[str, Tensor], ids: Tensor, mask: Tensor, shared: tuple[str, ...] = ()
) -> None:
    """A graph traced with one batch and length computes another; tensors in ``shared`` have no row axis."""
    batch, length = torch.export.Dim("B"), torch.export.Dim("T")
    module = Exported(method, model)
    shapes = {name: {} if name in shared else {0: batch} for name in weights}
    tokens = {0: batch, 1: length}
    program = torch.export.export(module, (weights, ids, mask), dynamic_shapes=(shapes, tokens, tokens))
    fewer = {name: tensor if name in shared else tensor[:1] for name, tensor in weights.items()}
    other = (fewer, ids[:1, :4].clone(), mask[:1, :4].clone())
    for got, expected in zip(program.module()(*other), module(*other), strict=True):
        torch.testing.assert_close(got, expected)
