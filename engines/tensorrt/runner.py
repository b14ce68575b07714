"""Run TensorRT engines on an NVIDIA GPU, for both flavours of TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.cuda.driver import Driver, Gpu, find_driver
from engines.cuda.memory import CudaStream, DeviceArray
from engines.native import load_plugin
from engines.runner import NOWHERE, Array, Runner, check_feeds, numpy_type
from engines.tensorrt.callbacks import make_logger
from engines.tensorrt.engine_info import EngineInfo, read_header
from engines.tensorrt.flavour import PORTABLE, RTX, flavour, load_tensorrt
from iapt_export.contract.errors import BundleError, IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec, TensorSpec


class TensorRTRunner(Runner):
    """One engine on one GPU; see `engines.runner.Runner`.

    Arrays on the host travel on each call, but for read-only ones; bf16 arrays are ``ml_dtypes.bfloat16``.
    """

    def __init__(self, path: Path, spec: GraphSpec, target: str, *, stream: CudaStream | None = None) -> None:
        """Name an engine.

        Args:
            path: its file.
            spec: its interface.
            target: ``tensorrt-rtx`` or ``tensorrt``.
            stream: of the GPU to use; runners that share one also share what they upload. None takes the first GPU.
        """
        self.path = path
        self.spec = spec
        self.target = target
        self.stream = stream or CudaStream()
        self._info: EngineInfo | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._is_open = False

    def activate(self) -> None:
        """Open the engine on the GPU.

        Raises:
            BundleError: the engine or its record is missing or damaged.
            NotRunnableError: TensorRT, the driver or a fitting GPU is missing, or the versions differ.
        """
        if self._context is not None:
            return
        info = load_info(self.path)
        trt = load_tensorrt(self.target)
        check_version(info, str(trt.__version__))
        check_gpu(info, find_driver(), self.stream.device)
        try:
            self._open(trt, info)
        except BaseException:
            self.deactivate()
            raise
        self._info = info

    def infer(self, feeds: Mapping[str, Array], into: Mapping[str, Array] = NOWHERE) -> dict[str, Any]:
        """Run the graph once; see `engines.runner.Runner.infer`.

        Raises:
            IaptError: also when a size lies outside what the engine was built for.
        """
        if self._context is None or self._info is None:
            raise IaptError(f"{self.spec.path}: the runner is not active; use it in a with block or call activate()")
        check_feeds(self.spec, feeds)
        check_profile(self.spec, self._info, {tensor.name: feeds[tensor.name].shape for tensor in self.spec.inputs})
        for tensor in self.spec.inputs:
            array = feeds[tensor.name]
            self._context.set_input_shape(tensor.name, array.shape)
            self._context.set_tensor_address(tensor.name, self._address(tensor.name, array))
        outputs = self._bind_outputs(into)
        if not self._context.execute_async_v3(self.stream.handle):
            raise IaptError(f"{self.spec.path}: TensorRT fails to run: {self._reasons()}")
        for name, array in outputs.items():
            if isinstance(array, np.ndarray):
                self.stream.download(name, array)
        self.stream.synchronize()
        return outputs

    def zeros(self, dtype: str, shape: Sequence[int]) -> DeviceArray:
        """See `engines.runner.Runner.zeros`; they stand on the GPU."""
        return self.stream.zeros(shape, numpy_type(dtype))

    def host_empty(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """See `engines.runner.Runner.host_empty`; pinned."""
        return self.stream.pinned(shape, numpy_type(dtype))

    def deactivate(self) -> None:
        """Give the GPU's memory back."""
        # a context must go before its engine, and that before its runtime
        self._context = self._engine = self._runtime = self._info = None
        if self._is_open:
            self._is_open = False
            self.stream.close()

    def _open(self, trt: Any, info: EngineInfo) -> None:
        self.stream.open()
        self._is_open = True
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        if info.rational == "plugin":
            load_plugin(self._runtime.get_plugin_registry(), self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        self._context = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            raise NotRunnableError(
                f"{self.target} {trt.__version__} cannot open {self.path}: {self._reasons()}; "
                "build the engine again for this machine, and see iapt-export doctor"
            )

    def _address(self, name: str, array: Any) -> int:
        """Where an input stands on the GPU, uploaded if it has to be."""
        if isinstance(array, DeviceArray):
            return _whole(name, array).address
        return self.stream.upload(name, array)

    def _bind_outputs(self, into: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays given, or empty ones of the sizes that TensorRT infers from the inputs', with the GPU's bound."""
        arrays = {}
        for tensor in self.spec.outputs:
            array = into.get(tensor.name)
            if array is None:
                array = self._empty(tensor)
            if isinstance(array, DeviceArray):
                address = _whole(tensor.name, array).address
            else:
                address = self.stream.reserve(tensor.name, array.nbytes)
            self._context.set_tensor_address(tensor.name, address)
            arrays[tensor.name] = array
        return arrays

    def _empty(self, tensor: TensorSpec) -> np.ndarray:
        shape = tuple(self._context.get_tensor_shape(tensor.name))
        if any(size < 0 for size in shape):
            raise IaptError(
                f"{self.spec.path}: the size of output {tensor.name} depends on the inputs' values; "
                "expected a graph whose sizes follow from its inputs' sizes"
            )
        return np.empty(shape, numpy_type(tensor.dtype))

    def _reasons(self) -> str:
        return "; ".join(self._logger.lines()) or "it gives no reason"


def _whole(name: str, array: DeviceArray) -> DeviceArray:
    if not array.is_contiguous:
        raise ValueError(f"{name}: an array that an engine reads or writes must have no gaps")
    return array


def load_info(engine_path: Path) -> EngineInfo:
    """An engine's record, checked against the file's size.

    Raises:
        BundleError: the engine or its record is missing, or the engine is truncated.
    """
    if not engine_path.is_file():
        raise BundleError(f"{engine_path} is missing; copy or build the bundle again")
    info = EngineInfo.load(engine_path)
    size = engine_path.stat().st_size
    if size != info.size_bytes:
        raise BundleError(
            f"{engine_path} has {size} bytes, expected {info.size_bytes}: it is truncated; copy or build it again"
        )
    header = read_header(engine_path) if info.target == RTX.target else None
    if header is not None and header.runtime_version != info.runtime_version:
        raise BundleError(
            f"{engine_path} was built by {info.target} {header.runtime_version}, its record says "
            f"{info.runtime_version}; copy or build both again"
        )
    return info


def check_version(info: EngineInfo, installed: str) -> None:
    """Refuse an engine of another version of TensorRT.

    Raises:
        NotRunnableError: the installed version cannot open it.
    """
    if installed == info.runtime_version:
        return
    if info.version_compatible and _numbers(installed) >= _numbers(info.runtime_version):
        return
    raise NotRunnableError(
        f"the engine was built by {info.target} {info.runtime_version}, installed is {installed}, and engines open "
        f"only in the version that built them; install {info.runtime_version}, or build the engine again here"
    )


def check_gpu(info: EngineInfo, driver: Driver, device: int) -> None:
    """Refuse to open an engine where no fitting GPU is.

    Raises:
        NotRunnableError: no driver, no such GPU, or one of another compute capability.
    """
    wanted = flavour(info.target)
    fitting = wanted.portable if info.compute_capability == PORTABLE else (info.compute_capability,)
    listed = " or ".join(part for part in (", ".join(fitting[:-1]), fitting[-1]) if part)
    need = f"an NVIDIA GPU of compute capability {listed} and its driver, {wanted.driver} or newer"
    if driver.problem:
        raise NotRunnableError(
            f"{info.target} engines do not run here: {driver.problem}; this engine needs {need}. "
            "'iapt-export doctor' shows what this machine has"
        )
    if device >= len(driver.gpus):
        raise NotRunnableError(f"GPU {device} does not exist, this machine has {len(driver.gpus)}; choose a lower one")
    gpu = driver.gpus[device]
    # a data-centre engine may have been built to run elsewhere too; TensorRT itself knows and says so
    if info.target == RTX.target and gpu.compute_capability not in fitting:
        raise NotRunnableError(f"{_described(gpu)} cannot run this engine, which needs {need}; build it for this GPU")


def check_profile(spec: GraphSpec, info: EngineInfo, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse sizes that the engine was not built for.

    Raises:
        IaptError: with every problem listed, in the manifest's words: batch, sequence, past, tenants.
    """
    problems = []
    profile = info.profiles[0]
    for tensor in spec.inputs:
        if tensor.name not in profile:
            continue
        shape = profile[tensor.name]
        for axis, size in enumerate(shapes[tensor.name]):
            low, high = shape.min[axis], shape.max[axis]
            if not low <= size <= high:
                problems.append(f"{tensor.shape[axis]} is {size}, the engine takes {low} to {high}")
    if problems:
        raise IaptError(f"{spec.path}: " + "; ".join(dict.fromkeys(problems)) + "; build with a wider range")


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.compute_capability})"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
