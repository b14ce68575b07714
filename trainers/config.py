"""What a method and a training run are made of: frozen dataclasses, checked when they are made.

Standard library only, so that reading an adapter's configuration needs no torch.
The string below a field is its help text on the command line.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trainers.errors import IaptError

Activation = Literal["rational", "gelu", "relu", "silu", "tanh"]
CoefficientLearning = Literal["joint", "bilevel"]
InitFunction = Literal["gelu", "relu", "silu", "tanh", "leaky_relu"]
Pooling = Literal["attention", "mean", "max"]
Precision = Literal["fp32", "bf16"]
PromptFormat = Literal["auto", "chat", "plain"]
RationalForm = Literal["A", "B"]
Scheduler = Literal["linear", "cosine", "constant"]
Sharing = Literal["all", "none", "groups"]
Start = Literal["sink", "random"]
Task = Literal["auto", "classification", "generation"]

MAX_DEGREE = 8
"""Largest polynomial degree of a rational activation; beyond it fp32 Horner evaluation loses its accuracy."""


@dataclass(frozen=True, kw_only=True)
class IAPTConfig:
    """Instruction-Aware Prompt Tuning (arXiv 2405.18203), its settled parts and our choices for the open ones.

    Settled by the paper: the order down, pool, activate, up; self-attention pooling with learned
    queries; a learned rational activation; projections shared across layers; four soft tokens.
    Everything else here (degrees, form, bias, scale, bottleneck) is our choice.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    prompt_length: int = 4
    """Soft tokens per layer (P)."""
    bottleneck: int = 256
    """Width between the down- and the up-projection (R)."""
    numerator_degree: int = 5
    """Degree m of the rational activation's numerator."""
    denominator_degree: int = 4
    """Degree n of the rational activation's denominator."""
    rational_form: RationalForm = "B"
    """Denominator: A is 1 + sum |b_k x^k|, B is 1 + |sum b_k x^k|."""
    init_function: InitFunction = "gelu"
    """Function that the rational activation approximates before training."""
    pooling: Pooling = "attention"
    """How T instruction tokens become P rows: learned queries, or mean / max over P adaptive bins."""
    activation: Activation = "rational"
    """Learned rational activation, or a fixed one (an ablation of the paper)."""
    sharing: Sharing = "all"
    """Layers that share the two projections: all, none (each has its own), or groups of neighbours."""
    num_groups: int = 1
    """Number of groups when sharing is 'groups'."""
    bias: bool = True
    """Give both projections a bias."""
    scale: bool = False
    """Divide the pooling scores by sqrt(R)."""
    coefficients: CoefficientLearning = "joint"
    """Learn the activation's coefficients jointly, or bi-level on a held-out half of the data."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        for name, low, high in (
            ("prompt_length", 1, 1024),
            ("bottleneck", 1, 65536),
            ("numerator_degree", 1, MAX_DEGREE),
            ("denominator_degree", 1, MAX_DEGREE),
            ("num_groups", 1, 65536),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                problems.append(f"{name}={value!r} is not an integer from {low} to {high}")
        if self.sharing != "groups" and self.num_groups != 1:
            problems.append(f"num_groups={self.num_groups} needs sharing='groups', got sharing={self.sharing!r}")
        raise_problems("IAPT configuration", problems)

    def groups(self, num_layers: int) -> tuple[int, ...]:
        """The sharing group of each layer, as ``num_layers`` indices in ``range(G)``.

        Raises:
            IaptError: more groups than layers.
        """
        count = {"all": 1, "none": num_layers, "groups": self.num_groups}[self.sharing]
        if count > num_layers:
            raise IaptError(f"num_groups={count} is more than the backbone's {num_layers} layers; lower num_groups")
        return tuple(layer * count // num_layers for layer in range(num_layers))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: how long, how fast, on how much of the data, and what is written on the way.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    num_epochs: float = 3.0
    """Passes over the training data, unless max_steps says otherwise."""
    max_steps: int = 0
    """Optimiser steps; 0 leaves it to num_epochs."""
    batch_size: int = 8
    """Examples per device and step."""
    gradient_accumulation: int = 1
    """Batches summed into one optimiser step."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from zero."""
    scheduler: Scheduler = "linear"
    """How the learning rate falls after the warm-up: linear or cosine to zero, or constant."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    max_instruction_tokens: int = 512
    """Longer instructions lose the end of their input text; the chat template around it stays whole."""
    max_response_tokens: int = 256
    """Longer responses are cut, and then carry no end-of-sequence token. Labels are never cut."""
    prompt_format: PromptFormat = "auto"
    """chat: the instruction in the tokenizer's chat template; plain: text as it is; auto: chat where there is one."""
    task: Task = "auto"
    """classification scores the distinct responses as labels, generation measures loss; auto counts responses."""
    eval_file: str = ""
    """JSONL file to evaluate on; empty holds part of the training data out."""
    holdout: float = 0.1
    """Share of the training data held out when there is no eval_file."""
    max_eval_examples: int = 500
    """Evaluate on a fixed random sample of at most this many examples; 0 takes all."""
    eval_batch_size: int = 16
    """Examples per batch in evaluation."""
    baseline: bool = True
    """Evaluate the backbone without adapter as well, for the model card."""
    eval_steps: int = 0
    """Measure the evaluation loss every so many steps; 0 only at the end."""
    save_steps: int = 0
    """Write a checkpoint to resume from every so many steps; 0 writes none."""
    logging_steps: int = 10
    """Report loss and learning rate every so many steps."""
    report_to: str = "none"
    """Experiment tracker of the Hugging Face Trainer: tensorboard, wandb, mlflow, none, ..."""
    precision: Precision = "fp32"
    """fp32, or bf16 for the backbone and the products (the adapter's weights stay fp32)."""
    start: Start = "sink"
    """Initial prompts: along the backbone's attention sink (it starts near the plain backbone's loss), or random."""
    group_by_length: bool = True
    """Put examples of like length into one batch: less padding, same data."""
    resume: bool = False
    """Go on from the newest checkpoint of the same output."""
    seed: int = 0
    """Decides initial weights, order of the data, the held-out part and the evaluation sample."""
    base_model_name: str = ""
    """Name of the backbone to write into the adapter and its card; empty writes --model's value."""
    data_note: str = ""
    """A sentence on the data's origin, version and licence for the model card."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        for name in _AT_LEAST_ONE + _AT_LEAST_ZERO:
            value, least = getattr(self, name), 1 if name in _AT_LEAST_ONE else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.append(f"{name}={value!r} is not an integer of at least {least}")
        for name, low, high in (
            ("learning_rate", 0.0, 100.0),
            ("num_epochs", 0.0, 1e6),
            ("weight_decay", 0.0, 1e3),
            ("max_grad_norm", 0.0, 1e9),
            ("holdout", 0.0, 0.9),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                problems.append(f"{name}={value!r} is not a number from {low:g} to {high:g}")
        if not problems and self.max_steps == 0 and self.num_epochs == 0:
            problems.append("max_steps and num_epochs are both 0, so there is nothing to train; set one of them")
        raise_problems("training configuration", problems)


_AT_LEAST_ONE = (
    "batch_size",
    "gradient_accumulation",
    "max_instruction_tokens",
    "max_response_tokens",
    "eval_batch_size",
    "logging_steps",
)
_AT_LEAST_ZERO = ("max_steps", "warmup_steps", "max_eval_examples", "eval_steps", "save_steps", "seed")


def configs_from_fields(fields: dict[str, Any], source: str) -> tuple[IAPTConfig, TrainConfig]:
    """Sort one flat mapping of settings into the method's and the training run's configuration.

    Args:
        fields: field name to value, as a YAML file or the command line gives them; texts are converted.
        source: what the mapping was read from, for the error text.

    Raises:
        IaptError: a name that neither has, a text that is no number, or a value outside its range.
    """
    classes = (IAPTConfig, TrainConfig)
    types = {field.name: str(field.type) for cls in classes for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(types))
    if unknown:
        raise IaptError(f"{source}: unknown field {', '.join(unknown)}; known fields are {', '.join(sorted(types))}")
    values = {name: _converted(name, value, types[name], source) for name, value in fields.items()}
    chosen = [
        {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values} for cls in classes
    ]
    return IAPTConfig(**chosen[0]), TrainConfig(**chosen[1])


def read_train_file(path: str | Path) -> dict[str, Any]:
    """Read a flat YAML mapping of settings (``train.yaml``).

    Raises:
        IaptError: missing file, broken YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise IaptError(f"the settings file {path} does not exist; expected YAML with one 'field: value' per line")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IaptError(f"{path} is not YAML: {error}") from error
    if fields is not None and not isinstance(fields, dict):
        raise IaptError(f"{path} holds a {type(fields).__name__}; expected one 'field: value' per line")
    return dict(fields or {})


def field_help(cls: type[Any]) -> dict[str, str]:
    """Field name to the string that stands below the field in the source: its help text."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in itertools.pairwise(body.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[field.target.id] = str(text.value.value)
    return texts


def _converted(name: str, value: Any, kind: str, source: str) -> Any:
    """Turn a text into the field's type (YAML reads 1e-3 as text); other values pass, and the class checks them."""
    if not isinstance(value, str) or kind not in ("int", "float", "bool"):
        return value
    if kind == "bool":
        if value.lower() not in ("true", "false"):
            raise IaptError(f"{source}: {name}={value!r} is not true or false")
        return value.lower() == "true"
    try:
        return int(value) if kind == "int" else float(value)
    except ValueError:
        raise IaptError(f"{source}: {name}={value!r} is not {'an integer' if kind == 'int' else 'a number'}") from None


def config_from_dict(cls: type[Any], fields: dict[str, Any], source: str) -> Any:
    """Build a config dataclass from a mapping, refusing unknown names.

    Args:
        cls: the dataclass.
        fields: field name to value.
        source: what the mapping was read from, for the error text.

    Raises:
        IaptError: unknown fields, or values that ``cls`` refuses.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise IaptError(f"{source}: unknown field {', '.join(unknown)}; known fields are {', '.join(sorted(known))}")
    return cls(**fields)


def choice_problems(config: Any) -> list[str]:
    """One line for each ``Literal`` field whose value is not among its choices, each boolean that is none."""
    problems = []
    hints = {field.name: _resolve(field.type) for field in dataclasses.fields(config)}
    for name, hint in hints.items():
        value, choices = getattr(config, name), get_args(hint)
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            problems.append(f"{name}={value!r} is not one of {', '.join(choices)}")
        if hint is bool and not isinstance(value, bool):
            problems.append(f"{name}={value!r} is not true or false")
    return problems


def raise_problems(subject: str, problems: list[str]) -> None:
    """Raise one `IaptError` that lists every problem, or return when there is none."""
    if problems:
        raise IaptError(f"{subject}: " + "; ".join(problems))


def _resolve(annotation: Any) -> Any:
    return globals().get(annotation, {"bool": bool}.get(annotation)) if isinstance(annotation, str) else annotation
