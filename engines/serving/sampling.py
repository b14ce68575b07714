"""Choose the next token: greedy, or temperature with top-k, min-p (arXiv 2407.01082) and nucleus (arXiv 1904.09751)."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from iapt_export.contract.errors import IaptError, shown

LEAST = (1e-2, 1e-4, 1e-7, 0.0)
"""Least weight of the tokens that are sorted, the likeliest token's being 1; where they cover too little, the next."""
BLOCK = 512
"""Weights that are added up at a time."""
DIVISORS = (1e-30, 1e30)
"""What fp32 can divide logits by: temperatures, below which only the likeliest tokens are left and above which all are
equally likely, and repetition penalties."""
MAX_PENALTY = 2.0
"""Largest presence and frequency penalty, either sign, as in OpenAI's protocol."""
MAX_BIAS = 100.0
MAX_WHOLE = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        IaptError: a value is out of its range.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to at least this, of those that the next two
    settings leave."""
    seed: int = 0
    """Seed of a row's random numbers; the same seed and prompt give the same text whatever shares the batch."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Sample from tokens that are at least this times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the instruction or the answer holds are divided by it, or multiplied where negative (Keskar
    et al. 2019, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Is taken from the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """The same for each time that the answer holds them."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to what is added to its logit."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not _is_number(value := getattr(self, name)):
                raise _wrong(name, f"is {shown(value)}, expected a number")
        for name in ("seed", "top_k"):
            value = getattr(self, name)
            if not is_whole(value) or abs(value) > MAX_WHOLE:
                raise _wrong(name, f"is {shown(value)}, expected a whole number")
        if not isinstance(self.logit_bias, Mapping):
            raise _wrong("logit_bias", f"is {shown(self.logit_bias)}, expected token ids to numbers")
        if not 0 <= self.temperature < float("inf"):
            what = "negative" if self.temperature < 0 else "no finite number"
            raise _wrong("temperature", f"{self.temperature} is {what}; use 0 for greedy, or a positive number")
        if not 0 < self.top_p <= 1:
            raise _wrong("top_p", f"{self.top_p} is out of range; expected more than 0 and at most 1")
        if self.seed < 0:
            raise _wrong("seed", f"{self.seed} is negative; expected 0 or more")
        if self.top_k < 0:
            raise _wrong("top_k", f"{self.top_k} is negative; expected 0 for all tokens, or how many")
        if not 0 <= self.min_p <= 1:
            raise _wrong("min_p", f"{self.min_p} is out of range; expected 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise _wrong("repetition_penalty", f"{self.repetition_penalty} is out of range; expected more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MAX_PENALTY <= getattr(self, name) <= MAX_PENALTY:
                raise _wrong(name, f"{getattr(self, name)} is out of range; expected {-MAX_PENALTY} to {MAX_PENALTY}")
        for token, bias in self.logit_bias.items():
            if not is_whole(token) or not (isinstance(bias, Real) and -MAX_BIAS <= bias <= MAX_BIAS):
                found = f"{shown(token)}: {shown(bias)}"
                raise _wrong("logit_bias", f"{found} is out of range; expected token ids to -100 to 100")

    @property
    def changes_logits(self) -> bool:
        """Whether logits depend on more than the model."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


def is_whole(value: Any) -> bool:
    """Whether it stands for a whole number; NumPy's arrays have ``__index__`` and most of them raise in it. True and
    False are a slip for something else.
    """
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_number(value: object) -> bool:
    """Whether NumPy can compute with it; Python has integers that no float holds."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return not (isinstance(value, int) and abs(value) > MAX_WHOLE)


def _wrong(name: str, text: str) -> IaptError:
    return IaptError(f"{name} {text}", field=name)


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
    # in fp32, whose exponential is many times as fast; sums in fp64
    temperature = np.float32(min(max(sampling.temperature, DIVISORS[0]), DIVISORS[1]))
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest tokens alone
        scaled = (logits.astype(np.float32) - np.float32(logits[best])) / temperature
    tokens = None
    if 0 < sampling.top_k < len(scaled):
        tokens = _largest(scaled, sampling.top_k)
        scaled = scaled[tokens]
    if sampling.min_p:
        tokens, scaled = _only(np.flatnonzero(scaled >= np.float32(np.log(sampling.min_p))), tokens, scaled)
    if sampling.top_p < 1:
        tokens, scaled = _only(_nucleus(scaled, sampling.top_p), tokens, scaled)
    place = _draw(np.exp(scaled), random.random())
    return place if tokens is None else int(tokens[place])


def log_probabilities(logits: np.ndarray, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """What the model gave a token, and the likeliest tokens: natural logarithms, before any setting of `Sampling`.

    Args:
        logits: ``[V]``, any float type.
        token: the one that was chosen.
        top: how many of the likeliest, the first of equals first.
    """
    values = logits.astype(np.float32)
    largest = values.max()
    total = np.exp(values - largest).sum(dtype=np.float64)
    exact = values.astype(np.float64) - (np.float64(largest) + np.log(total))
    if not top:
        return float(exact[token]), ()
    best = _largest(values, min(top, len(values)))
    best = best[np.argsort(-values[best], kind="stable")]
    return float(exact[token]), tuple(zip(best.tolist(), exact[best].tolist(), strict=True))


def _only(places: np.ndarray, tokens: np.ndarray | None, scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at some places among those that were left, and their logits."""
    return (places if tokens is None else tokens[places]), scaled[places]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest ``count`` values, in ascending order; to sort all would take milliseconds."""
    return _down_to(values, np.partition(values, len(values) - count)[len(values) - count], count)


def _nucleus(scaled: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the likeliest tokens before which less than ``top_p`` of the whole is covered, in ascending order."""
    weights = np.exp(scaled)
    needed = top_p * weights.sum(dtype=np.float64)
    for least in LEAST:
        likely = weights > least
        if weights[likely].sum(dtype=np.float64) > needed:
            break
    ordered = np.sort(scaled[likely])[::-1]
    covered = np.exp(ordered).astype(np.float64).cumsum()
    count = min(int(np.searchsorted(covered, needed)) + 1, len(covered))
    return _down_to(scaled, ordered[count - 1], count)


def _draw(weights: np.ndarray, drawn: float) -> int:
    """The place where ``drawn``, from 0 to 1, of the sum of weights is covered; by blocks, because adding up one by one
    takes longer than all else.
    """
    ends = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    needed = min(drawn * ends[-1], np.nextafter(ends[-1], 0))
    block = int(np.searchsorted(ends, needed, side="right"))
    inside = weights[block * BLOCK : (block + 1) * BLOCK].astype(np.float64)
    covered = inside.cumsum() + (ends[block - 1] if block else 0.0)
    place = int(np.searchsorted(covered, needed, side="right"))
    if place == len(covered):  # both sums are rounded; the last that has a weight
        place = int(np.flatnonzero(inside)[-1])
    return block * BLOCK + place


def _down_to(values: np.ndarray, least: np.floating, count: int) -> np.ndarray:
    """Places of ``count`` values from the largest to ``least``, the first of those that equal it."""
    taken = values > least
    equal = np.flatnonzero(values == least)
    taken[equal[: count - np.count_nonzero(taken)]] = True
    return np.flatnonzero(taken)
