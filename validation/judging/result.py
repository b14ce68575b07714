"""What validation finds, as plain data: the words of ``report.json`` and of the HTML page."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 2
NAMED_TENANTS = 3


@dataclass(frozen=True)
class Check:
    """One stage of one case held against its limits."""

    stage: str
    """A row of the tolerance table: ``generator``, ``prefill logits``, ``prefill cache``, ``decode logits``,
    ``decode cache``, ``greedy tokens`` or ``interface``."""
    case: str
    """What was fed: a name that can be read, such as ``batch 8, mixed tenants, left padding``."""
    passed: bool
    measured: dict[str, float]
    """Metric to figure, for example ``max_abs``, ``max_rel``, ``mean_abs``, ``cosine``, ``identical``."""
    limits: dict[str, float]
    """Metric to the limit that was applied."""
    detail: str = ""
    """Where the worst element lies, or why the check failed."""
    part: str = ""
    """``keys`` or ``values``, which a cache stage holds to its limits apart; else empty."""
    tenants: list[str] = field(default_factory=list)
    """Whose rows were fed; empty where none were."""

    @property
    def fed(self) -> str:
        """The case and its tenants, the first three by name."""
        more = len(self.tenants) - NAMED_TENANTS
        names = ", ".join(self.tenants[:NAMED_TENANTS]) + (f" and {more} more" if more > 0 else "")
        return f"{self.case} ({names})" if names else self.case


@dataclass(frozen=True)
class TokenRow:
    """Greedy tokens of one prompt, reference and target side by side."""

    tenant: str
    prompt: str
    reference: list[int]
    """Token ids that PyTorch chose."""
    target: list[int]
    """Token ids that the target chose."""
    reference_text: str
    """The reference's answer up to its end token; the tokens above go on past it."""
    target_text: str
    first_divergence: int | None
    """Step of the first differing token, None when all agree."""
    margin: float | None
    """Lead of the reference's best logit over its second at that step."""
    excused: bool
    """The margin is smaller than fp32's tolerance of logits: a tie, not an error."""


@dataclass(frozen=True)
class Finding:
    """The first tensor that differs from PyTorch's."""

    step: int
    """0 is prefill."""
    graph: str
    tensor: str
    """``model.layers.3.mlp.down_proj.output``, ``present.3.key``, ``past_key_values.3.key`` (what a step reads), ..."""
    layer: int | None
    """The decoder layer that it lies in; None before the first and after the last."""
    part: str
    """Which of the row's entries: ``prompt slots``, ``tokens``, ``older entries``, ``newest entry`` or ``logits``."""
    operators: list[str]
    """The graph's nodes that make it of tensors that agree, as ``MODULE/OPERATOR``; at most the last eight."""
    module: str
    """The PyTorch module that computes it."""
    row: int
    tenant: str
    source: str
    """``cache``, ``weight``, ``cast``, ``tenant``, ``position``, ``mask``, ``activation``, ``scale``, ``prompt`` or
    ``operator``."""
    evidence: str
    error: float
    """Largest difference over the largest value, of the worst entry."""
    limit: float
    own_error: float | None = None
    """The same for the module alone, given the target's own input."""


@dataclass(frozen=True)
class Bisection:
    """What looking inside a target's graphs gave."""

    case: str
    finding: Finding | None = None
    errors: list[tuple[str, int | None, float]] = field(default_factory=list)
    """Tensor, layer and worst error, in the order of the graph, at the last step that was looked at."""
    num_steps: int = 0
    """Steps that were looked at."""
    note: str = ""
    """Why nothing was found."""


@dataclass(frozen=True)
class TargetResult:
    """Everything that was found out about one target."""

    name: str
    dtype: str
    status: str
    """``pass``, ``fail``, or ``checked, not run`` where this machine cannot run the engine."""
    reason: str = ""
    """Why the target was not run, and what would run it."""
    checks: list[Check] = field(default_factory=list)
    by_layer: dict[str, list[float]] = field(default_factory=dict)
    """``prompt``, ``key``, ``value`` to the worst error of each layer, relative to the tensor's largest value."""
    by_step: list[float] = field(default_factory=list)
    """Worst relative logits error of each step; step 0 is prefill, the rest are decode steps."""
    histogram: dict[str, list[float]] = field(default_factory=dict)
    """``edges`` (log10 of the absolute logits error, one more than counts) and ``counts``."""
    tokens: list[TokenRow] = field(default_factory=list)
    seconds: float = 0.0
    """Time that the comparison took."""
    bisection: Bisection | None = None
    """Where a failing target first differs; also for a passing one that was asked for with ``--bisect``."""


@dataclass(frozen=True)
class Report:
    """A bundle's verdict with everything behind it."""

    bundle: str
    verdict: str
    """``pass`` or ``fail``."""
    backbone: str
    method: str
    tenants: list[str]
    seed: int
    created: str
    """UTC, ISO 8601; empty in a build's own report, so that equal inputs give equal bytes."""
    environment: dict[str, str]
    """Versions, processor, threads."""
    tolerances: list[dict[str, Any]]
    """The rows of the tolerance table that applied, with their reasons."""
    targets: list[TargetResult]
    command: str
    """How to run the comparison again."""
    depth: str = ""
    """How much was compared: ``quick``, ``standard``, ``full``, or ``case NAME``."""
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)
