"""Label likelihood and token loss against definitions written out, with and without adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import ARCHITECTURES, tiny_llama, tiny_tokenizer
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.instruction import format_instruction
from trainers.decoder.method import Method, rows_of
from trainers.methods.configs import METHOD_CONFIGS, IAPTConfig
from trainers.methods.forms import new_method
from trainers.training.config import TrainConfig
from trainers.training.data import encode_examples, encode_response
from trainers.training.evaluate import (
    HURT,
    ClassificationReport,
    Evaluation,
    GenerationReport,
    Scorer,
    beside_backbone,
    evaluate,
    evaluate_classification,
    evaluate_generation,
    label_scores,
)
from trainers.training.records import Example

TOKENIZER = tiny_tokenizer()
TEXTS = ("the film is a joy", "dull", "a dull and noisy story that nobody will remember", "joy joy")
LABELS = ("no", "negative and dull", "yes")


def random_method(model: Any, name: str = "IAPT") -> Method:
    """A method whose effect is visible: every tensor moved away from its start."""
    torch.manual_seed(3)
    config = IAPTConfig(bottleneck=8) if name == "IAPT" else METHOD_CONFIGS[name]()
    module = new_method(config, sizes_of(model))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return module.eval().requires_grad_(False)


def score_by_definition(model: Any, module: Method | None, instruction: list[int], label: list[int]) -> float:
    """Log-probability of ``label`` after ``instruction``: one unpadded row, no cache."""
    ids = torch.tensor([instruction + label])
    readable = torch.tensor([[1] * len(instruction) + [0] * len(label)])
    if module is None:
        logits, offset = model(input_ids=ids).logits[0], 0
    else:
        mask = torch.ones_like(ids)
        logits = read_instruction(model, rows_of(module), ids, mask, instruction_mask=readable).logits[0]
        offset = module.num_slots
    chances = logits.log_softmax(dim=-1)
    return sum(float(chances[offset + len(instruction) - 1 + i, token]) for i, token in enumerate(label))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "zero-shot"])
def test_label_scores(name: str, adapted: bool) -> None:
    model = ARCHITECTURES[name]()
    module = random_method(model) if adapted else None
    instructions = [format_instruction(TOKENIZER, text, "chat") for text in TEXTS]
    labels = [encode_response(TOKENIZER, label) for label in LABELS]
    assert {len(label) for label in labels} != {2}  # labels of several lengths
    scores = label_scores(Scorer(model, 1, rows_of(module)), instructions, labels)
    for row, instruction in enumerate(instructions):
        for column, label in enumerate(labels):
            assert float(scores[row, column]) == pytest.approx(
                score_by_definition(model, module, instruction, label), abs=2e-3
            )


@pytest.mark.parametrize("name", METHOD_CONFIGS)
@torch.no_grad()
def test_label_scores_of_every_method(name: str) -> None:
    """Labels that continue from the cache get what one pass over all gives them, also where methods change them."""
    model = tiny_llama()
    module = random_method(model, name)
    instructions = [format_instruction(TOKENIZER, text, "chat") for text in TEXTS]
    labels = [encode_response(TOKENIZER, label) for label in LABELS]
    scores = label_scores(Scorer(model, 1, rows_of(module)), instructions, labels)
    plain = label_scores(Scorer(model, 1), instructions, labels)
    assert (scores - plain).abs().max() > 0.1
    for row, column in ((0, 1), (2, 1), (3, 2)):
        expected = score_by_definition(model, module, instructions[row], labels[column])
        assert float(scores[row, column]) == pytest.approx(expected, abs=2e-3)


def test_one_token_labels() -> None:
    instructions = [format_instruction(TOKENIZER, text, "chat") for text in TEXTS]
    scores = label_scores(Scorer(tiny_llama(), 1), instructions, [[5], [6]])
    assert float(scores[1, 1]) == pytest.approx(score_by_definition(tiny_llama(), None, instructions[1], [6]), abs=2e-3)


def test_report_counts() -> None:
    """Labels that the model always prefers make the counts predictable."""
    model = tiny_llama()
    instructions = [format_instruction(TOKENIZER, "joy", "chat")] * 6
    likely, unlikely = (
        label_scores(Scorer(model, 1), instructions[:1], [[token] for token in range(2, 300)])[0]
        .topk(298)
        .indices[[0, -1]]
        + 2
    )
    labels = {"a": [int(unlikely)], "b": [int(likely)], "c": [int(unlikely)]}
    calls: list[tuple[int, int]] = []
    report = evaluate_classification(
        Scorer(model, 1, batch_size=4), instructions, [0, 0, 0, 0, 1, 1], labels, lambda *done: calls.append(done)
    )
    assert report == ClassificationReport(
        labels=("a", "b", "c"),
        count=6,
        accuracy=2 / 6,
        majority_accuracy=4 / 6,
        recall={"a": 0.0, "b": 1.0},
        confusion=((0, 4, 0), (0, 2, 0), (0, 0, 0)),
    )
    assert calls == [(4, 6), (6, 6)]
    assert report.summary() == "accuracy 0.333 on 6 examples (majority class 0.667)"


def test_an_adapter_that_hurts_is_said() -> None:
    def right(share: float, count: int = 300) -> ClassificationReport:
        return ClassificationReport(("no", "yes"), count, share, 0.5, {}, ((0, 0), (0, 0)))

    assert beside_backbone(right(0.9), right(0.8)) == "; the backbone alone 0.800"
    assert beside_backbone(right(0.647), right(0.847)) == f"; the backbone alone 0.847\n{HURT}"
    assert beside_backbone(right(0.6, 20), right(0.8, 20)) == "; the backbone alone 0.800", "20 examples tell nothing"
    assert beside_backbone(right(0.6), None) == ""
    better, worse = (GenerationReport(9, 90, loss, 1.0) for loss in (1.5, 1.75))
    assert beside_backbone(better, worse) == "; the backbone alone 1.7500"
    assert beside_backbone(worse, better) == f"; the backbone alone 1.5000\n{HURT}"


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "zero-shot"])
def test_generation_loss(adapted: bool) -> None:
    model = tiny_llama()
    module = random_method(model) if adapted else None
    examples = [
        Example(({"role": "user", "content": text},), answer) for text, answer in zip(TEXTS, TEXTS[::-1], strict=True)
    ]
    items = encode_examples(TOKENIZER, examples, "chat", 100, 100)
    report = evaluate_generation(Scorer(model, 1, rows_of(module), batch_size=3), items)
    total = tokens = 0.0
    for item in items:
        split = item["instruction_length"]
        total -= score_by_definition(model, module, item["input_ids"][:split], item["input_ids"][split:])
        tokens += len(item["input_ids"]) - split
    assert (report.count, report.tokens) == (4, tokens)
    assert report.loss == pytest.approx(total / tokens, abs=1e-3)
    assert report.perplexity == pytest.approx(2.718281828459045**report.loss)
    assert report.summary().startswith("loss ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluate_from_examples(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    module = random_method(model)
    examples = [Example(({"role": "user", "content": text},), LABELS[i % 3]) for i, text in enumerate(TEXTS * 3)]
    lines: list[str] = []
    task = Evaluation(TOKENIZER, examples, tuple(sorted(LABELS)), "chat", TrainConfig(eval_batch_size=5))
    report = evaluate(model, module, task, lines.append)
    assert isinstance(report, ClassificationReport)
    assert (report.count, sum(map(sum, report.confusion))) == (12, 12)
    assert lines[-1] == "  12/12 examples"
    assert next(module.parameters()).dtype == torch.float32  # the caller's module is left as it is
    free = evaluate(model, None, Evaluation(TOKENIZER, examples, (), "chat", TrainConfig()))
    assert isinstance(free, GenerationReport)


def test_batch_size_does_not_change_the_result() -> None:
    model = tiny_llama()
    examples = [Example(({"role": "user", "content": text},), LABELS[i % 3]) for i, text in enumerate(TEXTS * 4)]
    reports = [
        evaluate(
            model, random_method(model), Evaluation(TOKENIZER, examples, LABELS, "chat", TrainConfig(eval_batch_size=n))
        )
        for n in (1, 7, 64)
    ]
    assert reports[0] == reports[1] == reports[2]
