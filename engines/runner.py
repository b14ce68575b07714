"""The contract of everything that runs a graph: activate, infer, deactivate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import numpy as np

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec

Arrays = dict[str, np.ndarray]

NUMPY_TYPES = {
    "int64": "int64",
    "int32": "int32",
    "bool": "bool",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""Tensor types of the manifest to NumPy's names (``bfloat16`` comes with ml_dtypes)."""


class Activated(ABC):
    """Made cheaply, loaded by `activate`, given back by `deactivate`; as a context manager it does both."""

    @abstractmethod
    def activate(self) -> None:
        """Load what is needed; a second call does nothing.

        Raises:
            NotRunnableError: this machine lacks what is needed; the text says what would run it.
        """

    @abstractmethod
    def deactivate(self) -> None:
        """Give memory back; a second call does nothing."""

    def __enter__(self) -> Self:
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()


class Runner(Activated):
    """Runs one graph over named arrays."""

    spec: GraphSpec
    """The graph's interface."""

    @abstractmethod
    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph once.

        Args:
            feeds: every input by name, of the manifest's types and shapes.

        Returns:
            Every output by name.

        Raises:
            IaptError: the runner is not active, or an input is missing, unknown, or of another type or shape.
        """


def check_feeds(spec: GraphSpec, feeds: Arrays) -> None:
    """Check inputs against a graph's interface: names, types, ranks, fixed sizes, equal dynamic sizes.

    Raises:
        IaptError: with every problem listed.
    """
    problems = [f"input {tensor.name} is missing" for tensor in spec.inputs if tensor.name not in feeds]
    known = {tensor.name for tensor in spec.inputs}
    problems += [f"input {name} is not known" for name in feeds if name not in known]
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        array = feeds.get(tensor.name)
        if array is None:
            continue
        if array.dtype.name != NUMPY_TYPES[tensor.dtype]:
            problems.append(f"input {tensor.name} is {array.dtype.name}, expected {NUMPY_TYPES[tensor.dtype]}")
        if len(array.shape) != len(tensor.shape):
            problems.append(f"input {tensor.name} has shape {array.shape}, expected {tensor.shape}")
            continue
        for size, expected in zip(array.shape, tensor.shape, strict=True):
            wanted = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
            if size != wanted:
                problems.append(f"input {tensor.name} has shape {array.shape}, expected {expected}={wanted}")
    if problems:
        raise IaptError(f"{spec.path}: " + "; ".join(problems))
