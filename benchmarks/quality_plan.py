"""What `benchmarks/quality.py` trains: methods at matched budgets, tasks, rates, ablations, and in which order.

The budget is that of 100 soft tokens at SmolLM2-135M's width of 576, 57,600 numbers. Every method's fields are
chosen to come near it; prompt tuning with IAPT's own 4 tokens, or 8 times as many, cannot, and is named as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.decoder.method import Sizes
from trainers.methods.configs import (
    ADePTConfig,
    DePTConfig,
    IAPTConfig,
    LAMPConfig,
    LoPAConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    method_name,
)
from trainers.methods.forms import METHODS
from trainers.training.config import TrainConfig

BACKBONE = "SmolLM2-135M-Instruct"
SIZES = Sizes(
    hidden_size=576,
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    linears={"self_attn.q_proj": (576, 576), "self_attn.v_proj": (576, 192)},
)
"""SmolLM2-135M's, with the linears that LoRA changes here."""
NUM_PARAMETERS = 57_600
MAX_TOKENS = 80
"""Instruction tokens, enough for every text of at most `MAX_CHARACTERS` with its question."""
MAX_CHARACTERS = 180
"""Longer texts lose their end, which happens to most of Reuters and to few others."""
MAX_RESPONSE_TOKENS = 32


@dataclass(frozen=True)
class Variant:
    """A method with its fields, as one line of the tables."""

    label: str
    config: Any
    centre: float
    """Middle of the learning rates that are tried. Pinned here: a changed default must not orphan records."""
    is_matched: bool = True
    """Whether its parameters are meant to come near `NUM_PARAMETERS`."""

    @property
    def num_parameters(self) -> int:
        """Trained numbers on the backbone's sizes."""
        return count_parameters(self.config)


def count_parameters(config: Any) -> int:
    """Trained numbers that a method's configuration asks for on SmolLM2-135M."""
    shapes = METHODS[method_name(config)].shapes(config, SIZES)
    return sum(math.prod(shape) for shape in shapes.values())


IAPT = IAPTConfig(bottleneck=45)
METHOD_VARIANTS = (
    Variant("IAPT", IAPT, 3e-3),
    Variant("LoRA", LoRAConfig(rank=1, alpha=2.0), 1e-3),
    Variant("P-tuning v2", PrefixTuningConfig(prompt_length=5), 1e-2),
    Variant("ADePT", ADePTConfig(prompt_length=20, bottleneck=39), 3e-2),
    Variant("DePT", DePTConfig(prompt_length=20, rank=70, max_length=MAX_TOKENS), 3e-2),
    Variant("LoPA", LoPAConfig(prompt_length=10, rank=4, head_width=14), 1e-3),
    Variant("LAMP (our reading)", LAMPConfig(init_length=100, rank=85, window=5), 3e-3),
    Variant("Prompt tuning, 4 tokens", PromptTuningConfig(prompt_length=4), 1e-2, is_matched=False),
    Variant("Prompt tuning, 32 tokens", PromptTuningConfig(prompt_length=32), 1e-2, is_matched=False),
)
"""The main comparison. The last two have IAPT's number of soft tokens, and 8 times that."""
PROMPT_100 = Variant("Prompt tuning, 100 tokens", PromptTuningConfig(prompt_length=100), 1e-2)
"""The budget as plain prompt tuning; its length makes it too slow for the small plan."""

ABLATIONS: dict[str, tuple[tuple[str, IAPTConfig], ...]] = {
    "activation": (
        ("rational, learned", IAPT),
        *((name, dataclasses.replace(IAPT, activation=name)) for name in ("gelu", "relu", "silu", "tanh")),
    ),
    "pooling": (
        ("self-attention", IAPT),
        *((name, dataclasses.replace(IAPT, pooling=name)) for name in ("mean", "max")),
    ),
    "prompt length": tuple((str(n), dataclasses.replace(IAPT, prompt_length=n)) for n in (1, 2, 4, 8)),
    "input and start": (("normalised", IAPT), ("as it is", dataclasses.replace(IAPT, normalize=False))),
}
"""The paper's three and our choice of input, with the initial values that go with it; projections are shared by all
layers in all. IAPT itself is in each: it is trained once."""
SMALL_LEAVES_OUT = ("silu", "tanh")


@dataclass(frozen=True)
class Task:
    """A data set of `examples/prepare_data.py`, under the name that the tables show."""

    name: str
    title: str
    is_generation: bool = False


TASKS = (
    Task("movie-sentiment", "VADER movie snippets"),
    Task("sarcasm", "Sarcastic headlines"),
    Task("reuters-r8", "Reuters R8"),
    Task("alpaca-demo", "Alpaca-style answers", is_generation=True),
)
CLASSIFICATION = tuple(task.name for task in TASKS if not task.is_generation)
GENERATION = tuple(task.name for task in TASKS if task.is_generation)
TUNED_ON = "movie-sentiment"
ABLATED_ON = ("movie-sentiment", "sarcasm")
PHASES = ("baseline", "rates", "main", "generation", "ablations")


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured."""

    name: str
    steps: int
    seeds: int
    num_rates: int
    """Learning rates tried per method, each 3 times the one before."""
    train_rows: int
    validation_rows: int
    test_rows: int
    batch_size: int = 8
    warmup_steps: int = 10


BUDGETS = {
    "smoke": Budget("smoke", steps=2, seeds=1, num_rates=1, train_rows=1000, validation_rows=16, test_rows=16),
    "small": Budget("small", steps=60, seeds=2, num_rates=3, train_rows=2000, validation_rows=150, test_rows=300),
    "full": Budget("full", steps=1000, seeds=5, num_rates=5, train_rows=0, validation_rows=500, test_rows=1000),
}
"""``smoke`` shows that everything works, ``small`` is for 2 CPU cores, ``full`` for a GPU; 0 rows are all there are.
The generation task has fewer."""


@dataclass(frozen=True)
class Run:
    """One training with its evaluation, or, without a variant, an evaluation of the plain backbone."""

    phase: str
    task: str
    label: str
    config: Any
    """The method's fields; None for the plain backbone."""
    learning_rate: float
    seed: int
    split: str
    """``validation`` or ``test``: what it is evaluated on."""
    budget: Budget

    @property
    def train_config(self) -> TrainConfig:
        """The run's settings for `trainers.training.train.train`, without paths."""
        return TrainConfig(
            learning_rate=self.learning_rate,
            max_steps=self.budget.steps,
            batch_size=self.budget.batch_size,
            warmup_steps=min(self.budget.warmup_steps, self.budget.steps // 2),
            max_instruction_tokens=MAX_TOKENS,
            max_response_tokens=MAX_RESPONSE_TOKENS,
            prompt_format="chat",
            task="generation" if self.task in GENERATION else "classification",
            max_eval_examples=0,  # the split's file is the fixed sample; this would draw another one for each seed
            eval_batch_size=32,
            baseline=False,
            seed=self.seed,
            base_model_name=BACKBONE,
        )

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the outcome; what the run is called or wanted for is not among it.

        Of the configurations only what differs from the defaults, so that a new field with a neutral default
        orphans no record. Whoever changes what a default means deletes the records.
        """
        budget = self.budget
        rows = {"train": budget.train_rows, "validation": budget.validation_rows, "test": budget.test_rows}
        settings: dict[str, Any] = {"backbone": BACKBONE, "task": self.task, "split": self.split, "rows": rows}
        settings["characters"] = MAX_CHARACTERS
        if self.config is None:
            return {**settings, "method": None, "tokens": [MAX_TOKENS, MAX_RESPONSE_TOKENS]}
        train = changed_fields(self.train_config)
        return {**settings, "method": method_name(self.config), "fields": changed_fields(self.config), "train": train}

    @functools.cached_property
    def key(self) -> str:
        """Twelve hex digits over the settings: runs with equal keys are the same run."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """The run in a few words, for people."""
        if self.config is None:
            return f"{self.task} · plain backbone"
        return f"{self.task} · {self.label} · rate {self.learning_rate:.2g} · seed {self.seed}"


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from its class's defaults."""
    given = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {field.name: value for field, value in given if value != field.default}


def variants(budget: Budget) -> tuple[Variant, ...]:
    """The methods of the main comparison."""
    return (*METHOD_VARIANTS, PROMPT_100) if budget.name == "full" else METHOD_VARIANTS


def rates(variant: Variant, budget: Budget) -> tuple[float, ...]:
    """The learning rates that are tried for a method: as many for each, around its centre."""
    middle = budget.num_rates // 2
    return tuple(float(f"{variant.centre * 3.0 ** (index - middle):.3g}") for index in range(budget.num_rates))


def ablations(budget: Budget) -> dict[str, tuple[tuple[str, IAPTConfig], ...]]:
    """Name of an ablation to its (label, configuration) pairs."""
    if budget.name == "full":
        return ABLATIONS
    return {name: tuple(pair for pair in pairs if pair[0] not in SMALL_LEAVES_OUT) for name, pairs in ABLATIONS.items()}


def runs_of(phase: str, budget: Budget, chosen: Mapping[str, float]) -> list[Run]:
    """The runs of a phase, the most wanted first: a whole comparison per seed, then the next seed.

    Args:
        phase: one of `PHASES`.
        budget: how much.
        chosen: a variant's label to its learning rate; the centre where it is not yet chosen.
    """

    def run(task: str, variant: Variant, rate: float, seed: int, split: str = "test") -> Run:
        return Run(phase, task, variant.label, variant.config, rate, seed, split, budget)

    def best(variant: Variant) -> float:
        return chosen.get(variant.label, variant.centre)

    listed, seeds = variants(budget), range(budget.seeds)
    if phase == "baseline":
        return [Run(phase, task.name, "plain backbone", None, 0.0, 0, "test", budget) for task in TASKS]
    if phase == "rates":
        return [run(TUNED_ON, v, rate, 0, "validation") for v in listed for rate in rates(v, budget)]
    if phase in ("main", "generation"):
        tasks = CLASSIFICATION if phase == "main" else GENERATION
        return [run(task, v, best(v), seed) for seed in seeds for task in tasks for v in listed]
    assert phase == "ablations"
    found: dict[str, Run] = {}
    for seed in seeds:
        for task in ABLATED_ON:
            for name, pairs in ablations(budget).items():
                for label, config in pairs:
                    variant = Variant(f"{name}: {label}", config, METHOD_VARIANTS[0].centre)
                    made = run(task, variant, best(METHOD_VARIANTS[0]), seed)
                    found.setdefault(made.key, made)
    return list(found.values())


def all_runs(budget: Budget, chosen: Mapping[str, float]) -> list[Run]:
    """Every run of every phase once, in order."""
    found: dict[str, Run] = {}
    for phase in PHASES:
        for run in runs_of(phase, budget, chosen):
            found.setdefault(run.key, run)
    return list(found.values())
