"""What a run finds at its output and beside it: gone on from, reported, or refused in words, never lost."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from iapt_export.contract.errors import IaptError
from tests.bundles import run as run_command
from tests.thorough import default_for
from tests.trainers.runs import METHOD, RUN, InterruptedRunError, interrupt_at, run, undisturbed, weights
from tests.trainers.training.kills import read_disk
from trainers.training.config import TrainRequest
from trainers.training.evaluate import GenerationReport, report_from_dict
from trainers.training.train import InterruptedTraining, train
from trainers.training.work import (
    RECORD_FILE,
    checkpoints,
    newest_whole,
    read_seconds,
    work_folder,
    write_seconds,
)

FIELDS: dict[str, Any] = {"max_steps": 5, "save_steps": 2}


@pytest.fixture
def cut(backbone: str, data: Path, tmp_path: Path) -> Path:
    """The output of a run that ended in its fifth step, after checkpoints of the second and the fourth."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(InterruptedRunError):
            run(backbone, data, tmp_path / "cut", **FIELDS)
    assert [path.name for path in checkpoints(tmp_path / "cut.training")] == ["checkpoint-4", "checkpoint-2"]
    return tmp_path / "cut"


def told(backbone: str, data: Path, output: Path, **fields: Any) -> list[str]:
    """The lines of a run."""
    lines: list[str] = []
    train(TrainRequest(backbone, data, output, METHOD, dataclasses.replace(RUN, **fields)), say=lines.append)
    return lines


@pytest.mark.parametrize(
    ("name", "content"),
    default_for(
        lambda damage: damage[0] == "adapter_model.safetensors",
        [
            ("adapter_config.json", None),
            ("adapter_model.safetensors", b"torn"),
            ("trainer_state.json", b'{"epoch": 1'),
            ("optimizer.pt", None),
            ("rng_state.pth", b"PK"),
        ],
    ),
)
def test_a_damaged_checkpoint_is_passed_over(
    backbone: str, data: Path, tmp_path: Path, cut: Path, name: str, content: bytes | None
) -> None:
    newest = tmp_path / "cut.training" / "checkpoint-4"
    (newest / name).unlink()
    if content is not None:
        (newest / name).write_bytes(content)
    lines = told(backbone, data, cut, resume=True, **FIELDS)
    assert any(
        line.startswith(f"{newest} is damaged and passed over: ") and name.partition(".")[0] in line for line in lines
    ), lines
    assert f"resuming from {newest.with_name('checkpoint-2')}" in lines
    assert weights(cut) == undisturbed(backbone, data, **FIELDS)


def test_no_whole_checkpoint_starts_anew(backbone: str, data: Path, tmp_path: Path, cut: Path) -> None:
    for checkpoint in checkpoints(tmp_path / "cut.training"):
        (checkpoint / "trainer_state.json").unlink()
    lines = told(backbone, data, cut, resume=True, **FIELDS)
    assert "no checkpoint to resume from: starting at the first step" in lines
    assert weights(cut) == undisturbed(backbone, data, **FIELDS)


def test_nothing_is_trained_after_the_last_step(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended in its evaluation goes on with the evaluation."""

    def stop(*_: Any) -> None:
        raise InterruptedRunError

    monkeypatch.setattr("trainers.training.train.evaluate", stop)
    with pytest.raises(InterruptedRunError):
        run(backbone, data, tmp_path / "cut", **FIELDS)
    monkeypatch.undo()
    interrupt_at(monkeypatch, 5)  # a sixth step would raise
    lines = told(backbone, data, tmp_path / "cut", resume=True, **FIELDS)
    assert "step 5 was the last one: nothing is left to train" in lines
    assert weights(tmp_path / "cut") == undisturbed(backbone, data, **FIELDS)


def test_a_finished_run_is_not_repeated(backbone: str, data: Path, tmp_path: Path) -> None:
    """The same result is returned without a backbone; other settings are no longer the same run."""
    output = tmp_path / "a"
    first = run(backbone, data, output, **FIELDS)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}
    for extra in ({}, {"overwrite": True}):
        again = run(backbone, data, output, resume=True, **FIELDS, **extra)
        assert again == dataclasses.replace(first, seconds=0.0)
    lines = told(backbone, data, output, resume=True, **FIELDS)
    assert lines == [f"{output} is finished and stays as it is; --overwrite without --resume trains it again"]
    with pytest.raises(IaptError, match=r"holds a finished adapter of other settings \(max_steps 5 there, 6 here\)"):
        run(backbone, data, output, resume=True, **{**FIELDS, "max_steps": 6})
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()} == before


def test_an_adapter_without_record_is_not_taken_for_the_same_run(backbone: str, data: Path, tmp_path: Path) -> None:
    """Older versions wrote none."""
    run(backbone, data, tmp_path / "a")
    (tmp_path / "a" / RECORD_FILE).unlink()
    with pytest.raises(IaptError, match="holds a finished adapter, and training writes a new one; give --overwrite"):
        run(backbone, data, tmp_path / "a", resume=True)
    run(backbone, data, tmp_path / "a", resume=True, overwrite=True)
    assert (tmp_path / "a" / RECORD_FILE).is_file()


def test_an_interrupt_at_the_very_end(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter stands at its place already, and only the folder beside it has still to go."""

    remove = shutil.rmtree

    def stop(folder: Path, **options: Any) -> None:
        if folder == tmp_path / "a.training":
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr("trainers.training.work.shutil.rmtree", stop)
        with pytest.raises(InterruptedTraining, match=f"train was interrupted; {tmp_path / 'a'} is finished"):
            run(backbone, data, tmp_path / "a", save_steps=0)
    (line,) = told(backbone, data, tmp_path / "a", save_steps=0, resume=True)
    assert line.startswith(f"{tmp_path / 'a'} is finished and stays as it is")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_reports_survive_json() -> None:
    report = GenerationReport(count=2, tokens=7, loss=1.5, perplexity=4.5)
    assert report_from_dict(report.to_dict()) == report
    assert report_from_dict(None) is None


def test_a_finished_adapter_needs_overwrite(tmp_path: Path, backbone: str, data: Path) -> None:
    """Refused before the backbone is even looked for."""
    run(backbone, data, tmp_path / "a")
    before = read_disk(tmp_path)
    with pytest.raises(IaptError) as caught:
        run("no/such-model", tmp_path / "no data", tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path / 'a'} holds a finished adapter, and training writes a new one; give --overwrite to replace it "
        "when the new one is done, or another --output"
    )
    (tmp_path / "a" / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(IaptError, match=r"exists and is not replaced, because it holds thesis\.tex"):
        run(backbone, data, tmp_path / "a", overwrite=True)
    assert read_disk(tmp_path) == {**before, "a/thesis.tex": b"mine"}


def test_another_run_is_not_gone_on_with(backbone: str, data: Path, tmp_path: Path, cut: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text(encoding="utf-8").replace("film", "play"), encoding="utf-8")
    before = read_disk(tmp_path)
    for given, fields, text in (
        (other, {}, "another data file; resume with the same settings, or delete the folder and start anew"),
        (data, {"learning_rate": 0.5}, "learning_rate 0.01 there, 0.5 here; resume with the same settings"),
    ):
        with pytest.raises(IaptError, match=text):
            run(backbone, given, cut, resume=True, **{**FIELDS, **fields})
    assert read_disk(tmp_path) == before
    (tmp_path / "cut.training" / RECORD_FILE).unlink()  # as older versions left it
    with pytest.raises(
        IaptError, match=r"was written by a run with other settings or another backbone \(.* there, .* here\)"
    ):
        run(backbone, data, cut, dataclasses.replace(METHOD, bias=False), resume=True, **FIELDS)


def test_another_model_in_the_same_place_is_another_run(backbone: str, data: Path, tmp_path: Path) -> None:
    """By its files: neither its path nor the name that goes into the adapter tells."""
    model = tmp_path / "model"
    shutil.copytree(backbone, model)
    config: dict[str, Any] = {"base_model_name": "the/model", "max_steps": 1}
    run(str(model), data, tmp_path / "a", **config)
    assert run(str(model), data, tmp_path / "a", resume=True, **config).steps == 1
    weights_file = model / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"@")
    with pytest.raises(IaptError, match=r"finished adapter of other settings \(another model in the same place\)"):
        run(str(model), data, tmp_path / "a", resume=True, **config)
    record = json.loads((tmp_path / "a" / RECORD_FILE).read_text(encoding="utf-8"))
    del record["settings"]["model_files"]  # as versions wrote it that did not look
    (tmp_path / "a" / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
    assert run(str(model), data, tmp_path / "a", resume=True, **config).steps == 1


def test_checkpoints_are_not_put_among_others_files(backbone: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.training").mkdir()
    (tmp_path / "a.training" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(IaptError, match=r"a\.training is where training would keep .* and it holds notes\.txt; move"):
        run(backbone, data, tmp_path / "a")
    assert (tmp_path / "a.training" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("step", "text"),
    default_for(
        lambda case: case[0] == 4,
        [
            (4, "cut.training/checkpoint-4 is kept, and the same command with --resume goes on from there"),
            (1, "no checkpoint was written yet (see --save-steps), so the same command with --resume starts at the"),
        ],
    ),
)
def test_an_interrupt_says_what_is_kept(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, text: str
) -> None:
    interrupt_at(monkeypatch, step, KeyboardInterrupt)
    with pytest.raises(InterruptedTraining) as caught:
        run(backbone, data, tmp_path / "cut", **FIELDS)
    assert str(caught.value).startswith("train was interrupted; ") and text in str(caught.value)
    shutil.rmtree(tmp_path / "cut.training")
    settings = ("--max-steps=5", "--save-steps=2", "--batch-size=4", "--quiet")
    outcome = run_command("train", f"--model={backbone}", f"--data={data}", f"--output={tmp_path / 'cut'}", *settings)
    assert outcome.code == 130
    assert outcome.err.startswith("iapt-export: error: train was interrupted; ") and text in outcome.err
    monkeypatch.undo()
    again = (f"--model={backbone}", f"--data={data}", f"--output={tmp_path / 'cut'}", *settings, "--resume")
    assert run_command("train", *again).code == 0


def test_a_warm_up_that_the_run_does_not_outlast(backbone: str, data: Path, tmp_path: Path) -> None:
    lines = told(backbone, data, tmp_path / "a", max_steps=3, warmup_steps=20)
    assert (
        "warning: the warm-up takes 20 steps and the run has 3, so the learning rate reaches 1.0e-03 instead of "
        "1.0e-02; a lower warmup_steps leaves it time" in lines
    )
    assert not any("warm-up" in line for line in told(backbone, data, tmp_path / "b", max_steps=3, warmup_steps=2))


def test_a_resumed_card_tells_the_minutes_of_all_runs(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the evaluation was left, and with a checkpoint of a version that did not note the time."""
    clock = iter(range(0, 60 * 10_000, 60))
    monkeypatch.setattr("trainers.training.loop.time.monotonic", lambda: float(next(clock)))
    interrupt_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError):
        run(backbone, data, tmp_path / "a", **FIELDS)
    checkpoint = newest_whole(work_folder(tmp_path / "a"), print)
    assert checkpoint is not None
    before = read_seconds(checkpoint)
    assert before >= 60
    (checkpoint / "seconds.txt").unlink()
    assert read_seconds(checkpoint) == 0
    write_seconds(checkpoint, before + 6000)
    monkeypatch.undo()
    found = run(backbone, data, tmp_path / "a", resume=True, **FIELDS)
    assert before + 6000 < found.seconds < before + 6100
    assert f" {found.seconds / 60:.0f} minutes." in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_for_which_the_disk_is_too_small(backbone: str, data: Path, tmp_path: Path) -> None:
    """torch.save says nothing of the disk; the limit of a file's size is met as a full disk is."""
    whole = undisturbed(backbone, data, **FIELDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.5 * len(whole)), hard))
    try:
        with pytest.raises(IaptError) as caught:
            run(backbone, data, tmp_path / "a", **FIELDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written whole below" in str(caught.value) and "MB are free; free space" in str(caught.value)
    run(backbone, data, tmp_path / "a", resume=True, **FIELDS)
    assert weights(tmp_path / "a") == whole
    assert not work_folder(tmp_path / "a").exists()
