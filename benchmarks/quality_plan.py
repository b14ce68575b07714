"""What `benchmarks/quality.py` trains: methods at matched budgets, tasks, rates, ablations, and in which order.

Every method's fields are chosen to come near one number of parameters. Another line of a table is another `Variant`;
more steps, seeds or rows are another `Budget`; what has a record already is not trained again.
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

from iapt_export.contract.prompt_format import PromptFormat
from trainers.decoder.backbone_sizes import Sizes
from trainers.methods import configs
from trainers.methods.forms import METHODS
from trainers.training.config import TrainConfig, Weights


@dataclass(frozen=True)
class BackbonePlan:
    """A frozen backbone on which methods are compared."""

    name: str
    sizes: Sizes
    """With the linear layers that LoRA changes here."""
    prompt_format: PromptFormat

    @property
    def num_parameters(self) -> int:
        """What methods are matched to: 100 soft tokens at its width."""
        return 100 * self.sizes.hidden_size


SMOLLM2 = BackbonePlan(
    "SmolLM2-135M-Instruct",
    Sizes(
        hidden_size=576,
        num_layers=30,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        linears={"self_attn.q_proj": (576, 576), "self_attn.v_proj": (576, 192)},
    ),
    "chat",
)
GEMMA = BackbonePlan(
    "gemma-3-270m",
    Sizes(
        hidden_size=640,
        num_layers=18,
        num_kv_heads=1,
        head_dim=256,
        vocab_size=262144,
        linears={f"self_attn.{name}_proj": (640, 1024 if name == "q" else 256) for name in ("q", "k", "v")},
    ),
    "newline",
)
"""Another architecture: sliding windows in most layers, one key head, norms behind as well as before, and no chat."""
MAX_TOKENS = 80
"""Instruction tokens, enough for every text of at most `MAX_CHARACTERS` with its question."""
MAX_CHARACTERS = 180
"""Longer texts lose their end, which happens to most of Reuters and to few others."""
MAX_RESPONSE_TOKENS = 32
PHASES = ("baseline", "rates", "main", "ablations", "rounded", "rational", "formats", "second-rates", "second")
ON_SECOND = PHASES[-3:]
"""Phases on the second backbone."""


@dataclass(frozen=True)
class Variant:
    """A method with its fields, as one line of the tables."""

    label: str
    config: Any
    centre: float
    """Middle of the learning rates that are tried. Pinned here: a changed default must not orphan records."""
    is_matched: bool = True
    """Whether its parameters are meant to come near the backbone's `BackbonePlan.num_parameters`."""
    backbone: BackbonePlan = SMOLLM2
    further: tuple[int, ...] = ()
    """Powers of 3 beyond budget ``small``'s rates that are tried too, since the best of those lay at their edge."""


IAPT = configs.IAPTConfig(bottleneck=45)
OWN = Variant("IAPT", IAPT, 3e-3)
VARIANTS = (
    OWN,
    Variant("LoRA", configs.LoRAConfig(rank=1, alpha=2.0), 1e-3, further=(2, 3)),
    Variant("P-tuning v2", configs.PrefixTuningConfig(prompt_length=5), 1e-2),
    Variant("ADePT", configs.ADePTConfig(prompt_length=20, bottleneck=39), 3e-2, further=(-2,)),
    Variant("DePT", configs.DePTConfig(prompt_length=20, rank=70, max_length=MAX_TOKENS), 3e-2, further=(2,)),
    Variant("LoPA", configs.LoPAConfig(prompt_length=10, rank=4, head_width=14), 1e-3),
    Variant("LAMP (our reading)", configs.LAMPConfig(init_length=100, rank=85, window=5), 3e-3, further=(2,)),
    Variant("Prompt tuning, 4 tokens", configs.PromptTuningConfig(prompt_length=4), 1e-2, is_matched=False),
    Variant("Prompt tuning, 32 tokens", configs.PromptTuningConfig(prompt_length=32), 1e-2, is_matched=False),
)
"""The main comparison. The last two have IAPT's number of soft tokens, and 8 times that."""

SECOND = (
    Variant("IAPT, Gemma", configs.IAPTConfig(bottleneck=47), 3e-3, backbone=GEMMA, further=(-2,)),
    Variant(
        "LoRA, Gemma",
        configs.LoRAConfig(rank=1, alpha=2.0, target_modules=("q_proj", "k_proj", "v_proj")),
        1e-3,
        backbone=GEMMA,
    ),
    Variant("P-tuning v2, Gemma", configs.PrefixTuningConfig(prompt_length=7), 1e-2, backbone=GEMMA, further=(2, 3)),
    Variant(
        "Prompt tuning, 32 tokens, Gemma",
        configs.PromptTuningConfig(prompt_length=32),
        1e-2,
        is_matched=False,
        backbone=GEMMA,
        further=(2,),
    ),
)
"""The comparison on the second backbone."""
NO_METHOD = Variant("plain backbone, Gemma", None, 0.0, backbone=GEMMA)
FORMATS: tuple[PromptFormat, ...] = ("plain", "newline")
FORMAT_SEEDS = 3
FORMATTED = SECOND[:2]
"""Methods that are trained in each of `FORMATS`: does an answer want a line of its own, without a chat template?"""

ABLATIONS: dict[str, dict[str, configs.IAPTConfig]] = {
    "activation": {
        "rational, learned": IAPT,
        **{name: dataclasses.replace(IAPT, activation=name) for name in ("gelu", "relu")},
    },
    "pooling": {"self-attention": IAPT, **{name: dataclasses.replace(IAPT, pooling=name) for name in ("mean", "max")}},
    "prompt length": {str(n): dataclasses.replace(IAPT, prompt_length=n) for n in (1, 2, 4, 8)},
    "input and start": {"normalised": IAPT, "as it is": dataclasses.replace(IAPT, normalize=False)},
}
"""The paper's three and our choice of input, with the initial values that go with it; projections are shared by all
layers in all. IAPT itself is in each: it is trained once."""


def _with(**fields: Any) -> configs.IAPTConfig:
    return dataclasses.replace(IAPT, **fields)


def _degrees(form: configs.RationalForm) -> dict[str, configs.IAPTConfig]:
    return {
        f"{m}, {n}": _with(numerator_degree=m, denominator_degree=n, rational_form=form)
        for m, n in ((1, 1), (2, 1), (3, 2), (5, 4), (7, 6), (8, 8))
    }


STARTS: tuple[configs.InitFunction, ...] = ("gelu", "relu", "silu", "tanh", "identity", "random")
RATIONAL: dict[str, dict[str, configs.IAPTConfig]] = {
    "degrees, form B": _degrees("B"),
    "degrees, form A": _degrees("A"),
    "start": {name: _with(init_function=name) for name in STARTS},
    "coefficients": {"learned": IAPT, "frozen": _with(coefficients="frozen")},
}
"""What the paper leaves open of its activation: degrees, where it starts, and whether learning it pays."""


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
TUNED_ON, ABLATED_ON = TASKS[0], TASKS[:2]
RATIONAL_ON = (TASKS[0], TASKS[2])
"""The two tasks on which seeds of one method differ least."""
SECOND_ON = RATIONAL_ON
SECOND_SEEDS = 3
ROUNDED_ON = (TASKS[2], TASKS[0])
"""First the one that tells methods apart."""
WEIGHTS: tuple[Weights, ...] = ("fp32", "int4")
"""Weights of the backbone on which each adapter is trained in the phase `rounded`, and on all of which it answers."""


ASKED = {"ablations": (ABLATIONS, ABLATED_ON), "rational": (RATIONAL, RATIONAL_ON)}
"""Phases that change IAPT, to the tables of each (a line's label to its configuration) and the tasks."""
COMPARED = {"rates": VARIANTS, "second-rates": SECOND}
"""Phases that try learning rates, to those that they try them for."""


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured; 0 rows are all there are."""

    name: str
    steps: int
    seeds: int
    num_rates: int
    """Learning rates tried per method, each 3 times the one before."""
    train_rows: int
    validation_rows: int
    test_rows: int

    @property
    def rows(self) -> dict[str, int]:
        """Split to rows."""
        return {"train": self.train_rows, "validation": self.validation_rows, "test": self.test_rows}


BUDGETS = {
    "smoke": Budget("smoke", steps=2, seeds=1, num_rates=1, train_rows=1000, validation_rows=16, test_rows=16),
    "small": Budget("small", steps=60, seeds=2, num_rates=3, train_rows=2000, validation_rows=150, test_rows=300),
    "full": Budget("full", steps=1000, seeds=5, num_rates=5, train_rows=0, validation_rows=500, test_rows=1000),
}
"""``smoke`` shows that everything works, ``small`` is for 2 CPU cores, ``full`` for a GPU."""


@dataclass(frozen=True)
class Run:
    """One training with its evaluation, or, without a configuration, an evaluation of the plain backbone."""

    phase: str
    task: Task
    label: str
    config: Any
    """The method's fields; None for the plain backbone."""
    learning_rate: float
    seed: int
    split: str
    """``validation`` or ``test``: what it is evaluated on."""
    budget: Budget
    backbone: BackbonePlan = SMOLLM2
    weights: Weights = "fp32"
    """Of the backbone, in training."""
    others: tuple[Weights, ...] = ()
    """Weights on which the adapter is evaluated as well: one training on one machine for all."""

    @property
    def train_config(self) -> TrainConfig:
        """The run's settings for training, without paths."""
        return TrainConfig(
            learning_rate=self.learning_rate,
            max_steps=self.budget.steps,
            batch_size=8,
            warmup_steps=min(10, self.budget.steps // 2),
            max_instruction_tokens=MAX_TOKENS,
            max_response_tokens=MAX_RESPONSE_TOKENS,
            prompt_format=self.backbone.prompt_format,
            task="generation" if self.task.is_generation else "classification",
            max_eval_examples=0,  # the split's file is the fixed sample; this would draw another one for each seed
            eval_batch_size=32,
            baseline=False,
            seed=self.seed,
            weights=self.weights,
            base_model_name=self.backbone.name,
        )

    @functools.cached_property
    def key(self) -> str:
        """Twelve hex digits over all that decides the outcome: runs with equal keys are the same run.

        Of the configurations only what differs from the defaults counts, so that a new field with a neutral default
        orphans no record. Whoever changes what a default means deletes the records.
        """
        settings: dict[str, Any] = {"backbone": self.backbone.name, "task": self.task.name, "split": self.split}
        settings["rows"] = self.budget.rows
        settings["characters"] = MAX_CHARACTERS
        if self.config is None:
            settings |= {"method": None, "tokens": [MAX_TOKENS, MAX_RESPONSE_TOKENS]}
            if self.backbone.prompt_format != SMOLLM2.prompt_format:
                settings["prompt_format"] = self.backbone.prompt_format
        else:
            train = changed_fields(self.train_config)
            settings |= {
                "method": configs.method_name(self.config),
                "fields": changed_fields(self.config),
                "train": train,
            }
            if self.others:
                settings["others"] = self.others
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def summary(self) -> dict[str, Any]:
        """What a record says of the run, for people; the key tells it apart from all others."""
        about: dict[str, Any] = {"key": self.key, "task": self.task.name, "split": self.split, "method": None}
        if self.config is not None:
            about |= {"method": configs.method_name(self.config), "fields": changed_fields(self.config)}
            about |= {"learning_rate": self.learning_rate, "seed": self.seed, "steps": self.budget.steps}
        if self.others:
            about["weights"] = self.weights
        return about


def count_parameters(config: Any, backbone: BackbonePlan = SMOLLM2) -> int:
    """Trained numbers that a method's configuration asks for on a backbone."""
    shapes = METHODS[configs.method_name(config)].shapes(config, backbone.sizes)
    return sum(math.prod(shape) for shape in shapes.values())


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from its class's defaults."""
    given = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {field.name: value for field, value in given if value != field.default}


def rates(variant: Variant, budget: Budget) -> tuple[float, ...]:
    """The learning rates tried for a method, ascending: as many for each around its centre, and its further ones."""
    middle = budget.num_rates // 2
    powers = {index - middle for index in range(budget.num_rates)}
    powers |= set(variant.further) if budget.name == "small" else set()
    return tuple(float(f"{variant.centre * 3.0**power:.3g}") for power in sorted(powers))


def runs_of(phase: str, budget: Budget, chosen: Mapping[str, float]) -> list[Run]:
    """The runs of a phase, each once and the most wanted first: a whole comparison per seed, then the next seed.

    Args:
        phase: one of `PHASES`.
        budget: how much.
        chosen: a variant's label to its learning rate; the centre where it is not yet chosen.
    """

    def run(task: Task, variant: Variant, seed: int, rate: float | None = None, split: str = "test") -> Run:
        found = chosen.get(variant.label, variant.centre) if rate is None else rate
        return Run(phase, task, variant.label, variant.config, found, seed, split, budget, variant.backbone)

    seeds = range(budget.seeds)
    if phase == "baseline":
        return [run(task, Variant("plain backbone", None, 0.0), 0) for task in TASKS]
    if phase in COMPARED:
        return [run(TUNED_ON, v, 0, rate, "validation") for v in COMPARED[phase] for rate in rates(v, budget)]
    if phase == "formats":
        fed = [dataclasses.replace(GEMMA, prompt_format=form) for form in FORMATS]
        untrained = [run(TUNED_ON, dataclasses.replace(NO_METHOD, backbone=b), 0, split="validation") for b in fed]
        trained = [dataclasses.replace(variant, backbone=b) for variant in FORMATTED for b in fed]
        return untrained + [run(TUNED_ON, v, n, v.centre, "validation") for n in range(FORMAT_SEEDS) for v in trained]
    if phase == "main":
        return [run(task, v, seed) for seed in seeds for task in TASKS for v in VARIANTS]
    if phase == "second":
        untrained = [run(task, NO_METHOD, 0) for task in SECOND_ON]
        return untrained + [run(task, v, n) for n in range(SECOND_SEEDS) for task in SECOND_ON for v in SECOND]
    if phase == "rounded":
        pairs = [(weights, tuple(other for other in WEIGHTS if other != weights)) for weights in WEIGHTS]
        plain = [run(task, v, seed) for task in ROUNDED_ON for seed in seeds for v in VARIANTS]
        return [dataclasses.replace(one, weights=own, others=others) for one in plain for own, others in pairs]
    asked, tasks = ASKED[phase]
    rate = chosen.get(OWN.label, OWN.centre)
    configs = dict.fromkeys(config for lines in asked.values() for config in lines.values())
    names = [Variant(f"ablation {changed_fields(config)}", config, OWN.centre) for config in configs]
    return [run(task, variant, seed, rate) for seed in seeds for task in tasks for variant in names]
