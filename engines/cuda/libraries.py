"""CUDA's libraries that ONNX Runtime's GPU build needs: which are missing, and loading them from NVIDIA's packages."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

NEEDED = {
    "12": (
        "libcudart.so.12",
        "libcublasLt.so.12",
        "libcublas.so.12",
        "libcurand.so.10",
        "libcufft.so.11",
        "libnvrtc.so.12",
        "libcudnn.so.9",
    ),
    "13": (
        "libcudart.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcurand.so.10",
        "libcufft.so.12",
        "libnvrtc.so.13",
        "libcudnn.so.9",
    ),
}
"""CUDA's major version, for which ONNX Runtime was built, to the libraries that it loads; a needed one comes first."""


def cuda_major(onnxruntime: Iterable[str]) -> str:
    """Major version of CUDA for which an installed ONNX Runtime was built; empty for a build without CUDA.

    Args:
        onnxruntime: the package's folders.
    """
    for folder in onnxruntime:
        record = Path(folder, "capi", "build_and_package_info.py")
        text = record.read_text(encoding="utf-8") if record.is_file() else ""
        if match := re.search(r"cuda_version\s*=\s*['\"](\d+)", text):
            return match[1]
    return ""


def missing_libraries(major: str) -> list[str]:
    """The libraries of `NEEDED` that are neither in NVIDIA's Python packages nor where the loader looks.

    Args:
        major: CUDA's major version; of one that is not known, nothing is said to be missing.
    """
    there = {path.name for folder in _own_folders() for path in folder.glob("*.so*")} | _known_to_the_loader()
    return [name for name in NEEDED.get(major, ()) if name not in there]


def load_libraries(major: str) -> None:
    """Load the libraries of `NEEDED` that NVIDIA's Python packages have, wherever these are installed.

    ONNX Runtime finds them then by their names. Its own ``preload_dlls`` looks only beside itself.
    """
    folders = _own_folders()
    for name in NEEDED.get(major, ()):
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is not None:
            with contextlib.suppress(OSError):  # ONNX Runtime's own attempt decides
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _own_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = [folder for place in packages for folder in (*place.glob("*/lib"), *place.glob("*/lib/x86_64"))]
    return found + [Path(place) for place in os.environ.get("LD_LIBRARY_PATH", "").split(":") if place]


def _known_to_the_loader() -> set[str]:
    try:
        said = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return set()
    return set(re.findall(r"^\s*(\S+\.so\S*) \(", said, re.MULTILINE))
