"""A run that is killed before any of its file operations, and resumed, ends as one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainers.runs import run
from tests.trainers.training.kills import Disk, read_disk, states_of_kills, write_disk

FIELDS: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "batch_size": 2, "max_eval_examples": 2, "overwrite": True}


def files_below(disk: Disk, folder: str) -> Disk:
    return {name.removeprefix(folder): data for name, data in disk.items() if name.startswith(f"{folder}/")}


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that remove an old checkpoint at their second step, do not wait for garbage, and all take a second."""
    monkeypatch.setattr("trainers.training.loop.KEPT_CHECKPOINTS", 1)
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    monkeypatch.setattr("trainers.training.loop.AdapterTrainer.seconds", lambda _: 1.0)  # equal states are one state


@pytest.mark.slow
@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("also_in_resumed_runs", [False, True])
def test_killed_anywhere_and_resumed_equals_undisturbed(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also_in_resumed_runs: bool
) -> None:
    """Over an adapter that is replaced: one of the two stands at every moment, and the end is the same to the byte."""
    root = tmp_path / "run"
    run(backbone, data, root / "a", **{**FIELDS, "seed": 1})
    old = read_disk(root)
    with states_of_kills(root, monkeypatch) as states:
        run(backbone, data, root / "a", **FIELDS)
    new = read_disk(root)
    assert new.keys() == old.keys() and new != old
    assert len(states) > 60, "the hook sees the operations"
    first = len(states)
    for number, state in enumerate(states):
        found = [files_below(state, folder) for folder in ("a", "a.training/replaced", "a.training/finished")]
        assert files_below(old, "a") in found or files_below(new, "a") in found
        place = tmp_path / str(number)
        write_disk(state, place)
        with states_of_kills(place, monkeypatch) as later:
            run(backbone, data, place / "a", resume=True, **FIELDS)
        assert read_disk(place) == new, f"kill {number} of {len(states)}: {sorted(state)}"
        if also_in_resumed_runs and number < first:
            states += [state for state in later if state not in states]
