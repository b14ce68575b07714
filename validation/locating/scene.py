"""What a search for the first wrong tensor works on: a failing batch with both sides, and a tensor under suspicion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from validation.sides.recording import Hypothesis, record_row
from validation.sides.reference import Reference
from validation.sides.stepping import Row, Step
from validation.sides.taps import Tap, TappedGraph

Arrays = dict[str, np.ndarray]


@dataclass
class Suspect:
    """A tensor that differs: everything that asking for its source needs."""

    step: int
    tap: Tap
    row: int
    part: str
    """``prompt slots``, ``tokens``, ``older entries`` or ``newest entry``."""
    error: float
    limit: float
    own_error: float | None
    """Error of the module on the target's own input, None where the tap is no module's output."""
    made: list[np.ndarray]
    """The tensor in every row."""
    wanted: list[np.ndarray]
    is_beyond: bool
    """Beyond its limit, and not only much further off than the tensors before."""


@dataclass
class Scene:
    """A failing batch, and both sides."""

    reference: Reference
    rows: Sequence[Row]
    dtype: str
    graphs: dict[str, TappedGraph]
    taps: dict[str, list[Tap]]
    leaves: list[str]
    in_place: bool = False
    step: Step | None = None
    limits: dict[str, float] = field(default_factory=dict)

    def padding(self, row: int) -> int:
        """Entries of padding that the batch puts before a row's instruction."""
        if self.in_place:
            return 0
        return max(len(other.tokens) for other in self.rows) - len(self.rows[row].tokens)

    def slots(self, row: int) -> int:
        """Prompt slots of a row."""
        return self.reference.methods[self.rows[row].tenant].num_slots


def own_entries(array: np.ndarray, step: Step, row: int) -> np.ndarray:
    """A row's own entries of a tensor ``[..., S, D]`` in fp32; tensors of another length are taken whole."""
    array = array.astype(np.float32)
    for axis in range(array.ndim - 1):
        for real in (step.mask[row], step.read_mask[row]):
            if array.shape[axis] == len(real) and len(real) > 1:
                return np.compress(real.astype(bool), array, axis=axis)
    return array


def hypothetical(scene: Scene, suspect: Suspect, hypothesis: Hypothesis) -> np.ndarray | None:
    """The suspect's tensor as PyTorch computes it with a mistake at that step; None where it has no such tensor."""
    arrays: Arrays = {}
    for _, arrays in record_row(scene.reference, scene.rows[suspect.row], suspect.step, hypothesis):  # noqa: B007
        pass
    return arrays.get(suspect.tap.name)
