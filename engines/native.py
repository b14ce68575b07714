"""The compiled parts, which ``make cpp`` makes: where they are, and what they do for ONNX Runtime.

Everything works without them: a graph carries the definition of ``ai.iapt::Rational`` as a function body.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import NotRunnableError

LIBRARIES = Path(__file__).parent / "lib"
"""Where ``make cpp`` installs them."""
OPS_LIBRARY = "libiapt_ops.so"
PLUGIN_LIBRARY = "libiapt_trt_plugin.so"
OPS_VARIABLE = "IAPT_OPS_LIBRARY"
"""Names another file than the installed one; ``none`` asks for the function body."""
PLUGIN_VARIABLE = "IAPT_PLUGIN_LIBRARY"
PLUGIN_NAME, PLUGIN_VERSION = "Rational", "1"
"""What TensorRT's parser looks for: the operator's name, and the version that it assumes."""
KERNEL, BODY = "native kernel", "function body"


def ops_library() -> Path | None:
    """The kernels for ONNX Runtime, or None where the function body serves."""
    return _library(OPS_VARIABLE, OPS_LIBRARY)


def plugin_library() -> Path:
    """The TensorRT plugin.

    Raises:
        NotRunnableError: it was not built here.
    """
    path = _library(PLUGIN_VARIABLE, PLUGIN_LIBRARY)
    if path is None:
        raise NotRunnableError(
            f"{PLUGIN_LIBRARY} is not here; build it with 'make cpp' where nvcc is, name it in ${PLUGIN_VARIABLE}, "
            "or build the bundle with --rational function"
        )
    return path


def load_plugin(registry: Any, logger: Any) -> None:
    """Register the TensorRT plugin, unless it is registered already.

    Args:
        registry: a TensorRT ``IPluginRegistry``.
        logger: what `engines.tensorrt.callbacks.make_logger` made, for TensorRT's reasons.

    Raises:
        NotRunnableError: the plugin is not built, or TensorRT refuses it.
    """
    path = plugin_library()
    if registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, "") is not None:
        return
    if not path.is_file() or registry.load_library(str(path)) is None:
        reasons = "; ".join(logger.lines()) or "it does not exist or gives no reason"
        raise NotRunnableError(f"TensorRT cannot load {path}: {reasons}; build it again with 'make cpp'")


def add_kernels(options: Any, device: str = "cpu") -> str:
    """Give ONNX Runtime's session options the kernels of `ops_library`, where they serve.

    Args:
        options: an ``onnxruntime.SessionOptions``.
        device: ``cpu`` or ``cuda``; kernels without CUDA parts would fetch each tensor from the GPU.

    Returns:
        Which form of ``ai.iapt::Rational`` runs, and why when a library that is there is not used.
    """
    path = ops_library()
    if path is None:
        return BODY
    try:
        if device == "cuda" and not ctypes.CDLL(str(path)).iapt_ops_has_cuda():
            return f"{BODY} ({path.name} was built without CUDA)"
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return f"{BODY} ({path.name} does not load: {str(error).strip().splitlines()[0]})"
    return KERNEL


def _library(variable: str, name: str) -> Path | None:
    named = os.environ.get(variable, "")
    if named == "none":
        return None
    path = Path(named) if named else LIBRARIES / name
    return path if path.is_file() or named else None
