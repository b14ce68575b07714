"""What first light found, as text: a summary for the terminal, and a section that is ready for docs/benchmarks.md."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from engines.cuda.driver import find_driver
from tests.gpu.part import shown

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
)


def machine() -> dict[str, Any]:
    """GPU, driver, processor and versions."""
    driver = find_driver()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "gpu": "; ".join(
            f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB"
            for gpu in driver.gpus
        )
        or driver.problem,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        "cuda": driver.cuda_version or "none",
        "nvcc": output("nvcc", "--version").rpartition("\n")[2] or "none",
        "processor": f"{os.cpu_count()} cores, {platform.machine()}, {memory:.0f} GiB",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def output(*command: str) -> str:
    """What a program prints, stripped; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def summary(found: dict[str, Any]) -> str:
    """The verdict of each part with its failed checks, and its figures that are one number or word."""
    lines = ["", "REHEARSAL on the CPU: no figure below is of a GPU" if found["rehearsal"] else found["machine"]["gpu"]]
    for part in found["parts"]:
        lines.append(f"{part['status']:8} {part['seconds']:6.1f} s  {part['part']}  {part['title']}")
        lines += [f"           {part['reason']}"] if part["reason"] else []
        lines += [f"           FAIL {c['check']}: {c['found']}" for c in part["checks"] if not c["passed"]]
        simple = {name: value for name, value in part["figures"].items() if not isinstance(value, list | dict)}
        if simple:
            lines.append("           " + ", ".join(f"{name} {shown(value)}" for name, value in simple.items()))
    return "\n".join(lines)


def write_aftermath(found: dict[str, Any], path: Path) -> None:
    """Write the section."""
    about = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "## On a GPU" if not found["rehearsal"] else "## Rehearsal on the CPU: no figure here is of a GPU",
        "",
        f"{about['gpu']}; driver {about['driver']}, CUDA {about['cuda']}; {about['nvcc']}; {about['processor']}; "
        f"Python {about['python']}; {versions}. {found['made'][:10]}, by `{found['command']}`.",
    ]
    for part in found["parts"]:
        verdict = part["status"] + (f" ({part['reason']})" if part["reason"] else "")
        lines += ["", f"### {part['title']}", "", f"Part {part['part']}: {verdict}, {part['seconds']:.0f} s."]
        for name, value in part["figures"].items():
            lines += ["", *_figure(name.replace("_", " "), value)]
        held = [[c["check"], "yes" if c["passed"] else "**no**", c["found"]] for c in part["checks"]]
        if held:
            lines += ["", *_table(["expected", "held", "found"], held)]
        lines += [line for note in part["notes"] for line in ("", f"Left out: {note}")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _figure(name: str, value: Any) -> list[str]:
    """A table for a list of rows, else a line."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        columns = list(dict.fromkeys(key for row in value for key in row))
        cells = [[shown(row.get(column, "")) for column in columns] for row in value]
        return [f"{name}:", "", *_table([column.replace("_", " ") for column in columns], cells)]
    return [f"{name}: {shown(value)}"]


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    clean = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (columns, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in clean]
    return [lines[0], "|" + " --- |" * len(columns), *lines[1:]]
