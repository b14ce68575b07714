"""What rounding needs to know of the numbers that a backbone computes: measured once, with random tokens.

How much each input of a matrix counts when it is rounded to 4 bits is the mean square of what the backbone feeds it.
A rounded weight's error is multiplied with its input, so it counts as much as that input is large. llama.cpp calls
these numbers an importance matrix; that inputs say more of it than the weights is the observation of AWQ (arXiv
2306.00978, section 3.1). They are taken from random tokens here, which need no text, no tenant and no language, and
served SmolLM2-135M's tenants better than an English text or their own prompts did; see docs/benchmarks.md.

A cache in 8 bits has a scale for each head of a layer's keys and of its values. It comes of the largest number there,
with room, because a text of 1,500 tokens and tenants' soft prompts have larger ones. One scale for all channels of a
head still holds when positions that were not measured rotate its keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import PAST
from iapt_export.contract.low_bits import Rounding
from trainers.decoder.family import cache_argument
from trainers.decoder.rounded import Importance, round_weights, rounded_weights

IMPORTANCE_FILE = "importance.safetensors"
"""Beside the graphs whose weights were rounded with it."""
LARGEST = 127
"""The largest whole number of 8 bits."""
ROWS, TOKENS = 4, 128
"""Of random tokens that are read. What half as many say of the inputs of SmolLM2's first two layers correlates by 0.89
and more with what 2,048 say."""
ROOM = 2.0
"""The largest number that a cache in 8 bits holds, over the largest that was measured. An English text of 1,500 tokens
had 2.1 times that in one of SmolLM2-135M's heads, soft prompts of the shipped adapters 2.2; in the median head 1.2 and
0.3."""


def uses_importance(model: nn.Module, rounding: Rounding | None) -> bool:
    """Whether something is rounded by what is measured: a matrix in 4 bits or the cache, for ONNX Runtime's operators.

    Args:
        model: its parameters need no values.
        rounding: of a target; None does not round.
    """
    if rounding is None or rounding.is_scaled:
        return False
    return bool(rounding.cache_type) or 4 in rounded_weights(model, rounding).values()


@torch.no_grad()
def importance_of(model: Any, *, cache: bool = False) -> Importance:
    """The mean square of each input of every linear layer, over random tokens.

    Args:
        model: a transformers model, also one of `trainers.decoder.streamed`; it computes in its own type.
        cache: measure the scales of a cache in 8 bits as well.

    Returns:
        Names of weights, every name of a tied one, to fp32 ``[K]``. A table that is no head has none; nor has a layer
        that no token reached, as an expert may be, or whose inputs were no numbers. With ``cache``, also
        ``past_key_values.N.key`` and ``.value`` to a scale for each channel ``[H K]``, those of a head alike.

    Raises:
        IaptError: keys or values are no numbers.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, inputs: Tensor) -> None:
        total, count = sums.get(name, (0, 0))
        squares = inputs.float().square().flatten(end_dim=-2)  # [B * T, K]
        sums[name] = (total + squares.sum(0), count + len(squares))

    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: note(f"{path}.weight", inputs[0]))
        for path, module in layers.items()
    ]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, table.num_embeddings, (ROWS, min(TOKENS, longest)), generator=draw).to(model.device)
    kept = DynamicCache() if cache else None  # of the model's own making, a layer with a window would keep no more
    try:
        # without the head, whose logits would take more memory than all else
        output = model.base_model(input_ids=ids, use_cache=cache, **cache_argument(model.base_model, kept))
    finally:
        for hook in hooks:
            hook.remove()
    for path, module in model.named_modules():
        if head is not None and getattr(module, "weight", None) is head.weight:
            note(f"{path}.weight", output.last_hidden_state)
    means = {name: total / count for name, (total, count) in sums.items()}
    found = {name: mean.cpu().numpy() for name, mean in means.items() if bool(mean.isfinite().all())}
    return found | (_cache_scales(kept) if cache else {})


def _cache_scales(cache: Any) -> dict[str, np.ndarray]:
    """Scales of keys and values ``[B, H, S, K]``, by the names of their buffers in graphs."""
    found = {}
    for number, layer in enumerate(cache.layers):
        for part, states in (("key", layer.keys), ("value", layer.values)):
            largest = states.float().abs().amax((0, 2, 3))  # [H]
            if not bool(largest.isfinite().all()):
                raise IaptError(
                    f"layer {number}: a {part} of random tokens is no number, so the cache has no scale in 8 bits; "
                    "leave cache=8 out"
                )
            # a head of zeros has no largest number, and any scale holds it
            scales = torch.where(largest == 0, 1, ROOM * largest / LARGEST)
            found[f"{PAST}{number}.{part}"] = scales.repeat_interleave(states.shape[-1]).cpu().numpy()
    return found


def round_as_exported(model: Any, rounding: Rounding) -> None:
    """Round a backbone's matrices in place as an export of it stores them."""
    round_weights(model, rounding, importance_of(model) if uses_importance(model, rounding) else {})


def save_importance(importance: Importance, names: set[str], folder: Path) -> None:
    """Write what the named weights were rounded with into a folder."""
    save_file({name: each for name, each in importance.items() if name in names}, folder / IMPORTANCE_FILE)


def load_importance(folder: Path) -> Importance:
    """What a folder's weights were rounded with; nothing where there is no such file, as in older bundles."""
    path = folder / IMPORTANCE_FILE
    return load_file(path) if path.is_file() else {}
