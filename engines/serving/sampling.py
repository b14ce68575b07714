"""Choose the next token: greedy, or temperature and nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iapt_export.contract.errors import IaptError

LEAST = (1e-2, 1e-4, 1e-7)
"""Least weight of the tokens that are sorted, the likeliest token's being 1; where they cover too little, the next."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        IaptError: a value is out of its range.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of a row's random numbers; the same seed and prompt give the same text whatever shares the batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            what = "negative" if self.temperature < 0 else "no finite number"
            raise IaptError(f"temperature {self.temperature} is {what}; use 0 for greedy, or a positive number")
        if not 0 < self.top_p <= 1:
            raise IaptError(f"top_p {self.top_p} is out of range; expected more than 0 and at most 1")
        if self.seed < 0:
            raise IaptError(f"seed {self.seed} is negative; expected 0 or more")


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """The next token of one row.

    Args:
        logits: ``[V]``, any float type.
        sampling: how to choose.
        random: the row's own generator.

    Raises:
        IaptError: the largest logit is NaN or infinite; minus infinity elsewhere rules a token out.
    """
    best = int(logits.argmax())  # NaN counts as the largest
    if not np.isfinite(logits[best]):
        raise IaptError(
            "its logits hold NaN or infinity; its weights, or sent prompts, may be too large for the target's type"
        )
    if sampling.temperature == 0:
        return best
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest tokens alone
        scaled = (logits.astype(np.float64) - np.float64(logits[best])) / sampling.temperature
    weights = np.exp(scaled)
    total, drawn = weights.sum(), random.random()
    whole = sampling.top_p == 1
    # of the whole distribution only what covers the draw is looked at, of a nucleus what covers top_p
    order = _likeliest(scaled, weights, total * (drawn if whole else sampling.top_p))
    covered = weights[order].cumsum()
    if not whole:
        # keep the tokens before which less than top_p is covered, so that at least one stays
        covered = covered[covered - weights[order] < sampling.top_p * total]
        total = covered[-1]
    place = np.searchsorted(covered, drawn * total, side="right")
    return int(order[min(int(place), len(covered) - 1)])


def _likeliest(scaled: np.ndarray, weights: np.ndarray, needed: float) -> np.ndarray:
    """Tokens from the likeliest on that cover more than ``needed``, or all; to sort all would take milliseconds."""
    for least in LEAST:
        tokens = np.flatnonzero(weights > least)
        if weights[tokens].sum() > needed:
            break
    else:
        tokens = np.arange(len(weights))
    return tokens[np.argsort(-scaled[tokens], kind="stable")]
