"""What the training tests share: one short run, and how to end it early."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

from trainers.adapters.adapter import WEIGHTS_FILE
from trainers.methods.configs import IAPTConfig
from trainers.training.config import TrainConfig, TrainRequest
from trainers.training.loop import AdapterTrainer
from trainers.training.train import TrainResult, train

METHOD = IAPTConfig(bottleneck=8)
RUN = TrainConfig(
    max_steps=6, batch_size=4, warmup_steps=2, logging_steps=1, max_eval_examples=8, learning_rate=1e-2, baseline=False
)


def quiet(_line: str) -> None:
    """Progress is not under test here."""


def run(backbone: str, data: Path, output: Path, method: Any = METHOD, **fields: Any) -> TrainResult:
    return train(TrainRequest(backbone, data, output, method, dataclasses.replace(RUN, **fields)), say=quiet)


@functools.cache
def _undisturbed(backbone: str, data: Path, method: Any, fields: tuple[tuple[str, Any], ...]) -> tuple[bytes, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = run(backbone, data, Path(folder) / "whole", method, **dict(fields))
        return weights(Path(folder) / "whole"), tuple(result.history)


def undisturbed(backbone: str, data: Path, method: Any = METHOD, **fields: Any) -> bytes:
    """The weights of a run that nothing happens to; equal ones run once in a process, since equal seeds repeat them."""
    return _undisturbed(backbone, data, method, tuple(sorted(fields.items())))[0]


def undisturbed_losses(backbone: str, data: Path, method: Any = METHOD, **fields: Any) -> list[float]:
    """The same run's losses, step by step."""
    return [loss for _, loss in _undisturbed(backbone, data, method, tuple(sorted(fields.items())))[1]]


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


class InterruptedRunError(Exception):
    """Stands for Ctrl-C."""


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException] = InterruptedRunError
) -> None:
    """Let the coming run end after so many steps."""
    step = AdapterTrainer.training_step

    def interrupt(self: AdapterTrainer, *arguments: Any) -> Any:
        if self.state.global_step == number:
            raise error
        return step(self, *arguments)

    monkeypatch.setattr(AdapterTrainer, "training_step", interrupt)
