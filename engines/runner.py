"""The contract of everything that runs a graph: activate, infer, deactivate."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

import numpy as np

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from iapt_export.contract.types import TENSOR_TYPES

Arrays = dict[str, np.ndarray]
"""Named arrays on the host."""


@functools.cache
def numpy_type(dtype: str) -> np.dtype[Any]:
    """NumPy's type for one of the manifest, such as ``fp16``; bf16 comes with ml_dtypes."""
    if dtype == "bf16":
        import ml_dtypes

        dtype_of_bf16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype_of_bf16
    return np.dtype(TENSOR_TYPES[dtype])


class Array(Protocol):
    """An array that knows where it lives: NumPy's on the host, a runner's own elsewhere, such as in a GPU's memory.

    Parts ``array[row]``, ``array[first:last]``, ``array[row, :, :entries]`` share its memory; ``array[...] = other``
    copies where it lives, and ``numpy.array(array)`` to the host.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""

    def __getitem__(self, key: Any, /) -> Any: ...

    def __setitem__(self, key: Any, value: Any, /) -> None: ...


NOWHERE: Mapping[str, Array] = MappingProxyType({})


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
    def infer(self, feeds: Mapping[str, Array], into: Mapping[str, Array] = NOWHERE) -> dict[str, Any]:
        """Run the graph once.

        Args:
            feeds: every input by name, of the manifest's types and shapes; others are left alone. A read-only array
                says that its content stays as it is while the same object is fed, so that a runner may keep what it
                made of it, such as an upload.
            into: outputs that are written to memory which is there already, for example an input's own.

        Returns:
            Every output by name: the array given in ``into``, or a new one on the host.

        Raises:
            IaptError: the runner is not active, an input is missing or of another type or shape, or the runtime
                fails.
        """

    @abstractmethod
    def zeros(self, dtype: str, shape: Sequence[int]) -> Array:
        """Zeros where this runner wants to find what stays between its calls; they live until it is deactivated.

        Args:
            dtype: a type of the manifest, such as ``fp16``.
            shape: sizes of the axes.
        """

    def beside(self) -> Runner | None:
        """Another runner of the same loaded graph, for a second thread; None where only one call may run at a time.

        It shares the weights, is active as long as this one is, and needs no `deactivate`.
        """
        return None

    def host_empty(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """An array on the host, its content unknown, to which outputs come quickest; it lives as long as it is used.

        Args:
            dtype: a type of the manifest, such as ``fp16``.
            shape: sizes of the axes.
        """
        return np.empty(shape, numpy_type(dtype))


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Array], inputs: Sequence[TensorSpec] | None = None) -> None:
    """Check inputs against a graph's interface: types, ranks, fixed sizes, equal dynamic sizes.

    Args:
        spec: the graph.
        feeds: arrays by name; those that the graph does not take are left alone.
        inputs: which of the graph's inputs; None checks all.

    Raises:
        IaptError: with every problem listed.
    """
    problems = []
    sizes: dict[str, int] = {}
    for tensor in spec.inputs if inputs is None else inputs:
        array = feeds.get(tensor.name)
        if array is None:
            problems.append(f"input {tensor.name} is missing")
            continue
        if array.dtype != numpy_type(tensor.dtype):
            problems.append(f"input {tensor.name} is {array.dtype.name}, expected {TENSOR_TYPES[tensor.dtype]}")
        if len(array.shape) != len(tensor.shape):
            problems.append(f"input {tensor.name} has shape {array.shape}, expected {tensor.shape}")
            continue
        for size, expected in zip(array.shape, tensor.shape, strict=True):
            wanted = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
            if size != wanted:
                problems.append(f"input {tensor.name} has shape {array.shape}, expected {expected}={wanted}")
    if problems:
        raise IaptError(f"{spec.path}: " + "; ".join(problems))
