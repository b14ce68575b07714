"""LoPA (arXiv 2405.15282), the method, in one file: a task prompt times a gate made of the instruction.

    x     = encoding of the instruction by a frozen encoder                                         [B, D]
    U     = reshape(tanh(x W_1 + b_1) W_2 + b_2)                                                    [B, P, R]
    V     = the same with weights of its own                                                        [B, D, R]
    Z     = Z_S * sigmoid(U V^T)     (elementwise; Z_S the task prompt [P, D])                      [B, P, D]
    input = concat(Z, embeddings [T, D])

The equations, the heads' form and layout, and their initial values (weights N(0, 0.02), biases zero) are those of the
published code, which knows several encoders; for decoders it takes the last token in the last layer.

Our choices (docs/methods.md): the encoder is the frozen backbone itself, without adapter, so that nothing else has to
be shipped; x is what would enter its LM head, after the final norm; and the heads have no dropout. The prompt's
initial text, and its learning rate, are ours too; the heads' learning rate is the published code's.

Z is all that the backbone takes of LoPA, so a server or its client may compute it beforehand and send it along:
`LoPA.encode`, `LoPA.instance_prompt`, and `SentPrompt` for what remains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import last_token, positions
from trainers.decoder.method import Weights
from trainers.methods.configs import LoPAConfig
from trainers.methods.prompt_tuning import SoftPrompt, initial_prompt


class LoPA(SoftPrompt):
    """The task prompt and the two heads.

    Tensors: ``prompt [P, D]``; for the head of U ``left_in_weight [D, H]``, ``left_in_bias [H]``, ``left_out_weight
    [H, P R]``, ``left_out_bias [P R]``; for that of V the same names with ``right`` and D R in place of P R.
    H is ``head_width``, or D.
    """

    config: LoPAConfig
    decayed = ("left_in_weight", "left_out_weight", "right_in_weight", "right_out_weight")
    learning_rate = 1e-3
    is_encoder = True

    @staticmethod
    def shapes(config: LoPAConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`."""
        return lopa_shapes(config, sizes.hidden_size, sizes.hidden_size)

    def reset_parameters(self) -> None:
        """Draw the prompt and the heads' weights from N(0, 0.02); the gate starts near one half."""
        for name in ("prompt", *self.decayed):
            nn.init.normal_(self.get_parameter(name), std=0.02)

    def learning_rate_factors(self) -> dict[str, float]:
        """The prompt's entries are of the size of embeddings and want larger steps than the heads."""
        return {"prompt": 10.0}

    def start(self, backbone: Any, tokenizer: Any, instruction: list[int]) -> None:
        """Begin with twice real tokens' embeddings, which the gate's one half then leaves as they are.

        See `trainers.methods.prompt_tuning.initial_prompt`; the factor is our choice.
        """
        initial = initial_prompt(self.config, self.config.prompt_length, backbone, tokenizer, instruction)
        if initial is not None:
            self.get_parameter("prompt").data.copy_(2 * initial)

    def encode(self, backbone: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
        """What the plain backbone makes of an instruction, as one vector a row.

        Args:
            backbone: the frozen causal LM.
            input_ids: ``[B, T]`` int64.
            mask: ``[B, T]``, nonzero at instruction tokens.

        Returns:
            ``[B, D]``, the hidden state after the final norm at each row's last instruction token.
        """
        mask = (mask != 0).long()
        output = backbone.base_model(  # without the LM head
            input_ids=input_ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        states = output.last_hidden_state  # [B, T, D]
        last = last_token(mask)[:, None, None].expand(-1, 1, states.shape[2])
        return states.gather(1, last)[:, 0]

    def instance_prompt(self, weights: Weights, encoding: Tensor) -> Tensor:
        """Z ``[B, P, D]`` of encodings ``[B, D]``: the paper's equations."""
        x = encoding.to(weights["prompt"].dtype)[:, None]  # [B, 1, D]
        left = head(weights, "left", x).unflatten(2, (self.config.prompt_length, self.config.rank))  # [B, 1, P, R]
        right = head(weights, "right", x).unflatten(2, (self.sizes.hidden_size, self.config.rank))  # [B, 1, D, R]
        return weights["prompt"] * torch.sigmoid(left @ right.transpose(2, 3)).squeeze(1)

    def prepare(self, weights: Weights, backbone: Any, input_ids: Tensor, mask: Tensor) -> Weights:
        """Read the instruction with the plain backbone, and add Z as ``prompts [B, P, D]``."""
        with torch.no_grad():
            encoding = self.encode(backbone, input_ids, mask)
        return {**weights, "prompts": self.instance_prompt(weights, encoding)}

    def soft_prompt(self, weights: Weights) -> Tensor:
        """Z, as `prepare` left it among the weights."""
        return weights["prompts"]

    def deployed(self) -> SentPrompt:
        """What the backbone's graphs need of it: a place for prompts that are computed elsewhere."""
        return SentPrompt(SentPromptConfig(prompt_length=self.config.prompt_length), self.sizes)


@dataclass(frozen=True, kw_only=True)
class SentPromptConfig:
    """The settings of a deployed LoPA."""

    prompt_length: int
    """Soft tokens (P)."""


class SentPrompt(SoftPrompt):
    """Prompts that come with the request. No tensors of its own; ``weights`` is ``{"prompts": [B, P, D]}``."""

    config: SentPromptConfig

    @staticmethod
    def shapes(config: SentPromptConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """None; see `trainers.decoder.method.Method.shapes`."""
        return {}

    def soft_prompt(self, weights: Weights) -> Tensor:
        """What came with the request."""
        return weights["prompts"]


def lopa_shapes(config: LoPAConfig, encoder_width: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes for an encoder of any width; here it is always the backbone's.

    The published settings pair a code encoder of width 1024 with a decoder of width 2560.
    """
    width = config.head_width or encoder_width
    shapes: dict[str, tuple[int, ...]] = {"prompt": (config.prompt_length, hidden_size)}
    for side, rows in (("left", config.prompt_length), ("right", hidden_size)):
        shapes[f"{side}_in_weight"] = (encoder_width, width)
        shapes[f"{side}_in_bias"] = (width,)
        shapes[f"{side}_out_weight"] = (width, rows * config.rank)
        shapes[f"{side}_out_bias"] = (rows * config.rank,)
    return shapes


def head(weights: Weights, side: str, x: Tensor) -> Tensor:
    """``x [B, 1, D]`` through the two-layer network of ``left`` or ``right``, as ``[B, 1, rows R]``."""
    hidden = torch.tanh(x @ weights[f"{side}_in_weight"] + weights[f"{side}_in_bias"][:, None])  # [B, 1, H]
    return hidden @ weights[f"{side}_out_weight"] + weights[f"{side}_out_bias"][:, None]
