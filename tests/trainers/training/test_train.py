"""Training on a tiny backbone: it learns, repeats itself, resumes, saves the adapter alone, and cleans up."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import DEQUANTISED, Rounding
from tests.thorough import default_for
from tests.tiny import save_tiny_backbone, tiny_gpt2, tiny_llama
from tests.trainers.runs import METHOD, RUN, InterruptedRunError, interrupt_at, run, weights
from trainers.adapters.adapter import CONFIG_FILE, EXAMPLES_FILE, WEIGHTS_FILE
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_backbone
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.importance import importance_of
from trainers.decoder.rounded import round_weights
from trainers.methods.configs import IAPTConfig
from trainers.methods.iapt import IAPT
from trainers.methods.rational import COEFFICIENTS, initial_coefficients
from trainers.training.card import EXPLAINED
from trainers.training.config import TrainRequest
from trainers.training.data import split_holdout
from trainers.training.evaluate import ClassificationReport, GenerationReport
from trainers.training.evaluate_adapter import evaluate_adapter
from trainers.training.loop import AdapterTrainer, EpochSampler, PromptTuned
from trainers.training.records import read_examples
from trainers.training.train import train
from trainers.training.work import SECONDS_FILE
from validation.sides.cases import read_examples as read_prompts


def test_learns(backbone: str, data: Path, tmp_path: Path) -> None:
    """A random backbone knows no task, but its prompts can learn which two answers occur."""
    result = run(
        backbone, data, tmp_path / "a", max_steps=20, logging_steps=5, learning_rate=5e-2, start="random", baseline=True
    )
    losses = [loss for _, loss in result.history]
    assert result.steps == 20
    assert losses[-1] < 0.85 * losses[0]
    assert isinstance(result.report, ClassificationReport)
    assert isinstance(result.baseline, ClassificationReport)
    assert load_adapter(tmp_path / "a").config.labels == ("no", "yes")


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("int4", Rounding(4)), ("nvfp4", DEQUANTISED["nvfp4"])], ids=["int4", "nvfp4"]
)
def test_an_adapter_is_trained_on_the_weights_that_a_quantised_target_serves(
    dtype: str, rounding: Rounding, backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []

    def noted(model: Any, method: Any) -> PromptTuned:
        models.append(model)
        return PromptTuned(model, method)

    monkeypatch.setattr("trainers.training.train.PromptTuned", noted)
    run(backbone, data, tmp_path / "a", max_steps=2, weights=dtype)
    plain, wanted = load_backbone(backbone).model, load_backbone(backbone).model
    round_weights(wanted, rounding, {} if rounding.is_scaled else importance_of(wanted))
    for name, weight in models[0].named_parameters():
        assert torch.equal(weight, wanted.get_parameter(name)), name
    assert not torch.equal(
        plain.model.layers[0].self_attn.q_proj.weight, wanted.model.layers[0].self_attn.q_proj.weight
    )
    assert load_adapter(tmp_path / "a").config.weights == dtype
    assert f"fp32 over weights rounded to {dtype}" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_weights_of_which_none_would_be_rounded_are_refused(data: Path, tmp_path: Path) -> None:
    model = save_tiny_backbone(
        tmp_path / "model", tiny_llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=1)
    )
    with pytest.raises(IaptError, match=r"--weights fp8 rounds matrices whose inputs fill blocks of 32, and .* none"):
        run(str(model), data, tmp_path / "a", max_steps=2, weights="fp8")
    assert not (tmp_path / "a").exists()


def test_directory_holds_the_adapter_and_its_card(backbone: str, data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = dataclasses.replace(RUN, base_model_name="org/model", data_note="From nowhere.", baseline=True)
    result = train(TrainRequest(backbone, data, tmp_path / "a", METHOD, config), say=lines.append)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    written = {CONFIG_FILE, WEIGHTS_FILE, "README.md", "evaluation.json", "training.svg", "run.json", EXAMPLES_FILE}
    assert names == written
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    for page in re.findall(r"`(docs/[^`#]+)", EXPLAINED):
        assert page in card and (Path(__file__).resolve().parents[3] / page).is_file()
    count = sum(parameter.numel() for parameter in IAPT(METHOD, Sizes(32, 3)).parameters())
    assert str(tmp_path) not in card
    assert backbone not in card
    for text in (
        "base_model: org/model",
        "| this adapter |",
        "| zero-shot (the backbone alone, same prompt) |",
        "36 examples",
        "`examples.jsonl` holds prompts",
        "From nowhere.",
        "seed 0",
        "torch 2.",
        "iapt-export train --model tiny-llama --data joy.jsonl --output a --bottleneck 8",
        "--max-steps 6",
        "6 steps of batch 4",
        "IAPT (arXiv 2405.18203)",
        f"{count:,} trained parameters. 4 cache entries stand before the instruction.",
        "| `bottleneck` | 8 |",
        "| `bias` | true |",
        "tags:\n- iapt\n- prompt-tuning\n---",
    ):
        assert text in card
    scores = json.loads((tmp_path / "a" / "evaluation.json").read_text(encoding="utf-8"))
    assert isinstance(result.report, ClassificationReport)
    assert scores["adapter"]["accuracy"] == result.report.accuracy
    assert lines[0] == f"training {count:,} parameters on 36 examples, prompts in the tokenizer's chat template"
    assert any(line.startswith("step 6/6  loss ") and "s/step" in line for line in lines)
    assert lines[-1].startswith(f"wrote {tmp_path / 'a'}: accuracy")


def test_same_seed_same_bytes(backbone: str, data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name))  # the caller's random state does not matter
        run(backbone, data, tmp_path / name, seed=seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    for file in (CONFIG_FILE, "evaluation.json", "training.svg", EXAMPLES_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_held_out_prompts_are_kept_unless_the_user_has_others(backbone: str, data: Path, tmp_path: Path) -> None:
    """What `build` will compare: texts that were not trained on, in place of which a user may put others."""
    path, fields = tmp_path / "a" / EXAMPLES_FILE, {"max_steps": 1, "overwrite": True}
    run(backbone, data, tmp_path / "a", **fields)
    texts = read_prompts(path)
    training, held_out = split_holdout(read_examples(data), RUN.holdout, RUN.seed)
    assert sorted(texts) == sorted(example.messages[0]["content"] for example in held_out)
    assert not set(texts) & {example.messages[0]["content"] for example in training}
    run(backbone, data, tmp_path / "a", seed=3, example_prompts=2, **fields)
    assert len(read_prompts(path)) == 2  # its own file gives way
    path.write_text('{"prompt": "mine"}\n', encoding="utf-8")
    for _ in range(2):
        run(backbone, data, tmp_path / "a", **fields)
        assert read_prompts(path) == ["mine"]
    path.unlink()
    run(backbone, data, tmp_path / "a", example_prompts=0, **fields)
    assert not path.exists()
    assert EXAMPLES_FILE not in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("coefficients", default_for(lambda name: name == "joint", ["joint", "bilevel"]))
def test_interrupted_and_resumed_equals_uninterrupted(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coefficients: Any
) -> None:
    method = dataclasses.replace(METHOD, coefficients=coefficients)
    fields: dict[str, Any] = {"max_steps": 14, "save_steps": 5}  # the eleventh step begins a second epoch
    run(backbone, data, tmp_path / "whole", method, **fields)
    interrupt_at(monkeypatch, 12)
    with pytest.raises(InterruptedRunError):
        run(backbone, data, tmp_path / "cut", method, **fields)
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    checkpoint = tmp_path / "cut.training" / "checkpoint-10"
    assert {path.name for path in checkpoint.iterdir()} == {
        CONFIG_FILE,
        WEIGHTS_FILE,
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        SECONDS_FILE,
    }
    assert (checkpoint / "optimizer.pt").stat().st_size < 4 * (checkpoint / WEIGHTS_FILE).stat().st_size
    with pytest.raises(IaptError, match="holds checkpoints of an unfinished run; give --resume to go on with it"):
        run(backbone, data, tmp_path / "cut", method, **fields)
    other = dataclasses.replace(method, bias=False)
    with pytest.raises(IaptError, match="was written by a run with other settings: bias True there, False here"):
        run(backbone, data, tmp_path / "cut", other, resume=True, **fields)
    result = run(backbone, data, tmp_path / "cut", method, resume=True, **fields)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert result.steps == 14
    assert not (tmp_path / "cut.training").exists()


def test_backbone_stays_as_it_is() -> None:
    model = PromptTuned(tiny_llama(), IAPT(METHOD, Sizes(32, 3)))
    model.train()
    assert not model.backbone.training
    assert model.method.training
    assert all(name.startswith("method.") for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "fields", [{"precision": "bf16"}, {"scheduler": "cosine", "weight_decay": 0.1, "eval_steps": 3}]
)
def test_other_settings(backbone: str, data: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    run(backbone, data, tmp_path / "a", **fields)
    assert all(torch.isfinite(tensor).all() for tensor in load_adapter(tmp_path / "a").tensors.values())


def test_the_evaluation_loss_is_that_of_the_report_in_any_batch(backbone: str, tmp_path: Path) -> None:
    """Long and short answers, whose tokens count alike."""
    answers = ("yes", "a quiet joy from the first scene to the last " * 3)
    rows = [{"instruction": f"the film {number}", "output": answers[number % 2]} for number in range(14)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for size in (1, 3, 64):
        lines: list[str] = []
        fields = {
            "task": "generation",
            "eval_steps": 2,
            "max_steps": 2,
            "eval_file": str(data),
            "eval_batch_size": size,
        }
        config = dataclasses.replace(RUN, **fields)
        result = train(TrainRequest(backbone, data, tmp_path / f"{size}", METHOD, config), say=lines.append)
        (told,) = [float(line.split("evaluation loss ")[1]) for line in lines if "evaluation loss" in line]
        assert isinstance(result.report, GenerationReport)
        assert told == pytest.approx(result.report.loss, abs=2e-4)


def test_generation_data_and_plain_format(data: Path, tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path / "gpt2", tiny_gpt2(), chat=False)
    result = run(str(folder), data, tmp_path / "a", task="generation", gradient_accumulation=2, baseline=True)
    assert isinstance(result.report, GenerationReport)
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "| the backbone alone |" in card
    assert "in the `newline` format (a line break behind each prompt)." in card
    assert load_adapter(tmp_path / "a").config.labels == ()


def test_separate_evaluation_file(backbone: str, data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"instruction": "joy?", "input": "joy", "output": "yes"}\n', encoding="utf-8")
    report = run(backbone, data, tmp_path / "a", eval_file=str(held_out)).report
    assert report is not None
    assert report.count == 1
    again = evaluate_adapter(backbone, tmp_path / "a", held_out, RUN)
    assert again == report
    plain = evaluate_adapter(backbone, None, held_out, RUN, labels=("no", "yes"))
    assert isinstance(plain, ClassificationReport)
    held_out.write_text('{"instruction": "joy?", "output": "perhaps"}\n', encoding="utf-8")
    with pytest.raises(IaptError, match="has responses that the training data lacks: perhaps"):
        run(backbone, data, tmp_path / "b", eval_file=str(held_out))
    with pytest.raises(IaptError, match="has responses that are none of the labels: perhaps"):
        evaluate_adapter(backbone, tmp_path / "a", held_out, RUN)


def test_evaluation_runs_where_training_does(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``meta`` stands for a GPU here: nothing can be computed there, which shows that the backbone went there."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        evaluate_adapter(backbone, None, data, RUN, labels=("no", "yes"))


def test_adapter_of_another_backbone(backbone: str, data: Path, tmp_path: Path) -> None:
    run(backbone, data, tmp_path / "a")
    other = save_tiny_backbone(tmp_path / "other", tiny_llama(hidden_size=64))
    with pytest.raises(IaptError, match="hidden size is 32 in the adapter and 64 in the backbone"):
        evaluate_adapter(str(other), tmp_path / "a", data, RUN)


def test_output_that_is_not_ours(backbone: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine", encoding="utf-8")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "README.md").write_text("mine", encoding="utf-8")
    for name, text in (
        ("file", "it is no adapter directory; choose another output"),
        ("folder", "it holds thesis.tex; choose another output"),
        ("half", "it is no adapter directory"),
    ):
        with pytest.raises(IaptError) as caught:
            run(backbone, data, tmp_path / name)
        assert "exists and is not replaced, because" in str(caught.value)
        assert text in str(caught.value)
    assert (tmp_path / "folder" / "thesis.tex").read_text(encoding="utf-8") == "mine"


def test_an_adapter_is_replaced_when_all_is_done(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(backbone, data, tmp_path / "a")
    before = weights(tmp_path / "a")
    run(backbone, data, tmp_path / "a", seed=1, overwrite=True)
    after = weights(tmp_path / "a")
    assert after != before
    forward = PromptTuned.forward

    def poisoned(self: PromptTuned, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": forward(self, **batch)["loss"] * float("nan")}

    monkeypatch.setattr(PromptTuned, "forward", poisoned)
    with pytest.raises(IaptError) as caught:
        run(backbone, data, tmp_path / "a", overwrite=True)
    assert "the loss became nan at step 1; try a lower learning_rate (now 0.01)" in str(caught.value)
    assert weights(tmp_path / "a") == after


def test_bilevel_trains_each_part_on_its_half(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each step only one part has moved, and the halves share no example."""
    moved: list[set[str]] = []
    drop = AdapterTrainer._drop_gradients

    def watch(self: AdapterTrainer, coefficients: bool) -> None:
        drop(self, coefficients)
        moved.append({name.split(".")[-1] for name, p in self.model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(AdapterTrainer, "_drop_gradients", watch)
    run(backbone, data, tmp_path / "a", dataclasses.replace(METHOD, coefficients="bilevel"), max_steps=4)
    weights_moved = {"down_weight", "down_bias", "query", "up_weight", "up_bias"}
    assert moved == [weights_moved, {"numerator", "denominator"}] * 2


def test_frozen_coefficients_stay_as_they_start(backbone: str, data: Path, tmp_path: Path) -> None:
    """All else learns."""
    run(backbone, data, tmp_path / "a", dataclasses.replace(METHOD, coefficients="frozen"), max_steps=3)
    held = load_adapter(tmp_path / "a").tensors
    fitted = initial_coefficients(
        METHOD.init_function, METHOD.numerator_degree, METHOD.denominator_degree, METHOD.rational_form
    )
    for name, values in zip(COEFFICIENTS, fitted, strict=True):
        assert torch.equal(held[name], torch.from_numpy(values).float().expand_as(held[name]))
    assert held["up_bias"].abs().max() > 0


@pytest.mark.parametrize("learning", ["bilevel", "frozen"])
def test_coefficients_that_are_not_there_are_refused(learning: Any, tmp_path: Path) -> None:
    method = IAPTConfig(activation="gelu", coefficients=learning)
    with pytest.raises(IaptError, match=f"coefficients='{learning}' needs activation='rational', got 'gelu'"):
        TrainRequest("none", "none", tmp_path / "out", method)


def test_sampler_order() -> None:
    lengths = [5 + (i * 7) % 13 for i in range(23)]
    plain = EpochSampler(lengths, 4, seed=0, group_by_length=True, alternate=False)
    assert sorted(plain) == list(range(23))
    assert len(plain) == 23
    first = list(plain)
    assert list(plain) == first
    plain.set_epoch(1)
    assert list(plain) != first
    halves = EpochSampler(lengths, 4, seed=0, group_by_length=False, alternate=True)
    order = list(halves)
    assert len(order) == len(halves) == 16
    one, two = ({i for b in range(start, 16, 8) for i in order[b : b + 4]} for start in (0, 4))
    assert one <= set(halves.parts[0])
    assert two <= set(halves.parts[1])
    assert not set(halves.parts[0]) & set(halves.parts[1])
    with pytest.raises(IaptError, match="coefficients=bilevel halves the data and needs 12 examples in each half"):
        EpochSampler(lengths, 12, seed=0, group_by_length=False, alternate=True)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_start_at_the_sink(make: Any) -> None:
    model = make()
    torch.manual_seed(0)
    method = IAPT(IAPTConfig(bottleneck=8, sharing="none"), Sizes(32, 3))
    before = method.down_weight.detach().clone()
    method.start(model, None, [0, 5, 6])
    states = model(input_ids=torch.tensor([[0]]), output_hidden_states=True).hidden_states
    for layer in range(3):
        sink = states[layer][0, 0] / states[layer][0, 0].norm()
        assert (sink @ method.down_weight[layer]).abs().max() < 1e-5
        assert torch.nn.functional.cosine_similarity(method.up_bias[layer], sink, dim=0) > 0.999
    assert not torch.equal(before, method.down_weight)
    bare = IAPT(IAPTConfig(bottleneck=8, bias=False), Sizes(32, 3))
    bare.start(model, None, [0])  # nothing to point, nothing raised


def test_backbone_without_tokenizer(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.decoder.backbone import Backbone

    monkeypatch.setattr(
        "trainers.training.evaluate_adapter.load_backbone", lambda name, **_: Backbone(tiny_llama(), None, name)
    )
    with pytest.raises(IaptError, match="the backbone bare has no tokenizer; training needs one"):
        run("bare", data, tmp_path / "a")
