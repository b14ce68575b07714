"""The model card: what was trained on what, with which command, and how well it does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

from iapt_export.contract.low_bits import in_words
from iapt_export.contract.prompt_format import HOW
from iapt_export.contract.settings import summary_of
from trainers.adapters.adapter import EXAMPLES_FILE, AdapterConfig
from trainers.methods.configs import DEFAULT_METHOD, flag_name
from trainers.methods.forms import METHODS
from trainers.training.config import TrainConfig
from trainers.training.evaluate import ClassificationReport, Report

CARD_FILE = "README.md"
CURVE_FILE = "training.svg"
REPORT_FILE = "evaluation.json"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")
"""Whose versions the card names."""
PROMPTS_NOTE = (
    f"`{EXAMPLES_FILE}` holds prompts, texts without answers: `iapt-export build` compares this adapter with PyTorch "
    "on them and copies them into the bundle. Whoever gets the adapter or the bundle can read them."
)

EXPLAINED = (
    "In iapt-export's documentation, `docs/methods.md` explains the method and "
    "`docs/reference/files.md#an-adapter` the files of this folder."
)


@dataclass(frozen=True)
class Run:
    """What the card tells."""

    adapter: AdapterConfig
    config: TrainConfig
    model_name: str
    """The backbone as it was asked for."""
    data: str
    """The training file as it was asked for."""
    training_size: int
    """Examples trained on."""
    steps: int
    seconds: float
    history: list[tuple[int, float]]
    """(step, loss)"""
    report: Report | None
    baseline: Report | None
    output: str
    """The adapter directory as it was asked for."""
    command: str | None = None
    """The command to show; None puts it together from the settings."""
    seen: int = 0
    """Of the examples to evaluate on, those that were trained on."""
    notes: Sequence[str] = ()
    """What of the data no model saw: a sentence each."""


def write_card(folder: Path, run: Run) -> None:
    """Write ``README.md``, ``evaluation.json`` and ``training.svg`` into ``folder``."""
    scores = {
        "adapter": run.report.to_dict() if run.report else None,
        "baseline": run.baseline.to_dict() if run.baseline else None,
    }
    (folder / REPORT_FILE).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if run.history:
        (folder / CURVE_FILE).write_text(_curve(run.history), encoding="utf-8")
    (folder / CARD_FILE).write_text(_text(run, (folder / EXAMPLES_FILE).is_file()), encoding="utf-8")


def command_line(run: Run) -> str:
    """The ``iapt-export train`` call of a run, with every setting that is not a default and no absolute path."""
    words = ["iapt-export", "train", "--model", _relative(run.model_name), "--data", _relative(run.data)]
    words += ["--output", _relative(run.output)]
    method = run.adapter.method
    if (name := flag_name(run.adapter.peft_type)) != DEFAULT_METHOD:
        words += ["--method", name]
    for config in (method, run.config):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value == field.default or field.name in ("resume", "overwrite", "data_note"):
                continue
            words += [
                "--" + field.name.replace("_", "-"),
                _relative(value) if field.name == "eval_file" else _shown(value),
            ]
    return shlex.join(words)


def _text(run: Run, has_prompts: bool) -> str:
    name, system = PurePath(run.output).name, run.adapter.system_prompt
    base = _relative(run.adapter.base_model_name_or_path)
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    source = _relative(run.config.eval_file) or f"{run.config.holdout:.0%} of the data, held out"
    parts = [
        f"---\nbase_model: {base}\nlibrary_name: iapt-export\npipeline_tag: text-generation\n"
        "tags:\n" + "".join(f"- {tag}\n" for tag in _tags(run)) + "---",
        f"# {name}",
        f"An adapter for `{base}`. The backbone stayed frozen.",
        "## Method",
        _method(run),
        "## Results",
        _results(run),
        "## Data",
        f"Training: `{_relative(run.data)}`, {run.training_size:,} examples. Evaluation: `{source}`"
        + (f", {run.report.count:,} examples" if run.report else "")
        + _overlap(run)
        + "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in run.notes)
        + (f"\n\n{run.config.data_note}" if run.config.data_note else ""),
        *([PROMPTS_NOTE] if has_prompts else []),
        "## Training",
        f"```sh\n{run.command or command_line(run)}\n```",
        f"{run.steps:,} steps of batch {run.config.batch_size * run.config.gradient_accumulation}, "
        f"seed {run.config.seed}, {run.config.precision}{_weights(run)}, "
        f"{run.seconds / 60:.0f} minutes. Versions: {versions}.",
    ]
    if run.history:
        parts.append(f"![Training loss]({CURVE_FILE})")
    parts += [
        "## Use",
        f"```sh\niapt-export build --model {_relative(run.model_name)} --adapter {_relative(run.output)} "
        "--output bundle\n```",
        f"Prompts are given as in training, in the `{run.adapter.prompt_format}` format "
        f"({HOW[run.adapter.prompt_format]})."
        + (f" Each began with the system prompt {json.dumps(system, ensure_ascii=False)}." if system else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _examples(run: Run) -> str:
    assert run.report is not None
    return f"{run.report.count:,} {'' if run.seen else 'held-out '}examples"


def _overlap(run: Run) -> str:
    if not run.seen:
        return ", none of them seen in training."
    return f". **{run.seen:,} of them were trained on as well**, so the scores say less of texts that it has not seen."


def _weights(run: Run) -> str:
    rounded = in_words(run.adapter.weights, run.adapter.quantise)
    return "" if run.adapter.weights == "fp32" else f" over weights rounded to {rounded}"


def _tags(run: Run) -> list[str]:
    own = flag_name(run.adapter.peft_type)
    return [own, "prompt-tuning"] if run.adapter.method.prompt_length and own != "prompt-tuning" else [own]


def _method(run: Run) -> str:
    """The method in a sentence with its paper, how much was trained, and every setting."""
    adapter = run.adapter
    shapes = METHODS[adapter.peft_type].shapes(adapter.method, adapter.sizes)
    count = sum(prod(shape) for shape in shapes.values())
    settings = ((field.name, getattr(adapter.method, field.name)) for field in dataclasses.fields(adapter.method))
    length = adapter.method.prompt_length
    slots = f" {length} cache entries stand before the instruction." if length else ""
    return "\n".join(
        [
            summary_of(type(adapter.method)),
            EXPLAINED,
            "",
            f"{count:,} trained parameters.{slots}",
            "",
            "| setting | |\n|---|---|",
            *(f"| `{name}` | {_shown(value) or 'empty'} |" for name, value in settings),
        ]
    )


def _shown(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _results(run: Run) -> str:
    if isinstance(run.report, ClassificationReport):
        zero_shot = run.baseline.accuracy if isinstance(run.baseline, ClassificationReport) else None
        rows = [
            "| | accuracy |\n|---|---|",
            f"| this adapter | {run.report.accuracy:.3f} |",
            *([f"| zero-shot (the backbone alone, same prompt) | {zero_shot:.3f} |"] if zero_shot is not None else []),
            f"| always the most frequent label | {run.report.majority_accuracy:.3f} |",
            "",
            f"On {_examples(run)}. The answer is the label with the highest likelihood, "
            "its end-of-sequence token included.",
            "",
            "| label | recall |\n|---|---|",
            *(f"| {_in_a_cell(label)} | {recall:.3f} |" for label, recall in run.report.recall.items()),
        ]
        return "\n".join(rows)
    if run.report is None:
        return "Not evaluated."
    rows = ["| | loss per token | perplexity |\n|---|---|---|"]
    for name, report in (("this adapter", run.report), ("the backbone alone", run.baseline)):
        if report is not None and not isinstance(report, ClassificationReport):
            rows.append(f"| {name} | {report.loss:.4f} | {report.perplexity:.2f} |")
    return "\n".join([*rows, "", f"On {_examples(run)}."])


def _in_a_cell(text: str) -> str:
    """A text as a cell of a table has it: on one line, without a bar that ends the cell."""
    return text.replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def _curve(history: list[tuple[int, float]]) -> str:
    """The loss over steps as a small SVG, the same text for the same numbers."""
    width, height, left, top = 560, 240, 44, 12
    steps, losses = [step for step, _ in history], [loss for _, loss in history]
    highest = max(losses)

    def place(step: float, loss: float) -> str:
        across = (step - steps[0]) / max(steps[-1] - steps[0], 1)
        return f"{left + across * (width - left - 12):.1f},{top + (1 - loss / highest) * (height - 44):.1f}"

    lines = []
    for part in range(5):
        x, y = place(steps[0], highest * part / 4).split(",")
        lines += [
            f'<line x1="{x}" y1="{y}" x2="{width - 12}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{highest * part / 4:.2g}</text>',
        ]
    points = " ".join(place(step, loss) for step, loss in history)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="11" fill="#333">',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *lines,
            f'<polyline points="{points}" fill="none" stroke="#2f5d8a" stroke-width="2"/>',
            f'<text x="{left}" y="{height - 6}">training loss (nats per token), step {steps[0]} to {steps[-1]}</text>',
            "</svg>\n",
        ]
    )


def _relative(path: str) -> str:
    """Leave a machine's folders out of a path."""
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
