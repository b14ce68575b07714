"""PyTorch in, adapter directories out: the prompt-tuning methods and how they are trained.

Shape legend, used in every docstring and trailing comment of this package:

    B batch          T instruction tokens    P prompt tokens per layer   L layers
    D hidden width   R bottleneck width      G weight-sharing groups     V vocabulary
    m numerator degree                       n denominator degree

``trainers.train(trainers.TrainRequest(...))`` trains an adapter. The names are imported when they are asked for, so
that importing this package loads no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "train": "trainers.training.train",
    "TrainRequest": "trainers.training.config",
    "TrainConfig": "trainers.training.config",
}
__all__ = ["train", "TrainRequest", "TrainConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
