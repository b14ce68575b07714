"""Hold a loaded backbone against transformers' own ``generate``: the verdict on its family read no numbers.

Of the families in `docs/models.md` a test does this on tiny models. Any other model comes here, with its real weights,
before anything is trained or exported.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from iapt_export.contract.errors import IaptError
from trainers.decoder.attention import stock_attention
from trainers.decoder.generate import decode, prefill
from trainers.decoder.method import rows_of

NUM_TOKENS, NUM_MISSING = 7, 4
"""Tokens of the prompt, and places of padding before it where it stands beside a longer one."""
LIMIT, LIMIT_IN_16_BITS = 0.01, 0.3
"""Largest difference of a logit, relative to the largest. Tiny models of all families stay below 1e-5, and below 0.02
in 16 bits; deeper ones round more often, and a mistake of positions or masks turns logits around."""


@torch.no_grad()
def check_own_answer(model: Any, name: str) -> None:
    """Compare the logits of two steps with ``generate``, alone and beside a longer row.

    Args:
        model: a causal LM of transformers with weights, which attends as `use_own_attention` lets it.
        name: for the error's text.

    Raises:
        IaptError: they differ, or ``generate`` cannot run it.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longer = torch.arange(NUM_MISSING + NUM_TOKENS)[None] * 7919 % vocabulary
    ids = longer[:, NUM_MISSING:]
    wanted = _generated(model, ids, name)
    padded = torch.cat([torch.cat([longer[:, :1].expand(1, NUM_MISSING), ids], dim=1), longer])
    mask = torch.ones_like(padded)
    mask[0, :NUM_MISSING] = 0
    limit = LIMIT if model.dtype == torch.float32 else LIMIT_IN_16_BITS
    for where, fed, seen in (("alone", ids, torch.ones_like(ids)), ("beside a longer row", padded, mask)):
        for step, (mine, theirs) in enumerate(zip(_ours(model, fed, seen, wanted[0]), wanted, strict=True)):
            error = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
            if math.isnan(error):
                raise IaptError(
                    f"{name} answers NaN or infinity to a prompt {where}, at step {step}: its weights hold such "
                    "numbers, or grow beyond its type; copy or convert the model again"
                )
            if error > limit:
                raise IaptError(
                    f"{name} is not supported: the logits of a prompt {where}, at step {step}, are {error:.2g} of the "
                    f"largest from those of transformers' own generate, expected at most {limit:g}; this model's code "
                    "reads positions or masks in a way that is not followed here. Families that work are in "
                    "docs/models.md"
                )


def _ours(model: Any, ids: Tensor, mask: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[V]`` of the first row's two steps; the second reads the likeliest token of ``first``."""
    rows = rows_of(None)
    logits, cache = prefill(model, rows, ids, mask)
    token = first.argmax().expand(len(ids))
    again = decode(model, rows, token, torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1), cache)
    return logits[0], again[0]


def _generated(model: Any, ids: Tensor, name: str) -> list[Tensor]:
    """Logits ``[V]`` of two greedy steps, by ``generate``."""
    with stock_attention(model), plain_generation(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        except Exception as error:  # whatever a model's own code raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise IaptError(f"{name} is not supported: transformers' own generate cannot run it: {reason}") from error
    return [step[0] for step in made.logits]


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Let ``generate`` take the likeliest tokens, whatever the checkpoint's settings say, while the context is open.

    A ``repetition_penalty`` or beams in ``generation_config.json`` would give other tokens than the model's own.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
