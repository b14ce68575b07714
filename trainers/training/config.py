"""What a training run is made of, frozen dataclasses that are checked when they are made; light to import.

The flags of ``iapt-export train`` are these fields, and the texts below them their help.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from iapt_export.contract.errors import IaptError, shown
from iapt_export.contract.low_bits import Rounding, rounding_of, rounding_problems
from iapt_export.contract.settings import choice_problems, raise_problems, range_problems, type_problems
from trainers.decoder.instruction import AskedFormat
from trainers.methods.configs import ADAPTER_CONFIGS, METHOD_CONFIGS, IAPTConfig

Precision = Literal["fp32", "bf16"]
Scheduler = Literal["linear", "cosine", "constant"]
Start = Literal["backbone", "random"]
Weights = Literal["fp32", "int8", "int4", "fp8", "nvfp4"]
Task = Literal["auto", "classification", "generation"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: how long, how fast, on how much of the data, and what is written on the way.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    learning_rate: float = 0.0
    """Peak learning rate of AdamW; 0 takes the method's own default."""
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
    """AdamW's weight decay, of an adapter's matrices; no prompts, biases or coefficients are decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    max_instruction_tokens: int = 512
    """Longer instructions lose the end of their input text; the chat template around it stays whole."""
    max_response_tokens: int = 256
    """Longer responses are cut, and then carry no end-of-sequence token. Labels are never cut."""
    prompt_format: AskedFormat = "auto"
    """How prompts are fed: in the chat template, as they are (plain), with a line break (newline); auto: by data."""
    task: Task = "auto"
    """classification scores the distinct responses as labels, generation measures loss; auto counts responses."""
    eval_file: str = ""
    """JSONL file to evaluate on; empty holds part of the training data out."""
    holdout: float = 0.1
    """Share of the training data held out when there is no eval_file."""
    max_eval_examples: int = 500
    """Evaluate on a fixed random sample of at most this many examples; 0 takes all."""
    example_prompts: int = 8
    """Held-out prompts kept beside the adapter, which build compares and copies into the bundle; 0 keeps none."""
    eval_batch_size: int = 16
    """Examples per batch in evaluation."""
    baseline: bool = True
    """Evaluate the backbone without adapter as well, for the model card."""
    eval_steps: int = 0
    """Measure the evaluation loss every so many steps; 0 only at the end."""
    save_steps: int = 100
    """Write a checkpoint to resume from every so many steps and at the last; 0 writes none."""
    logging_steps: int = 10
    """Report loss and learning rate every so many steps."""
    report_to: str = "none"
    """Experiment tracker of the Hugging Face Trainer: tensorboard (logs go to OUTPUT.runs), wandb, mlflow, none."""
    precision: Precision = "fp32"
    """fp32, or bf16 for the backbone and the products (the adapter's weights stay fp32)."""
    weights: Weights = "fp32"
    """Train on the backbone's weights as they are, or rounded as build stores them for targets of that type."""
    quantise: Annotated[str, Parameter(metavar="KEY=N,...")] = ""
    """Of rounded weights, as build takes it: block=64,head=8,narrow=4; empty for what their type has."""
    start: Start = "backbone"
    """Initial weights: where the method says that they hurt the backbone least, or random."""
    group_by_length: bool = True
    """Put examples of like length into one batch: less padding, same data."""
    resume: bool = False
    """Go on from the newest checkpoint of the same output; from the first step where there is none."""
    overwrite: bool = False
    """Replace the finished adapter at the output, when the new one is done."""
    seed: int = 0
    """Decides initial weights, order of the data, the held-out part and the evaluation sample."""
    revision: str = ""
    """Commit or branch of the backbone on the hub; empty takes the newest."""
    trust_remote_code: bool = False
    """Run code from the backbone's repository."""
    base_model_name: str = ""
    """Name of the backbone to write into the adapter and its card; empty writes --model's value."""
    data_note: str = ""
    """A sentence on the data's origin, version and licence for the model card."""

    def __post_init__(self) -> None:
        problems = choice_problems(self) + range_problems(
            self,
            learning_rate=(0.0, 100.0),
            num_epochs=(0.0, 1e6),
            weight_decay=(0.0, 1e3),
            max_grad_norm=(0.0, 1e9),
            holdout=(0.0, 0.9),
            **dict.fromkeys(_AT_LEAST_ONE, (1, math.inf)),
            **dict.fromkeys(_AT_LEAST_ZERO, (0, math.inf)),
        )
        problems += rounding_problems(self.quantise, self.weights)
        if self.quantise and self.weights == "fp32":
            problems.append("quantise is for rounded weights, and weights is fp32; give --weights int4 with it")
        if not problems and self.rounding and self.rounding.cache_type:
            problems.append(
                f"quantise={self.quantise} sets cache, and training has none; leave it out here, and give it to build"
            )
        if not problems and self.max_steps == 0 and self.num_epochs == 0:
            problems.append("max_steps and num_epochs are both 0, so there is nothing to train; set one of them")
        raise_problems("training configuration", problems)

    @property
    def rounding(self) -> Rounding | None:
        """What the weights are rounded to, for ONNX Runtime where it has the type; None where they are not."""
        targets = ("onnxruntime", "tensorrt-rtx")
        return next(filter(None, (rounding_of(target, self.weights, self.quantise) for target in targets)), None)


@dataclass(frozen=True)
class TrainPlaces:
    """Where an adapter comes from and goes to."""

    model: Annotated[str, Parameter(alias="-m", metavar="M")]
    """Hugging Face id, local folder, or GGUF file."""
    data: Annotated[str | Path, Parameter(metavar="FILE.jsonl")]
    """One example a line: instruction/input/output, prompt/completion, or messages."""
    output: Annotated[str | Path, Parameter(alias="-o", metavar="ADAPTER")]
    """Adapter directory to write."""


@dataclass(frozen=True)
class TrainRequest(TrainPlaces):
    """An adapter that is wanted: of which backbone, data and method, and how it is trained.

    Raises:
        IaptError: a field is of another type, or the activation has no coefficients that could be learned, or left, in
            the way that is asked for.
    """

    method: Any = field(default_factory=IAPTConfig)
    """The method's settings, one of `trainers.methods.configs`."""
    config: TrainConfig = field(default_factory=TrainConfig)
    """The run's settings."""

    def __post_init__(self) -> None:
        problems = type_problems(TrainPlaces, {name: getattr(self, name) for name in ("model", "data", "output")})
        if type(self.method) not in ADAPTER_CONFIGS.values():
            known = ", ".join(f"{kind.__name__}()" for kind in METHOD_CONFIGS.values())
            problems.append(f"method={shown(self.method)} is no method's settings; expected one of {known}")
        if not isinstance(self.config, TrainConfig):
            problems.append(f"config={shown(self.config)} is no TrainConfig; expected TrainConfig(max_steps=...)")
        raise_problems("train request", problems)
        learning, activation = (getattr(self.method, name, None) for name in ("coefficients", "activation"))
        if learning in ("bilevel", "frozen") and activation != "rational":
            raise IaptError(
                f"coefficients={learning!r} needs activation='rational', got {activation!r}, which has none; "
                f"leave coefficients out"
            )


_AT_LEAST_ONE = (
    "batch_size",
    "gradient_accumulation",
    "max_instruction_tokens",
    "max_response_tokens",
    "eval_batch_size",
    "logging_steps",
)
_AT_LEAST_ZERO = (
    "max_steps",
    "warmup_steps",
    "max_eval_examples",
    "example_prompts",
    "eval_steps",
    "save_steps",
    "seed",
)


DEEPEST_SETTINGS = 8
"""Levels of lists and mappings in a settings file; a field is a value, a list, or a mapping of values."""


def read_train_file(path: str | Path) -> dict[str, Any]:
    """Read a flat YAML mapping of settings (``train.yaml``); one without a value is as if it were not there.

    Raises:
        IaptError: missing file, broken YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise IaptError(f"the settings file {path} {what}; expected YAML with one 'field: value' per line")
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(yaml.parse(text), path)
        _check_names(yaml.compose(text, Loader=yaml.SafeLoader), path)
        fields = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # no text, a date or an integer that Python refuses
        raise IaptError(f"{path} is not YAML: {error}") from error
    if fields is not None and not isinstance(fields, dict):
        raise IaptError(f"{path} holds a {type(fields).__name__}; expected one 'field: value' per line")
    return {name: value for name, value in (fields or {}).items() if value is not None}


def _check_names(document: Any, path: Path) -> None:
    """Refuse a name that is given twice, of which PyYAML takes the last."""
    import yaml

    if not isinstance(document, yaml.MappingNode):
        return  # which the caller refuses
    names = [name.value for name, _ in document.value if isinstance(name.value, str)]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise IaptError(f"{path} gives {', '.join(doubles)} twice; leave one of them out")


def _check_depth(events: Iterable[Any], path: Path) -> None:
    """Refuse what PyYAML would build by recursion until the interpreter's own limit."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_SETTINGS:
            raise IaptError(
                f"{path} is nested deeper than {DEEPEST_SETTINGS} levels; expected one 'field: value' per line"
            )
