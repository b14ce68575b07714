"""What this machine can build and run, what is missing, and how to get it.

Versions come from package metadata: nothing heavy is imported to find out that it is there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.cuda.driver import Driver, find_driver
from engines.cuda.libraries import cuda_major, missing_libraries
from engines.native import BODY, KERNEL, ops_library
from engines.tensorrt.flavour import DATACENTRE, RTX, Flavour

if TYPE_CHECKING:
    from rich.console import RenderableType

OK, LIMITED, MISSING = "ok", "limited", "missing"

CUDA_PROVIDER = "onnxruntime cuda"
GIB = 2**30
MIN_DISK_GIB, MIN_MEMORY_GIB = 5, 8
"""The demo needs this much: a 135M backbone in two types, its engines, and their build."""

EXTRAS = {
    "torch": "export",
    "transformers": "export",
    "accelerate": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "tensorrt_rtx": RTX.extra,
    "tensorrt": DATACENTRE.extra,
    "cuda.bindings": RTX.extra,
}
"""Python modules that are looked for, and the extra of this project that brings each."""

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "cuda.bindings": ("cuda-bindings",),
}
"""Modules whose package is called otherwise, or may be one of several."""

TOOLS = {
    "gcc": "apt-get install gcc",
    "g++": "apt-get install g++",
    "make": "apt-get install make",
    "cmake": "apt-get install cmake, or pip install cmake",
    "ninja": "apt-get install ninja-build, or pip install ninja",
    "npm": "apt-get install npm, or name ONNX Runtime's headers with ONNXRUNTIME_INCLUDE_DIR",
    "nvcc": "install NVIDIA's CUDA toolkit",
}


@dataclass(frozen=True)
class Finding:
    """One part that was looked for, or one ability that follows."""

    name: str
    status: str
    """``ok``, ``limited`` or ``missing``."""
    version: str = ""
    detail: str = ""
    """What was found, or why it does not serve."""
    remedy: str = ""
    """How to get it; empty when there is nothing to do."""
    kind: str = "part"
    """``part`` or ``ability``."""
    compute_capabilities: tuple[str, ...] = ()
    """Of each GPU, such as 8.9."""


def diagnose(folder: Path | None = None) -> list[Finding]:
    """Look at this machine; takes well under a second.

    Args:
        folder: where bundles will be written, for the disk space; None means the current one.

    Returns:
        Its parts (Python, each package, GPU, each compiler, disk, memory), then what it can do with them.
    """
    parts = [_python()]
    parts += [_module(module, extra) for module, extra in EXTRAS.items()]
    onnxruntime = _find_spec("onnxruntime")
    parts.append(_cuda_provider((onnxruntime and onnxruntime.submodule_search_locations) or ()))
    parts.append(_gpu(find_driver()))
    parts += [_tool(name, remedy) for name, remedy in TOOLS.items()]
    parts += [_disk(folder or Path.cwd()), _memory()]
    return [*parts, *abilities(parts)]


def abilities(parts: list[Finding]) -> list[Finding]:
    """What a machine of these parts can do.

    Returns:
        A finding for each ability: ``ok``, or ``missing`` with what it lacks.
    """
    found = {part.name: part for part in parts}
    return [
        _ability("train adapters", found, ("torch", "transformers", "accelerate")),
        _ability("export bundles", found, ("torch", "transformers", "onnx", "onnxscript")),
        _ability("run on onnxruntime", found, ("onnxruntime",)),
        _ability("run on onnxruntime, --device cuda", found, (CUDA_PROVIDER, "gpu", "cuda.bindings")),
        *_tensorrt_abilities(RTX, "tensorrt_rtx", found),
        *_tensorrt_abilities(DATACENTRE, "tensorrt", found),
        _ability("compile the C++ parts", found, ("g++", "make", "cmake", "npm")),
    ]


def model_finding(name: str, verdict: Mapping[str, Any]) -> Finding:
    """A backbone among the abilities.

    Args:
        name: as the user gave it.
        verdict: what `iapt_export.inspection.describe_model` says of it.
    """
    if verdict["verdict"] == "refused":
        return Finding(f"serve {name}", MISSING, detail=verdict["reason"], kind="ability")
    limits = verdict.get("restrictions", ())
    detail = "; ".join((verdict["verdict"], *limits, f"{verdict['model_type']} of {verdict['parameters']} parameters"))
    return Finding(f"serve {name}", LIMITED if limits else OK, detail=detail, kind="ability")


def table(findings: list[Finding]) -> RenderableType:
    """Parts and abilities as tables for a terminal."""
    from rich.console import Group

    return Group(
        _table("What is here", "", [finding for finding in findings if finding.kind == "part"]),
        "",
        _table("What this machine can do", "This machine can", [f for f in findings if f.kind == "ability"]),
    )


def _table(title: str, first_column: str, findings: list[Finding]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    colours = {OK: "green", LIMITED: "yellow", MISSING: "red"}
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_edge=False)
    for column in (first_column, "status", "details"):
        shown.add_column(column, overflow="fold")
    for finding in findings:
        details = ", ".join(part for part in (finding.version, finding.detail) if part)
        if finding.remedy:
            details += f"{'; ' if details else ''}try: {finding.remedy}"
        # Text and not a string: -e '.[train]' must not be read as markup
        shown.add_row(Text(finding.name), Text(finding.status, style=colours[finding.status]), Text(details))
    return shown


def _python() -> Finding:
    return Finding("python", OK, platform.python_version(), platform.platform())


def _module(module: str, extra: str) -> Finding:
    spec = _find_spec(module)
    if spec is None:
        return Finding(module, MISSING, remedy=_install(module, extra))
    detail = ""
    if module == "onnxruntime":
        detail = "providers: " + ", ".join(_providers(spec.submodule_search_locations or ()))
        detail += "; ai.iapt::Rational as " + (KERNEL if ops_library() else f"{BODY} ('make cpp' builds the kernel)")
    return Finding(module, OK, _version(module), detail)


def _find_spec(module: str) -> Any:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # the parent package is missing, or is a stub without a spec
        return None


def _install(module: str, extra: str) -> str:
    package = DISTRIBUTIONS["cuda.bindings"][0] if module == "cuda.bindings" else f"-e '.[{extra}]'"
    return f"pip install {package}"


def _version(module: str) -> str:
    for name in DISTRIBUTIONS.get(module, (module,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _providers(folders: Iterable[str]) -> list[str]:
    """Execution providers by their libraries; the CPU's is built in."""
    pattern = re.compile(r"onnxruntime_providers_(\w+)\.(?:so|dll|dylib)$")
    names = {
        match[1]
        for folder in folders
        for path in Path(folder, "capi").glob("*")
        if (match := pattern.search(path.name))
    }
    return ["cpu", *sorted(names - {"shared"})]


def _cuda_provider(folders: Iterable[str]) -> Finding:
    """ONNX Runtime's part for NVIDIA GPUs, and CUDA's libraries, without which it runs on the CPU unasked."""
    folders = list(folders)
    if "cuda" not in _providers(folders):
        remedy = "pip uninstall onnxruntime, then pip install -e '.[gpu]'"
        return Finding(CUDA_PROVIDER, MISSING, detail="this ONNX Runtime has no CUDA provider", remedy=remedy)
    major = cuda_major(folders)
    if missing := missing_libraries(major):
        remedy = "pip install 'onnxruntime-gpu[cuda,cudnn]' in the version that is here, or install CUDA and cuDNN"
        return Finding(CUDA_PROVIDER, MISSING, f"CUDA {major}", f"no {', '.join(missing)}", remedy)
    return Finding(CUDA_PROVIDER, OK, f"CUDA {major}".strip())


def _gpu(driver: Driver) -> Finding:
    version = " ".join(part for part in (_driver_version(), f"CUDA {driver.cuda_version}") if part)
    if driver.problem:
        return Finding(
            "gpu",
            MISSING,
            version if driver.cuda_version else "",
            driver.problem,
            f"run on a machine with an NVIDIA GPU and driver {RTX.driver} or newer",
        )
    gpus = [
        f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / GIB:.0f} GiB"
        for gpu in driver.gpus
    ]
    capabilities = tuple(gpu.compute_capability for gpu in driver.gpus)
    return Finding("gpu", OK, version, "; ".join(gpus), compute_capabilities=capabilities)


def _driver_version() -> str:
    """As nvidia-smi tells it: libcuda knows the CUDA version only."""
    if shutil.which("nvidia-smi") is None:
        return ""
    output = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return f"driver {output.splitlines()[0]}" if output else ""


def _tool(name: str, remedy: str) -> Finding:
    path = shutil.which(name)
    if path is None:
        return Finding(name, MISSING, remedy=remedy)
    match = re.search(r"\d+\.\d+(?:\.\d+)?", _output([path, "--version"]).split("release")[-1])
    return Finding(name, OK, match[0] if match else "", path)


def _output(command: list[str]) -> str:
    """A command's standard output; empty when it fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    return _amount("disk", f"{free:.0f} GiB free at {folder}", free, MIN_DISK_GIB, "free some space")


def _memory() -> Finding:
    total, available = (number / GIB for number in _memory_bytes())
    detail = f"{total:.0f} GiB, {available:.0f} GiB of them free; {os.cpu_count()} processors"
    return _amount("memory", detail, available, MIN_MEMORY_GIB, "close other programs, or take a larger machine")


def _amount(name: str, detail: str, amount: float, needed: int, remedy: str) -> Finding:
    if amount >= needed:
        return Finding(name, OK, detail=detail)
    return Finding(name, LIMITED, detail=f"{detail}; the demo needs {needed} GiB", remedy=remedy)


def _memory_bytes() -> tuple[int, int]:
    """Physical memory and what of it is available; zeros where the system does not say."""
    if not hasattr(os, "sysconf"):  # Windows
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:  # not Linux
        match = None
    return total, int(match[1]) * 1024 if match else total


def _ability(name: str, found: dict[str, Finding], needs: tuple[str, ...]) -> Finding:
    lacking = [found[need] for need in needs if found[need].status == MISSING]
    if not lacking:
        return Finding(name, OK, kind="ability")
    remedies = dict.fromkeys(part.remedy for part in lacking)
    lacks = ", ".join(part.detail if part.name in ("gpu", CUDA_PROVIDER) else f"no {part.name}" for part in lacking)
    return Finding(name, MISSING, detail=lacks, remedy="; ".join(remedies), kind="ability")


def _tensorrt_abilities(chosen: Flavour, module: str, found: dict[str, Finding]) -> list[Finding]:
    """Building the engines of one flavour, and running them, which no GPU does that the flavour does not serve."""
    build_needs = (module,) if chosen.builds_without_gpu else (module, "gpu")
    build = _ability(f"build {chosen.target} engines", found, build_needs)
    if build.status == OK and chosen.builds_without_gpu:
        served = ", ".join(chosen.compute_capabilities)
        build = dataclasses.replace(build, detail=f"also without a GPU, for compute capability {served}")
    run = _ability(f"run {chosen.target} engines", found, (module, "gpu", "cuda.bindings"))
    here = found["gpu"].compute_capabilities
    if run.status == OK and not set(here) & set(chosen.compute_capabilities):
        run = dataclasses.replace(
            run,
            status=MISSING,
            detail=f"this GPU has compute capability {', '.join(here)}, {chosen.target} serves "
            + ", ".join(chosen.compute_capabilities),
            remedy=f"use a GPU of one of these, or --target {DATACENTRE.target}",
        )
    return [build, run]
