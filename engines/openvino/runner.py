"""Run portable graphs with OpenVINO on the CPU: a second opinion on a bundle (``validate --runner openvino``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.runner import NOWHERE, Array, Runner, check_feeds, numpy_type
from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec


def load_openvino() -> Any:
    """The module.

    Raises:
        NotRunnableError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise NotRunnableError("OpenVINO is not installed; try: pip install -e '.[openvino]'") from error
    return openvino


class OpenVINORunner(Runner):
    """One ONNX graph, compiled by OpenVINO for the CPU in fp32; see `engines.runner.Runner`."""

    def __init__(self, path: Path, spec: GraphSpec) -> None:
        self.path = path
        self.spec = spec
        self._compiled: Any = None

    def activate(self) -> None:
        """Compile the graph.

        Raises:
            NotRunnableError: OpenVINO is not installed.
            IaptError: OpenVINO refuses the file.
        """
        if self._compiled is not None:
            return
        core = load_openvino().Core()
        try:
            # without the hint it computes in bf16 where the processor can
            self._compiled = core.compile_model(core.read_model(self.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise IaptError(f"OpenVINO refuses {self.path}: {_last_line(error)}") from error

    def infer(self, feeds: Mapping[str, Array], into: Mapping[str, Array] = NOWHERE) -> dict[str, Any]:
        """Run the graph once; see `engines.runner.Runner.infer`."""
        if self._compiled is None:
            raise IaptError(f"{self.spec.path}: the runner is not active; use it in a with block or call activate()")
        check_feeds(self.spec, feeds)
        read = {port.any_name for port in self._compiled.inputs}  # what nothing reads is no input any more
        arrays = {name: np.ascontiguousarray(feeds[name]) for name in read}
        try:
            made = self._compiled(arrays)
        except RuntimeError as error:
            raise IaptError(f"OpenVINO failed in {self.spec.path}: {_last_line(error)}") from error
        outputs: dict[str, Any] = {tensor.name: np.array(made[tensor.name]) for tensor in self.spec.outputs}
        for name, array in into.items():
            array[...] = outputs[name]
            outputs[name] = array
        return outputs

    def zeros(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """See `engines.runner.Runner.zeros`."""
        return np.zeros(shape, numpy_type(dtype))

    def deactivate(self) -> None:
        """Give the compiled graph's memory back."""
        self._compiled = None


def _last_line(error: BaseException) -> str:
    """OpenVINO's texts begin with places in its own sources and end with the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
