"""What is refused before the first step, and what a finished run leaves beside its adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from iapt_export.contract.errors import IaptError
from tests.families import tiny_family
from tests.tiny import save_tiny_backbone, tiny_gpt2, tiny_tokenizer
from tests.trainers.runs import RUN, run
from trainers.adapters.directory import load_adapter
from trainers.methods.configs import LoRAConfig, PrefixTuningConfig, PromptTuningConfig
from trainers.methods.prefix_tuning import initial_prefix
from trainers.training.evaluate_adapter import evaluate_adapter
from trainers.training.work import FINISHED, TRACKED, publish, work_folder


def test_rows_that_the_backbones_tables_do_not_hold_are_refused_before_the_first_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it began to train")

    monkeypatch.setattr("trainers.training.train._fit", never)
    folder = save_tiny_backbone(tmp_path / "gpt2", tiny_gpt2(), chat=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long, strange = tmp_path / "long.jsonl", tmp_path / "strange.jsonl"
    rows = [{"instruction": f"the film {number}", "output": "a"} for number in range(12)]
    for path, last in ((long, "film " * 400), (strange, "a <new> film")):
        lines = [json.dumps(row) for row in [*rows, {"instruction": last, "output": "b"}]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = {"task": "generation", "eval_file": str(data)}
    with pytest.raises(
        IaptError, match=r"long.jsonl:13 has \d+ tokens, 4 of them the adapter's, and the backbone 256 posi"
    ):
        run(str(folder), long, tmp_path / "a", **asked, max_instruction_tokens=1000)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(IaptError, match=r"'<new>' is token \d+, and the backbone's table has \d+ entries"):
        run(str(folder), strange, tmp_path / "a", **asked)


def test_rows_beyond_longropes_first_factors_are_refused(data: Path, tmp_path: Path) -> None:
    """The configuration says 256 positions, of which the backbone computes 32 as transformers does."""
    folder = save_tiny_backbone(tmp_path / "phi3", tiny_family("phi3-longrope"))
    asked = {"max_instruction_tokens": 60, "max_steps": 1}
    refused = r"joy.jsonl:\d+ has \d+ tokens, 4 of them the adapter's, and the backbone 32 positions"
    with pytest.raises(IaptError, match=refused):
        run(str(folder), data, tmp_path / "a", **asked)
    with pytest.raises(IaptError, match=refused.replace(", 4 of", ", 0 of")):
        evaluate_adapter(str(folder), None, data, dataclasses.replace(RUN, **asked))


def test_weight_decay_that_would_do_nothing_is_refused(backbone: str, data: Path, tmp_path: Path) -> None:
    for method in (PromptTuningConfig(), PrefixTuningConfig()):
        with pytest.raises(IaptError, match=r"weight_decay=0\.1 acts on .* matrices, and P.* has a prompt alone"):
            run(backbone, data, tmp_path / "a", method, weight_decay=0.1)
    ends = []
    for method, steps in ((LoRAConfig(), 2), (PrefixTuningConfig(projection=True, projection_width=8), 1)):
        for decay in (0.0, 5.0):
            run(backbone, data, tmp_path / f"{len(ends)}", method, weight_decay=decay, max_steps=steps, warmup_steps=0)
            ends.append(load_adapter(tmp_path / f"{len(ends)}").tensors)
    for plain, decayed in (ends[:2], ends[2:]):
        changed = {name for name in plain if not torch.equal(plain[name], decayed[name])}
        assert changed == {name for name in plain if name.endswith(("__A", "__B", "_weight"))}


def test_an_adapters_own_settings_are_told_or_kept(
    backbone: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(backbone, data, tmp_path / "a", weights="int8")
    own = dataclasses.replace(RUN, weights="int8")
    caplog.clear()
    assert evaluate_adapter(backbone, tmp_path / "a", data, own).count > 0 and not caplog.messages
    evaluate_adapter(backbone, tmp_path / "a", data, RUN)
    assert "weights='int8', quantise='' takes its own" in caplog.text and result.report
    with pytest.raises(IaptError, match="prompt_format is 'plain', and the adapter was trained with 'chat'"):
        evaluate_adapter(backbone, tmp_path / "a", data, dataclasses.replace(own, prompt_format="plain"))


def test_an_output_around_the_working_folder_is_refused(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for output in (".", ".."):
        with pytest.raises(IaptError, match=r"is where this command runs, or above it; give a folder of its own"):
            run(backbone, data, Path(output))


def test_a_trackers_logs_outlive_the_run(tmp_path: Path) -> None:
    """TensorBoard's lie in the folder that a finished run removes."""
    output = tmp_path / "adapter"
    for start in ("first", "second"):
        work = work_folder(output)
        (work / FINISHED).mkdir(parents=True)
        (work / TRACKED / start).mkdir(parents=True)
        (work / TRACKED / start / "events").write_text(start, encoding="utf-8")
        publish(work, output)
        assert not work.exists() and output.is_dir()
    logs = tmp_path / "adapter.runs"
    assert {path.name: (path / "events").read_text(encoding="utf-8") for path in logs.iterdir()} == {
        "first": "first",
        "second": "second",
    }


def test_examples_that_are_trained_on_are_not_called_held_out(backbone: str, data: Path, tmp_path: Path) -> None:
    run(backbone, data, tmp_path / "a", eval_file=str(data))
    run(backbone, data, tmp_path / "b")
    card, other = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in "ab")
    assert "8 examples. **8 of them were trained on as well**" in card and "held-out" not in card.split("## Data")[0]
    assert "none of them seen in training" in other and "trained on as well" not in other


def test_batches_summed_into_one_step_are_one_large_batch(backbone: str, tmp_path: Path) -> None:
    """Answers differ in length: a mean of the batches' means would let the tokens of short ones weigh more."""
    data = tmp_path / "data.jsonl"
    rows = [{"instruction": f"the film {n}", "output": "joy " * (1 + 5 * (n % 4))} for n in range(24)]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    fields = {"task": "generation", "max_steps": 1, "warmup_steps": 0}
    whole, parts = (
        run(
            backbone, data, tmp_path / f"{size}", PromptTuningConfig(prompt_length=4), batch_size=size, **fields, **more
        )
        for size, more in ((8, {}), (1, {"gradient_accumulation": 8}))
    )
    assert parts.history[0][1] == pytest.approx(whole.history[0][1], rel=1e-4)
    first, second = (load_adapter(tmp_path / name).tensors["prompt"] for name in "81")
    assert ((first - second).abs() > 1e-4).float().mean() < 0.02, "Adam moves each entry by its gradient's sign"


def test_a_prefix_may_be_longer_than_a_window() -> None:
    """transformers' own cache of a layer with a window, here of 8, forgets what stands before it."""
    model = tiny_family("mistral")
    short, long = (initial_prefix(length, model, tiny_tokenizer(), [5, 6, 7]) for length in (6, 20))
    assert long.shape == (*short.shape[:3], 20, short.shape[4])
    torch.testing.assert_close(long[:, :, :, :6], short)
