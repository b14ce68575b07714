"""Which of a few settings ``--quantise auto`` takes: those that are worth measuring, and the rule that chooses.

`iapt_export.building.rounding_search` measures them; nothing here computes with a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import VALUES, in_words, rounding_of
from iapt_export.contract.manifest import write_atomically
from iapt_export.contract.schema import parse_json
from trainers.decoder.rounded import rounded_weights

RECORD_FILE = "search.json"
"""What a search measured, in its stage's folder."""
MARGIN = 0.02
"""How many more of the answers' tokens than with the type's own settings may differ from PyTorch's, as a share: what
chance alone moves a task's right answers by among 200 examples, with a standard error of 0.02 to 0.03."""
Z = 1.645
"""Of the normal distribution: a loss is larger than its bound in one case of 20."""
TIE = 0.03
"""Settings whose speeds differ by less are equally fast: medians of alternating rounds repeat so well."""
FEWEST = math.ceil(Z**2 * (1 / MARGIN - 1))
"""Answer tokens with which a setting can be taken at all, where none differs."""


def candidates(dtype: str, model: Any) -> list[str]:
    """Settings for a backbone, as ``--quantise`` takes them: the type's own first, each once.

    Every size of blocks alone, and in int4 the parts that are stored in 8 bits in 4, one by one and together, with
    blocks of 64 where the shapes allow them: those that lie between the others are left out.

    Args:
        dtype: ``int8`` or ``int4``.
        model: the backbone; its parameters need no values.

    Raises:
        IaptError: the shapes leave nothing to choose.
    """
    blocks = [size for size in VALUES["block"] if _stored(dtype, f"block={size}", model)]
    middle = "block=64" if 64 in blocks else "block=32"
    parts = ("head=4", "narrow=4", "head=4,narrow=4") if dtype == "int4" else ()
    found: dict[tuple[Any, ...], str] = {}
    for text in [f"block={size}" for size in blocks] + [f"{middle},{part}" for part in parts]:
        rounding = rounding_of("onnxruntime", dtype, text)
        assert rounding is not None
        found.setdefault(_stored(dtype, text, model), rounding.quantise)  # bits of a part that is not there change none
    if len(found) < 2:
        raise IaptError(
            f"--quantise auto: this backbone's shapes allow {dtype} in blocks of 32 alone, so there is nothing to "
            "choose; leave it out"
        )
    return list(found.values())


def _stored(dtype: str, quantise: str, model: Any) -> tuple[Any, ...]:
    """What decides the stored bytes; empty where the blocks do not divide a matrix."""
    rounding = rounding_of("onnxruntime", dtype, quantise)
    assert rounding is not None
    try:
        return (rounding.block, *sorted(rounded_weights(model, rounding).items()))
    except IaptError:
        return ()


@dataclass(frozen=True)
class Measured:
    """What a setting gave."""

    quantise: str
    """As the manifest has it; empty for the type's own settings."""
    bytes: int
    """Of the graphs and their weights."""
    seconds: dict[int, list[float]]
    """Rows that step together to a decode step's median in each round; all settings took part in each."""
    agreed: dict[str, list[bool]]
    """Tenant to whether the likeliest token was PyTorch's, for each token of its answers in one order."""
    kl: float | None
    """Mean Kullback-Leibler divergence from PyTorch's next tokens, in nats; None where it is no number."""

    @property
    def tokens(self) -> list[bool]:
        """`agreed` over all tenants."""
        return [each for tokens in self.agreed.values() for each in tokens]


@dataclass(frozen=True)
class Judged:
    """A setting beside the type's own."""

    measured: Measured
    speed: float
    """Tokens a second over those of the type's own settings: the geometric mean over the numbers of rows."""
    agreement: float
    max_loss: float
    """Bound of how much less it agrees, over all tenants."""
    worse: tuple[str, ...]
    """Tenants of whose own tokens it certainly loses more than `MARGIN`."""

    @property
    def is_accepted(self) -> bool:
        """Whether it answers as the type's own settings do, as far as was measured."""
        return self.max_loss <= MARGIN and not self.worse and self.measured.kl is not None


@dataclass(frozen=True)
class Search:
    """All that was measured, and what follows from it."""

    dtype: str
    num_prompts: int
    settings: list[Measured]
    """The type's own first."""

    @property
    def judged(self) -> list[Judged]:
        """Each beside the first."""
        return [judge(self.settings[0], each) for each in self.settings]

    @property
    def chosen(self) -> str:
        """The fastest of those that are accepted; of those that are as fast, the nearest to PyTorch."""
        first, *others = self.judged
        able = [first, *(each for each in others if each.is_accepted)]
        best = max(each.speed for each in able)
        fast = [each for each in able if each.speed * (1 + TIE) >= best]
        return min(fast, key=lambda each: math.inf if each.measured.kl is None else each.measured.kl).measured.quantise

    def save(self, folder: Path) -> None:
        """Write `RECORD_FILE`."""
        write_atomically(folder / RECORD_FILE, json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def load(cls, folder: Path) -> Search:
        """Read it."""
        fields = parse_json((folder / RECORD_FILE).read_bytes())
        settings = []
        for each in fields["settings"]:
            seconds = {int(rows): rounds for rows, rounds in each["seconds"].items()}  # JSON has texts as keys
            settings.append(Measured(**{**each, "seconds": seconds}))
        return cls(fields["dtype"], fields["num_prompts"], settings)

    @classmethod
    def found(cls, folder: Path | None) -> Search | None:
        """`load` from a folder that nobody has looked into; None where there is none, or where it is damaged."""
        if folder is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return cls.load(folder)
        return None

    def text(self) -> str:
        """A table for people, and what was chosen and why."""
        tokens, rows = len(self.settings[0].tokens), list(self.settings[0].seconds)
        head = [
            "--quantise",
            "MB",
            *(f"tokens/s, {_rows(count)}" for count in rows),
            "speed",
            "agreement",
            "KL",
            "loss",
        ]
        lines = [head, *(self._line(each, is_first=not number) for number, each in enumerate(self.judged))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        limit = f"with 95 % confidence loses at most {100 * MARGIN:.0f} points of agreement"
        chosen = f"{self.dtype} as it is: nothing faster {limit}"
        if self.chosen:
            chosen = f"{in_words(self.dtype, self.chosen)}, the fastest that {limit}"
        return "\n".join(
            [
                f"{self.dtype} beside PyTorch in fp32: {tokens} answer tokens of {self.num_prompts} example prompts",
                *table,
                f"chosen: {chosen}",
            ]
        )

    @property
    def doubt(self) -> str:
        """Why nothing but the type's own settings could be chosen, if there were too few tokens; else nothing."""
        tokens = len(self.settings[0].tokens)
        if tokens >= FEWEST:
            return ""
        return (
            f"--quantise auto had {tokens} answer tokens to compare, and takes other settings than {self.dtype}'s own "
            f"from {FEWEST} on; give the adapters more example prompts (train --example-prompts, or lines of "
            "examples.jsonl)"
        )

    def _line(self, judged: Judged, *, is_first: bool) -> list[str]:
        each = judged.measured
        rates = [f"{rows / statistics.median(rounds):.1f}" for rows, rounds in each.seconds.items()]
        loss = "" if is_first else f"at most {100 * judged.max_loss:.1f}"
        loss += f" ({', '.join(judged.worse)} worse)" if judged.worse else ""
        mark = "* " if each.quantise == self.chosen else "  "
        kl = "no number" if each.kl is None else f"{each.kl:.4f}"
        name, agreement = each.quantise or f"({self.dtype}'s own)", f"{judged.agreement:.3f}"
        return [mark + name, f"{each.bytes / 1e6:.1f}", *rates, f"{judged.speed:.2f}", agreement, kl, loss]


def judge(own: Measured, other: Measured) -> Judged:
    """Hold a setting against the type's own."""
    ratios = [
        statistics.median(mine / theirs for mine, theirs in zip(own.seconds[rows], rounds, strict=True))
        for rows, rounds in other.seconds.items()
    ]
    _, most = loss_bounds(own.tokens, other.tokens)
    worse = [name for name, tokens in other.agreed.items() if loss_bounds(own.agreed[name], tokens)[0] > MARGIN]
    agreement = sum(other.tokens) / len(other.tokens)
    return Judged(other, statistics.geometric_mean(ratios), agreement, most, tuple(worse))


def loss_bounds(own: list[bool], other: list[bool]) -> tuple[float, float]:
    """By how much less the other agrees, as a share of the tokens: beyond either bound in one case of 20 by chance.

    Tango's score interval for paired proportions (Statistics in Medicine 17, 1998, 891), made to show that something is
    no worse; it holds for few tokens too, and for none that differ. Tokens count as drawn one by one.
    """
    lost = sum(mine and not theirs for mine, theirs in zip(own, other, strict=True))
    gained = sum(theirs and not mine for mine, theirs in zip(own, other, strict=True))
    return -_most(gained, lost, len(own)), _most(lost, gained, len(own))


def _most(lost: int, gained: int, count: int) -> float:
    """The largest loss with which so small a one may still be seen."""
    low, high = (lost - gained) / count, 1.0
    for _ in range(50):
        loss = (low + high) / 2
        linear = (2 * count - lost + gained) * loss - lost - gained
        root = math.sqrt(linear**2 + 8 * count * gained * loss * (1 - loss))
        likely = (root - linear) / (4 * count)  # how often it gains, if that is the loss
        error = math.sqrt(count * max(0.0, 2 * likely + loss * (1 - loss)))
        if count * loss - (lost - gained) > Z * error:
            high = loss
        else:
            low = loss
    return high


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
