"""How good is an adapter: label likelihood for classification, token loss for generation.

A label's score is the log-probability of the whole answer, its end-of-sequence token included. That is
the quantity training raises, and it makes labels comparable when one begins another. It is not divided by the
label's length: a longer label is not less likely by itself once its first token tells it apart.

Without a method the same functions measure the plain backbone (zero-shot).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import exp
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.decoder.generate import prefill
from trainers.decoder.insertion import continue_from, read_instruction
from trainers.decoder.instruction import padding_id
from trainers.decoder.method import Method, Rows, rows_of
from trainers.training.config import TrainConfig
from trainers.training.data import IGNORED, Encoded, Item, collate, encode_examples, encode_response, pad_instructions
from trainers.training.records import Example


@dataclass(frozen=True)
class ClassificationReport:
    """Accuracy on labelled examples."""

    labels: tuple[str, ...]
    """Label texts; rows and columns of ``confusion``."""
    count: int
    """Examples evaluated."""
    accuracy: float
    """Share of examples whose likeliest label is the right one."""
    majority_accuracy: float
    """Share of the most frequent label: what always giving the same answer reaches."""
    recall: dict[str, float]
    """Per label that occurs, the share found."""
    confusion: tuple[tuple[int, ...], ...]
    """``confusion[true][predicted]`` counts."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def summary(self) -> str:
        """The result in a few words."""
        return f"accuracy {self.accuracy:.3f} on {self.count} examples (majority class {self.majority_accuracy:.3f})"


@dataclass(frozen=True)
class GenerationReport:
    """Loss on free answers."""

    count: int
    """Examples evaluated."""
    tokens: int
    """Response tokens evaluated, end-of-sequence tokens included."""
    loss: float
    """Mean negative log-likelihood per response token, in nats."""
    perplexity: float
    """exp(loss)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def summary(self) -> str:
        """The result in a few words."""
        return f"loss {self.loss:.4f} per token (perplexity {self.perplexity:.2f}) on {self.count} examples"


Report = ClassificationReport | GenerationReport
HURT = (
    "The adapter answers worse than the backbone alone: try another --learning-rate or --seed, more steps, more data, "
    "or another --method."
)


def beside_backbone(report: Report, baseline: Report | None) -> str:
    """What to say of the backbone alone behind an adapter's summary: its figure, and `HURT` where that is far better.

    Far is two standard errors of the difference of two shares, as if they were independent; any loss that is larger.
    """
    if isinstance(report, GenerationReport) and isinstance(baseline, GenerationReport):
        text, is_hurt = f"; the backbone alone {baseline.loss:.4f}", report.loss > baseline.loss
    elif isinstance(report, ClassificationReport) and isinstance(baseline, ClassificationReport):
        error = sum(each.accuracy * (1 - each.accuracy) / each.count for each in (report, baseline)) ** 0.5
        text = f"; the backbone alone {baseline.accuracy:.3f}"
        is_hurt = baseline.accuracy - report.accuracy > 2 * error
    else:
        return ""
    return f"{text}\n{HURT}" if is_hurt else text


def report_from_dict(fields: dict[str, Any] | None) -> Report | None:
    """A report from what its ``to_dict`` became in JSON; None stays None."""
    if fields is None:
        return None
    if "confusion" not in fields:
        return GenerationReport(**fields)
    rows = tuple(map(tuple, fields["confusion"]))
    return ClassificationReport(**{**fields, "labels": tuple(fields["labels"]), "confusion": rows})


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate on, and how it is fed."""

    tokenizer: Any
    """The backbone's."""
    examples: Sequence[Example]
    """Not empty."""
    labels: tuple[str, ...]
    """Answers to choose from; empty measures the loss of free answers."""
    prompt_format: str
    """``chat``, ``plain`` or ``newline``."""
    config: TrainConfig
    """For its limits and ``eval_batch_size``."""


@dataclass(frozen=True)
class Scorer:
    """A backbone, what is done to its rows, and how many it takes at once."""

    model: Any
    """The frozen backbone."""
    pad_token_id: int
    """Fills short rows."""
    rows: Rows = field(default_factory=Rows)
    """The adapter's method; nothing for the plain backbone."""
    batch_size: int = 16
    """Rows per forward pass."""


def evaluate(model: Any, method: Method | None, task: Evaluation, say: Callable[[str], None] | None = None) -> Report:
    """Measure an adapter, or the plain backbone, on examples as `trainers.training.data` reads them.

    Args:
        model: the frozen backbone.
        method: the adapter's module, left as it is; None for the plain backbone.
        task: examples and settings.
        say: takes a progress line about every tenth of the way.
    """
    tokenizer, config = task.tokenizer, task.config
    pad = padding_id(tokenizer, model.config.vocab_size)
    if method is not None:
        method = copy.deepcopy(method).to(device=model.device, dtype=model.dtype).eval()
    scorer = Scorer(model, pad, rows_of(method), config.eval_batch_size)
    progress = None if say is None else _tenths(say)
    items = encoded(task)
    if not task.labels:
        return evaluate_generation(scorer, items, progress)
    labels = {label: encode_response(tokenizer, label) for label in task.labels}
    instructions = [item["input_ids"][: item["instruction_length"]] for item in items]
    answers = [task.labels.index(example.response) for example in task.examples]
    return evaluate_classification(scorer, instructions, answers, labels, progress)


def encoded(task: Evaluation) -> list[Encoded]:
    """The examples as token ids, cut to the settings' lengths; labels are not cut."""
    config = task.config
    limits = (config.max_instruction_tokens, None if task.labels else config.max_response_tokens)
    return encode_examples(task.tokenizer, task.examples, task.prompt_format, *limits)


def _tenths(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """A progress function that speaks ten times."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total > told:
            told = done * 10 // total
            say(f"  {done}/{total} examples")

    return progress


@torch.no_grad()
def evaluate_classification(
    scorer: Scorer,
    instructions: Sequence[list[int]],
    answers: Sequence[int],
    labels: dict[str, list[int]],
    progress: Callable[[int, int], None] | None = None,
) -> ClassificationReport:
    """Choose each instruction's likeliest label and compare with the right one.

    Args:
        scorer: what to evaluate.
        instructions: token ids per example.
        answers: index of the right label per example.
        labels: label text to its token ids, end of sequence included.
        progress: called with (examples done, examples in all).
    """
    names, predicted = tuple(labels), [0] * len(instructions)
    done = 0
    for chunk in _by_length([len(row) for row in instructions], scorer.batch_size):
        scores = label_scores(scorer, [instructions[index] for index in chunk], list(labels.values()))
        for index, best in zip(chunk, scores.argmax(dim=1).tolist(), strict=True):
            predicted[index] = best
        done += len(chunk)
        if progress:
            progress(done, len(instructions))
    counts = [[0] * len(names) for _ in names]
    for right, guess in zip(answers, predicted, strict=True):
        counts[right][guess] += 1
    sizes, total = [sum(row) for row in counts], len(answers)
    return ClassificationReport(
        labels=names,
        count=total,
        accuracy=sum(counts[index][index] for index in range(len(names))) / total,
        majority_accuracy=max(sizes) / total,
        recall={name: counts[i][i] / sizes[i] for i, name in enumerate(names) if sizes[i]},
        confusion=tuple(tuple(row) for row in counts),
    )


@torch.no_grad()
def label_scores(scorer: Scorer, instructions: Sequence[list[int]], labels: Sequence[list[int]]) -> Tensor:
    """Log-probability of each label after each instruction.

    The instructions are read once; each label then continues from their cache, which is cropped back afterwards.

    Args:
        scorer: what to evaluate.
        instructions: B rows of token ids.
        labels: token ids per label.

    Returns:
        fp32 ``[B, number of labels]``, on the CPU.
    """
    device = scorer.model.device
    ids, mask = (tensor.to(device) for tensor in pad_instructions(instructions, scorer.pad_token_id))
    logits, cache = prefill(scorer.model, scorer.rows, ids, mask)  # [B, V]
    first = logits.float().log_softmax(dim=-1)
    mask = torch.cat([scorer.rows.slot_mask(mask), mask], dim=1)  # [B, S]
    columns = []
    for label in labels:
        score = first[:, label[0]]
        if len(label) > 1:
            tokens = torch.tensor(label, device=device).expand(len(ids), -1)  # [B, K]
            full = torch.cat([mask, mask.new_ones(len(ids), len(label) - 1)], dim=1)
            output = continue_from(scorer.model, scorer.rows, tokens[:, :-1], full, cache)
            follow = output.logits.float().log_softmax(dim=-1)  # [B, K-1, V]
            score = score + follow.gather(2, tokens[:, 1:, None])[..., 0].sum(dim=1)
            cache.crop(1 - len(label))
        columns.append(score.cpu())
    return torch.stack(columns, dim=1)


@torch.no_grad()
def evaluate_generation(
    scorer: Scorer, items: Sequence[Item], progress: Callable[[int, int], None] | None = None
) -> GenerationReport:
    """Mean loss over all response tokens of ``items``.

    Args:
        scorer: what to evaluate.
        items: encoded examples.
        progress: called with (examples done, examples in all).
    """
    total, tokens, done = 0.0, 0, 0
    for chunk in _by_length([len(item["input_ids"]) for item in items], scorer.batch_size):
        batch = collate([items[index] for index in chunk], scorer.pad_token_id)
        batch = {name: tensor.to(scorer.model.device) for name, tensor in batch.items()}
        loss, number = response_loss(scorer.model, scorer.rows, batch)
        total, tokens, done = total + float(loss), tokens + number, done + len(chunk)
        if progress:
            progress(done, len(items))
    loss_per_token = total / tokens
    return GenerationReport(
        count=len(items), tokens=tokens, loss=loss_per_token, perplexity=exp(min(loss_per_token, 700.0))
    )


def response_loss(model: Any, rows: Rows, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the responses, and their number of tokens.

    Logits are computed only where a label stands: the vocabulary is 85 times as wide as SmolLM2's hidden
    states, and most positions are instruction.

    Args:
        model: the frozen backbone.
        rows: what is done to each row; of the tokens it reads the instruction only.
        batch: as `trainers.training.data.collate` makes it.

    Returns:
        fp32 scalar, and the number of response tokens.
    """
    labels = batch["labels"]
    lines, columns = (labels != IGNORED).nonzero(as_tuple=True)
    output = read_instruction(
        model,
        rows,
        batch["input_ids"],
        batch["attention_mask"],
        instruction_mask=batch["instruction_mask"],
        # The hidden state one place earlier predicts a token; responses never stand first.
        select=lambda hidden: hidden[lines, columns + (rows.num_slots - 1)],  # [K, D]
    )
    return F.cross_entropy(output.logits.float(), labels[lines, columns], reduction="sum"), len(lines)


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length: little padding, and no influence on the result."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
