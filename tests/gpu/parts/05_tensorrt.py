"""TensorRT on this GPU: what RTX says of Hopper, the data-centre library where it is, and the plugin's registration."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.gpu.part import Skip, Work, first_line

TITLE = "TensorRT"
LIMIT_S = 150
ROOT = Path(__file__).resolve().parents[3]
HEADERS = ROOT / ".cache" / "native" / "tensorrt"


def run(work: Work) -> None:
    """What is installed decides what is asked."""
    work.attempt("our runner refuses an RTX engine on a GPU that RTX does not serve", lambda: refusal(work))
    work.attempt("TensorRT for RTX", lambda: library(work, "tensorrt-rtx"))
    work.attempt("TensorRT", lambda: library(work, "tensorrt"))
    work.attempt("plugin", lambda: plugin(work))


def refusal(work: Work) -> None:
    """The check that comes before TensorRT is asked, on the GPU that is here."""
    from engines.cuda.driver import Driver, Gpu, find_driver
    from engines.tensorrt.engine_info import EngineInfo
    from engines.tensorrt.flavour import RTX
    from engines.tensorrt.runner import check_gpu
    from iapt_export.contract.errors import NotRunnableError

    driver = find_driver()
    if driver.problem:
        if work.device == "cuda":
            raise Skip(driver.problem)
        driver = Driver((Gpu("NVIDIA H100", "9.0", 80 << 30),), "13.0")
    fields = dict.fromkeys(EngineInfo.__dataclass_fields__, "")
    info = EngineInfo(**{**fields, "target": RTX.target, "compute_capability": "portable"})  # type: ignore[arg-type]
    served = driver.gpus[0].compute_capability in RTX.portable
    try:
        check_gpu(info, driver, 0)
        work.check("an RTX engine is let through where RTX serves the GPU, and refused elsewhere", served)
    except NotRunnableError as error:
        work.check(
            "an RTX engine is let through where RTX serves the GPU, and refused elsewhere", not served, str(error)
        )


def library(work: Work, target: str) -> None:
    """Load a library, make its runtime and builder, and keep its own words."""
    from engines.tensorrt.callbacks import make_logger
    from engines.tensorrt.flavour import load_tensorrt
    from iapt_export.contract.errors import NotRunnableError

    try:
        trt = load_tensorrt(target)
    except NotRunnableError as error:
        raise Skip(str(error)) from error
    logger = make_logger(trt)
    said = []
    for name in ("Runtime", "Builder"):
        try:
            made = getattr(trt, name)(logger)
            said.append(f"{name} {'opens' if made is not None else 'is None'}")
        except Exception as error:
            said.append(f"{name}: {first_line(error)}")
    words = "; ".join([*said, *logger.lines()])
    work.row("libraries", target=target, version=str(trt.__version__), words=words)
    if target == "tensorrt":
        work.check("the data-centre library opens on this GPU", "is None" not in words and "Error" not in words, words)


def plugin(work: Work) -> None:
    """Build the plugin for Hopper alone, and let the registry of a TensorRT that is here take it."""
    library_path = built_plugin(work)
    trt = next(filter(None, (_module(name) for name in ("tensorrt", "tensorrt_rtx"))), None)
    if trt is None:
        raise Skip("built; no TensorRT is installed whose registry could take it")
    os.environ["IAPT_PLUGIN_LIBRARY"] = str(library_path)
    from engines.native import PLUGIN_NAME, PLUGIN_VERSION, load_plugin
    from engines.tensorrt.callbacks import make_logger

    registry = trt.get_plugin_registry()
    load_plugin(registry, make_logger(trt))
    found = registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, "")
    work.check(f"the registry of {trt.__name__} takes the plugin", found is not None)


def built_plugin(work: Work) -> Path:
    """The plugin: that of ``make cpp`` in a rehearsal, else compiled for sm_90."""
    from engines.native import plugin_library
    from iapt_export.contract.errors import NotRunnableError

    nvcc = shutil.which("nvcc")
    if work.tiny or nvcc is None or not HEADERS.is_dir():
        try:
            return plugin_library()
        except NotRunnableError as error:
            raise Skip(str(error)) from error
    program = work.folder / "libiapt_trt_plugin.so"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-fmad=false", "-Xcompiler=-ffp-contract=off,-fPIC", "-shared"]
    command += [f"-I{ROOT}/engines/cpp/op", f"-I{HEADERS}", "-o", str(program)]
    command += [str(ROOT / "engines/cpp/op" / name) for name in ("tensorrt_plugin.cc", "rational_cuda.cu")]
    subprocess.run(command, check=True)
    work.record(plugin_bytes=program.stat().st_size)
    return program


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None
