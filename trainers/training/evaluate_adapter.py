"""Evaluating an adapter's directory, or the plain backbone, on a file of examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from iapt_export.contract.errors import IaptError
from trainers.adapters.adapter import Adapter
from trainers.adapters.directory import check_adapter_fits, doubt_of_backbone, load_adapter
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.family import check_family
from trainers.decoder.importance import round_as_exported
from trainers.decoder.rounded import rounded_weights
from trainers.decoder.stored import weights_sha256
from trainers.training.config import TrainConfig
from trainers.training.data import check_labels, check_rows, find_labels, format_of, sample, told_of_cuts
from trainers.training.evaluate import Evaluation, Report, encoded, evaluate
from trainers.training.records import read_examples

LOGGER = logging.getLogger(__name__)


def evaluate_adapter(
    model_name: str,
    adapter: str | Path | None,
    data: str | Path,
    config: TrainConfig | None = None,
    *,
    labels: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> Report:
    """Evaluate an adapter directory, or the plain backbone, the way `train` does at its end.

    Args:
        model_name: the backbone.
        adapter: adapter directory, ours or stock PEFT's; None for the plain backbone.
        data: JSONL file.
        config: ``max_eval_examples``, ``eval_batch_size``, ``max_instruction_tokens``, ``prompt_format``,
            ``precision``, ``weights``, ``quantise`` and ``seed`` count.
        labels: answers to choose from; empty takes the adapter's, or else the data's.
        say: takes progress lines; silent if None.

    Raises:
        IaptError: bad data or adapter, or an adapter for another backbone.
    """
    config = config or TrainConfig()
    backbone, sha256 = load_as_trained_on(model_name, config)
    asked = None if config.prompt_format == "auto" else config.prompt_format
    loaded = load_adapter(adapter, backbone, peft_prompt_format=asked) if adapter is not None else None
    if loaded is not None:
        _compare_settings(loaded, config)
        if doubt := doubt_of_backbone(loaded, backbone, sha256):
            LOGGER.warning("%s", doubt)
    examples = read_examples(data)
    if loaded is None:
        prompt_format = format_of(backbone.tokenizer, config.prompt_format, examples)
    else:
        check_adapter_fits(loaded.config, backbone, str(adapter))
        labels, prompt_format = labels or loaded.config.labels, loaded.config.prompt_format
    labels = tuple(labels) or find_labels(examples, config.task)
    check_labels(examples, labels, f"{data} has responses that are none of the labels")
    examples = sample(examples, config.max_eval_examples, config.seed)
    task = Evaluation(backbone.tokenizer, examples, tuple(labels), prompt_format, config)
    items = encoded(task)
    check_rows(items, backbone.tokenizer, backbone.model, loaded.module().num_slots if loaded else 0)
    for line in told_of_cuts(items, "examples to evaluate on", config):
        LOGGER.warning("%s", line)
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        backbone.model.to(device)  # where the Trainer would put it
    return evaluate(backbone.model, loaded.module() if loaded else None, task, say)


def _compare_settings(adapter: Adapter, config: TrainConfig) -> None:
    """Say where an adapter of ours was trained on other weights than it is evaluated on.

    Raises:
        IaptError: another prompt format is asked for than the adapter's own.
    """
    if adapter.from_peft:
        return
    own = adapter.config
    if config.prompt_format not in ("auto", own.prompt_format):
        raise IaptError(
            f"prompt_format is {config.prompt_format!r}, and the adapter was trained with {own.prompt_format!r}; "
            "leave it out"
        )
    weights, quantise = config.weights, config.rounding.quantise if config.rounding else ""
    if (own.weights, own.quantise) != (weights, quantise):
        asked = ", ".join(f"{name}={value!r}" for name, value in (("weights", own.weights), ("quantise", own.quantise)))
        LOGGER.warning("the adapter was trained on other weights than it is evaluated on; %s takes its own", asked)


def load_as_trained_on(name: str, config: TrainConfig) -> tuple[Backbone, str]:
    """The backbone in the type, and with its weights rounded, as the settings say.

    Args:
        name: as `load_backbone` takes it.
        config: ``precision``, ``weights``, ``quantise``, ``revision`` and ``trust_remote_code`` count.

    Returns:
        The backbone, and the hash of its weights before they were rounded; empty in bf16, which other weights round to
        as well.

    Raises:
        IaptError: it cannot be loaded, or has nothing to round.
    """
    options: dict[str, Any] = {"revision": config.revision or None, "trust_remote_code": config.trust_remote_code}
    backbone = load_backbone(name, dtype=config.precision, **options)
    check_family(backbone.model, name)
    sha256 = weights_sha256(backbone.model) if config.precision == "fp32" else ""
    if config.rounding:
        if not rounded_weights(backbone.model, config.rounding):
            raise IaptError(
                f"--weights {config.weights} rounds matrices whose inputs fill blocks of {config.rounding.block}, and "
                f"{name} has none; leave it out"
            )
        round_as_exported(backbone.model, config.rounding)
    return backbone, sha256
