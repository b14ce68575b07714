"""What is refused before the first step, and what a finished run leaves beside its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from iapt_export.contract.errors import IaptError
from tests.tiny import save_tiny_backbone, tiny_gpt2
from tests.trainers.runs import run
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
        IaptError, match=r"example 12 has \d+ tokens, 4 of them the adapter's, and the backbone 256 posi"
    ):
        run(str(folder), long, tmp_path / "a", **asked, max_instruction_tokens=1000)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(IaptError, match=r"'<new>' is token \d+, and the backbone's table has \d+ entries"):
        run(str(folder), strange, tmp_path / "a", **asked)


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
