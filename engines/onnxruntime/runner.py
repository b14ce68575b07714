"""Run ONNX graphs with ONNX Runtime, on the CPU or, where its build has CUDA, on an NVIDIA GPU (not run on one yet)."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.cuda.memory import CudaStream, DeviceArray
from engines.native import add_kernels
from engines.onnxruntime.cores import available_cores
from engines.onnxruntime.devices import (
    ERRORS,
    OPTIONS,
    PROVIDERS,
    check_provider,
    preload_cuda,
    require_device,
    require_rounded_cache,
)
from engines.runner import NOWHERE, Array, Arrays, Runner, check_feeds, numpy_type
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from iapt_export.contract.resources import give_back_memory

ONNX_BFLOAT16 = 16
"""``onnx.TensorProto.BFLOAT16``; the onnx package is no need of a deployment machine."""


class OnnxRuntimeRunner(Runner):
    """One ONNX graph in an ONNX Runtime session; see `engines.runner.Runner`.

    bf16 arrays travel as ``ml_dtypes.bfloat16``, which ONNX Runtime takes as OrtValues only.

    On a GPU, `zeros` gives arrays in its memory, which the graph reads and writes where they stand; arrays on the host
    are copied to it in each call, read-only ones once.
    """

    def __init__(self, path: Path, spec: GraphSpec, *, device: str = "cpu", threads: int | None = None) -> None:
        self.path = path
        self.spec = spec
        self.device = device
        self.threads = threads
        self.rational = ""
        """Which form of ``ai.iapt::Rational`` runs, once active: the native kernel or the function body."""
        self._stream: CudaStream | None = None
        """Of what `zeros` gave on a GPU."""
        self._session: Any = None
        self._binding: Any = None
        self._fed: list[Any] = []
        """What the binding's inputs point to; `_given` is for its outputs. They keep the memory alive."""
        self._given: list[Any] = []

    def activate(self) -> None:
        """Load the graph.

        Raises:
            NotRunnableError: ONNX Runtime is not installed, does not run on the device, or is a release that is known
                to compute wrongly.
            IaptError: ONNX Runtime refuses the file.
        """
        if self._session is not None:
            return
        onnxruntime = require_device(self.device)
        if any(tensor.dtype == "int8" for tensor in self.spec.inputs):
            require_rounded_cache()
        if self.device == "cuda":
            preload_cuda(onnxruntime)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS
        options.intra_op_num_threads = self.threads or available_cores()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.rational = add_kernels(options, self.device)
        try:
            provider = (PROVIDERS[self.device], OPTIONS[self.device])
            session = onnxruntime.InferenceSession(str(self.path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            reason = str(error).strip().splitlines()[0]
            if "Opset 24 is under development" in reason or "TensorScatter(24)" in reason:
                reason = (
                    f"it needs TensorScatter, which ONNX Runtime has from 1.25 on; this is {onnxruntime.__version__}"
                )
            raise IaptError(f"ONNX Runtime refuses {self.path}: {reason}") from error
        check_provider(session, self.device)
        self._session = session

    def infer(self, feeds: Mapping[str, Array], into: Mapping[str, Array] = NOWHERE) -> dict[str, Any]:
        """Run the graph once; see `engines.runner.Runner.infer`."""
        if self._session is None:
            raise IaptError(f"{self.spec.path}: the runner is not active; use it in a with block or call activate()")
        if into:
            return self._run_bound(feeds, into)
        check_feeds(self.spec, feeds)
        arrays = {tensor.name: np.ascontiguousarray(feeds[tensor.name]) for tensor in self.spec.inputs}
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._run(names, arrays), strict=True))

    def beside(self) -> OnnxRuntimeRunner | None:
        """See `engines.runner.Runner.beside`: a session takes calls of several threads, a binding does not."""
        if self.device != "cpu":
            return None
        other = copy.copy(self)
        other._binding, other._fed, other._given = None, [], []
        return other

    def zeros(self, dtype: str, shape: Sequence[int]) -> Array:
        """See `engines.runner.Runner.zeros`; on the CPU the system gives the memory as it is written.

        Raises:
            NotRunnableError: CUDA's Python bindings are not installed.
        """
        if self.device == "cpu":
            return np.zeros(shape, numpy_type(dtype))
        return self._open_stream().zeros(shape, numpy_type(dtype))

    def host_empty(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """See `engines.runner.Runner.host_empty`; pinned beside a GPU."""
        if self.device == "cpu":
            return super().host_empty(dtype, shape)
        return self._open_stream().pinned(shape, numpy_type(dtype))

    def deactivate(self) -> None:
        """Give the session's memory back."""
        was_open = self._session is not None
        self._session = self._binding = None
        self._fed, self._given = [], []
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        if was_open:
            give_back_memory()

    def _open_stream(self) -> CudaStream:
        if self._stream is None:
            stream = CudaStream()
            stream.open()
            self._stream = stream
        return self._stream

    def _run(self, names: list[str], feeds: Arrays) -> list[np.ndarray]:
        if not any(tensor.dtype == "bf16" for tensor in self.spec.inputs):
            return self._session.run(names, feeds)  # quicker than a binding where outputs are new
        import onnxruntime

        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ONNX_BFLOAT16)
            if array.dtype.name == "bfloat16"
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        return [_array_from_value(value) for value in self._session.run_with_ort_values(names, values)]

    def _run_bound(self, feeds: Mapping[str, Any], into: Mapping[str, Any]) -> dict[str, Any]:
        """Run over the arrays' own memory."""
        try:
            new = self._bind(feeds, into)
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            self._binding = None  # what it points to is not sure any more
            if isinstance(error, IaptError | ValueError):
                raise
            raise IaptError(f"ONNX Runtime failed in {self.spec.path}: {str(error).strip().splitlines()[0]}") from error
        if not new:
            return dict(into)
        values = dict(zip([tensor.name for tensor in self.spec.outputs], self._binding.get_outputs(), strict=True))
        return {**into, **{name: _array_from_value(values[name]) for name in new}}

    def _bind(self, feeds: Mapping[str, Any], into: Mapping[str, Any]) -> list[str]:
        """Bind what is another object than in the call before; names of the outputs that ONNX Runtime allocates."""
        if self._binding is None:
            self._binding = self._session.io_binding()
            self._fed, self._given = [self] * len(self.spec.inputs), [self] * len(self.spec.outputs)
        fed: list[Any] = [feeds.get(tensor.name) for tensor in self.spec.inputs]
        changed = [n for n, (array, last) in enumerate(zip(fed, self._fed, strict=True)) if array is not last]
        check_feeds(self.spec, feeds, [self.spec.inputs[n] for n in changed])
        written = {id(array) for array in into.values()}
        for n in changed:
            tensor, array = self.spec.inputs[n], fed[n]
            stays = self._stays(array, written)
            if stays or tensor.dtype == "bf16":
                self._binding.bind_input(tensor.name, *_place(tensor, array))
            else:  # quicker, but nothing says that its memory is read again in the next call
                self._binding.bind_cpu_input(tensor.name, array)
            if not stays:
                fed[n] = self
        given = [into.get(tensor.name) for tensor in self.spec.outputs]
        new = []
        for n, (array, last) in enumerate(zip(given, self._given, strict=True)):
            if array is None:  # bound again each time, because a binding keeps what it allocated
                new.append(self.spec.outputs[n].name)
                self._binding.bind_output(new[-1], "cpu")
            elif array is not last:
                self._binding.bind_output(self.spec.outputs[n].name, *_place(self.spec.outputs[n], array))
        self._fed, self._given = fed, given
        return new

    def _stays(self, array: np.ndarray | DeviceArray, written: set[int]) -> bool:
        """Whether what is bound is right in the next call too; of an array on the host a GPU has a copy."""
        if isinstance(array, DeviceArray) or not array.flags.writeable:
            return True
        return self.device == "cpu" and id(array) in written


def _place(tensor: TensorSpec, array: np.ndarray | DeviceArray) -> tuple[str, int, Any, tuple[int, ...], int]:
    """An array's memory, as a binding takes it."""
    kind = ONNX_BFLOAT16 if tensor.dtype == "bf16" else array.dtype
    if isinstance(array, DeviceArray):
        if not array.is_contiguous:
            raise ValueError("an array that is bound must be contiguous")
        return "cuda", array.stream.device, kind, array.shape, array.address
    if not array.flags.c_contiguous:
        raise ValueError("an array that is bound must be C-contiguous")
    return "cpu", 0, kind, array.shape, array.ctypes.data


def _array_from_value(value: Any) -> np.ndarray:
    """An OrtValue's data; bf16, which NumPy lacks, as ``ml_dtypes.bfloat16``."""
    if "bfloat16" not in value.data_type():
        return value.numpy()
    import ml_dtypes

    array = np.empty(value.shape(), ml_dtypes.bfloat16)
    if array.size:  # ONNX Runtime converts no bf16 to NumPy, so its memory is read; outputs stand on the CPU
        ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array
