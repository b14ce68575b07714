"""Run ONNX graphs with ONNX Runtime, on the CPU or on a CUDA GPU when its build has one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from engines.native import add_kernels
from engines.runner import Arrays, Runner, check_feeds
from iapt_export.contract.errors import IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec

ONNX_BFLOAT16 = 16
"""``onnx.TensorProto.BFLOAT16``; the onnx package is no need of a deployment machine."""
FAULTY_VERSIONS = {
    "1.23.0": "its Attention-23 is wrong where several query heads share a key head (logits off by 0.84 of the largest)"
}
"""Releases of ONNX Runtime that compute something else without a word."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeRunner(Runner):
    """One ONNX graph in an ONNX Runtime session; see `engines.runner.Runner`.

    bf16 arrays travel as ``ml_dtypes.bfloat16``, which ONNX Runtime takes as OrtValues only.
    """

    def __init__(self, path: Path, spec: GraphSpec, *, device: str = "cpu", threads: int | None = None) -> None:
        self.path = path
        self.spec = spec
        self.device = device
        self.threads = threads
        self.rational = ""
        """Which form of ``ai.iapt::Rational`` runs, once active: the native kernel or the function body."""
        self._session: Any = None

    def activate(self) -> None:
        """Load the graph.

        Raises:
            NotRunnableError: ONNX Runtime is not installed, lacks the device's provider, or is a release that is known
                to compute wrongly.
            IaptError: ONNX Runtime refuses the file.
        """
        if self._session is not None:
            return
        try:
            import onnxruntime
        except ImportError as error:
            raise NotRunnableError("ONNX Runtime is not installed; try: pip install onnxruntime") from error
        if reason := FAULTY_VERSIONS.get(onnxruntime.__version__):
            raise NotRunnableError(
                f"ONNX Runtime {onnxruntime.__version__} gives wrong answers: {reason}; "
                "expected 1.23.1 or newer: pip install --upgrade onnxruntime"
            )
        provider = PROVIDERS.get(self.device)
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise NotRunnableError(
                f"device {self.device!r} is not available: this ONNX Runtime offers {', '.join(available)}; "
                "use --device cpu, or install onnxruntime-gpu on a machine with an NVIDIA GPU"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or len(os.sched_getaffinity(0))
        self.rational = add_kernels(options, self.device)
        try:
            self._session = onnxruntime.InferenceSession(str(self.path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise IaptError(f"ONNX Runtime refuses {self.path}: {str(error).strip().splitlines()[0]}") from error

    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph once; see `engines.runner.Runner.infer`."""
        if self._session is None:
            raise IaptError(f"{self.spec.path}: the runner is not active; use it in a with block or call activate()")
        check_feeds(self.spec, feeds)
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._run(names, feeds), strict=True))

    def _run(self, names: list[str], feeds: Arrays) -> list[np.ndarray]:
        if not any(tensor.dtype == "bf16" for tensor in self.spec.inputs):
            return self._session.run(names, feeds)
        import onnxruntime

        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ONNX_BFLOAT16)
            if array.dtype.name == "bfloat16"
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        return [_array_from_value(value) for value in self._session.run_with_ort_values(names, values)]

    def new_binding(self) -> Any:
        """A set of inputs and outputs in memory that the caller owns, for `run_bound`."""
        if self._session is None:
            raise IaptError(f"{self.spec.path}: the runner is not active; use it in a with block or call activate()")
        return self._session.io_binding()

    def bind(self, binding: Any, name: str, array: np.ndarray) -> None:
        """Let an input be read where a C-contiguous array stands; the caller keeps the array alive."""
        binding.bind_input(name, "cpu", 0, _element_type(array), array.shape, array.ctypes.data)

    def bind_output(self, binding: Any, name: str, array: np.ndarray) -> None:
        """Let an output be written where a C-contiguous array stands; the caller keeps the array alive."""
        binding.bind_output(name, "cpu", 0, _element_type(array), array.shape, array.ctypes.data)

    def run_bound(self, binding: Any) -> None:
        """Run the graph once over bound memory.

        Raises:
            IaptError: ONNX Runtime fails.
        """
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise IaptError(f"ONNX Runtime failed in {self.spec.path}: {str(error).strip().splitlines()[0]}") from error

    def deactivate(self) -> None:
        """Give the session's memory back."""
        self._session = None


def _element_type(array: np.ndarray) -> Any:
    return ONNX_BFLOAT16 if array.dtype.name == "bfloat16" else array.dtype


def _array_from_value(value: Any) -> np.ndarray:
    """An OrtValue's data; bf16, which NumPy lacks, as ``ml_dtypes.bfloat16``."""
    if "bfloat16" not in value.data_type():
        return value.numpy()
    import ml_dtypes

    array = np.empty(value.shape(), ml_dtypes.bfloat16)
    if array.size:  # ONNX Runtime converts no bf16 to NumPy, so its memory is read; outputs stand on the CPU
        ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array
