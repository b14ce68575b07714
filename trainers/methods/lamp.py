"""LAMP (Lan, Xu et al., arXiv 2502.12200), our reading of it, in one file: a prompt as truncated SVD, shortened.

    P0    = U diag(Q) V^T                   (truncated SVD of an initial prompt)        [s, D]
    W     = U diag(Q)                       (each row in the R kept directions)         [s, R]
    M     = W + W W^T W / ||W||_F^2         (tokens interact)                           [s, R]
    p     = mean over windows of k rows of M V^T                                        [P, D],  P = s / k
    input = concat(p, embeddings [T, D])

What public summaries of the paper state: a truncated SVD whose three factors U [s, R], Q [R], V^T [R, D] are all that
is trained, a compressed outer product by which tokens interact, and average pooling in blocks before the prompt is
prepended. Its equation of the compressed outer product, the pooling's width and the initial prompt were not available
to us: those three here are our choices, and so are the learning rates; no number got with them is the paper's
(docs/methods.md).

Our outer product has no parameters: W W^T [s, s] says how alike any two tokens are, and each token takes up the others
in that proportion. It is never built, since (W W^T) W = W (W^T W), an [R, R] matrix: that is its compression. Divided
by the trace of W^T W its eigenvalues lie in 0..1 and sum to 1, so M keeps the directions of the SVD and multiplies
each by 1 to 2: the prompt starts near the one that was decomposed, whatever its scale.

The prompt is the same for every input, so it is computed beforehand, and prompt tuning remains: `LAMP.deployed`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iapt_export.contract.errors import IaptError
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.method import Weights
from trainers.methods.configs import LAMPConfig, PromptTuningConfig
from trainers.methods.prompt_tuning import PromptTuning, SoftPrompt, initial_prompt

LEAST_SQUARE = 1e-12
"""Stands for the sum of squares of a prompt that is all zeros."""


class LAMP(SoftPrompt):
    """Three tensors: ``left [s, R]`` (U), ``singular [R]`` (Q) and ``right [R, D]`` (V^T)."""

    config: LAMPConfig
    decayed = ("left", "right")
    learning_rate = 1e-2

    @staticmethod
    def shapes(config: LAMPConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `trainers.decoder.method.Method.shapes`.

        Raises:
            IaptError: more singular values than the backbone's hidden width has.
        """
        if config.rank > sizes.hidden_size:
            raise IaptError(
                f"rank={config.rank} is more than the backbone's hidden width of {sizes.hidden_size}; lower rank"
            )
        return {
            "left": (config.init_length, config.rank),
            "singular": (config.rank,),
            "right": (config.rank, sizes.hidden_size),
        }

    def reset_parameters(self) -> None:
        """Decompose a prompt drawn from N(0, 0.02)."""
        self._decompose(torch.randn(self.config.init_length, self.sizes.hidden_size) * 0.02)

    def learning_rate_factors(self) -> dict[str, float]:
        """Singular values are much larger than the entries of the orthonormal factors."""
        return {"singular": 10.0}

    def start(self, backbone: Any, tokenizer: Any, instruction: list[int]) -> None:
        """Decompose real tokens' embeddings, see `trainers.methods.prompt_tuning.initial_prompt`."""
        initial = initial_prompt(self.config, self.config.init_length, backbone, tokenizer, instruction)
        if initial is not None:
            self._decompose(initial)

    @torch.no_grad()
    def _decompose(self, prompt: Tensor) -> None:
        """Set the factors to the largest singular values of ``prompt [s, D]`` and their vectors."""
        factors = torch.linalg.svd(prompt, full_matrices=False)  # [s, min], [min], [min, D]
        rank = self.config.rank
        kept = (factors[0][:, :rank], factors[1][:rank], factors[2][:rank])
        for name, values in zip(("left", "singular", "right"), kept, strict=True):
            self.get_parameter(name).copy_(values)

    def soft_prompt(self, weights: Weights) -> Tensor:
        """The prompt ``[1 or B, P, D]`` that the factors describe."""
        coordinates = weights["left"] * weights["singular"][:, None]  # W [B, s, R]
        gram = coordinates.transpose(1, 2) @ coordinates  # [B, R, R]
        square = coordinates.square().sum(dim=(1, 2), keepdim=True).clamp(min=LEAST_SQUARE)
        mixed = coordinates + coordinates @ (gram / square)  # M [B, s, R]
        # the mean is linear: taken before V^T it costs s R instead of s D
        pooled = mixed.unflatten(1, (self.config.prompt_length, self.config.window)).mean(dim=2)  # [B, P, R]
        return pooled @ weights["right"]

    @torch.no_grad()
    def deployed(self) -> PromptTuning:
        """Prompt tuning with the prompt that the factors describe."""
        constant = PromptTuning(PromptTuningConfig(prompt_length=self.config.prompt_length), self.sizes)
        constant.load_state_dict({"prompt": self.soft_prompt(self.weights())[0]}, assign=True)
        return constant
