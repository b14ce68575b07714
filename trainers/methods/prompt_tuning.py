"""Prompt tuning (Lester et al., arXiv 2104.08691): P trained vectors stand before the embedded input.

input = concat(prompt [P, D], embeddings [T, D])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.method import Method, Weights
from trainers.methods.configs import PromptTuningConfig


class SoftPrompt(Method):
    """What all methods share that put a prompt before the embedded input; the layers carry it on like any token."""

    def soft_prompt(self, weights: Weights) -> Tensor:
        """The prompt ``[1 or B, P, D]``."""
        return weights["prompt"]

    def start(self, backbone: Any, tokenizer: Any, instruction: list[int]) -> None:
        """Begin with real tokens' embeddings, see `initial_prompt`."""
        initial = initial_prompt(self.config, self.config.prompt_length, backbone, tokenizer, instruction)
        if initial is not None:
            self.get_parameter("prompt").data.copy_(initial)


class PromptTuning(SoftPrompt):
    """One tensor, ``prompt [P, D]``."""

    config: PromptTuningConfig
    learning_rate = 1e-2

    @staticmethod
    def shapes(config: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        return {"prompt": (config.prompt_length, sizes.hidden_size)}

    def reset_parameters(self) -> None:
        """Draw the prompt from N(0, 0.02)."""
        nn.init.normal_(self.get_parameter("prompt"), std=0.02)


@torch.no_grad()
def initial_prompt(config: Any, length: int, backbone: Any, tokenizer: Any, instruction: list[int]) -> Tensor | None:
    """Embeddings ``[length, D]`` that a prompt starts from, or None for random ones.

    The first is that of the token which instructions begin with: a pretrained decoder parks unneeded attention on
    the first token it sees (the attention sink, arXiv 2309.17453), and the prompt now stands there.

    Args:
        config: a method's configuration with ``init`` and ``init_text``.
        length: rows.
        backbone: the frozen causal LM.
        tokenizer: its tokenizer.
        instruction: token ids of one instruction.
    """
    if config.init == "random":
        return None
    table = backbone.get_input_embeddings()
    if config.init == "vocabulary":
        ids = torch.randint(table.num_embeddings, (length,)).tolist()
    else:
        text = tokenizer(config.init_text, add_special_tokens=False)["input_ids"] or instruction
        ids = (text * (length // len(text) + 1))[:length]
    ids[0] = instruction[0]
    # through the module and not its weight, because some backbones scale what it returns
    return table(torch.tensor(ids, device=table.weight.device)).float().cpu()
