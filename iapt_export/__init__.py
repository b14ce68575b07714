"""Adapter and backbone in, bundle out: graphs, the build, the contract of a bundle, the command line.

``iapt_export.build(iapt_export.BuildRequest(...))`` makes a bundle. Both are imported when they are asked for, so that
importing this package loads neither torch nor a runtime.
"""

import os
from importlib import import_module
from typing import Any

# ONNX Runtime 1.29 and newer keep an identifier of the machine and send events to Microsoft, on Linux too, unless this
# is set before they are loaded (their Privacy.md). Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# PyTorch's threads (OpenMP's) spin while they wait for each other, also where the one that they wait for needs their
# core: on two cores SmolLM2-135M took 4 to 5 times as long as with this beside a process of two busy threads, 1.6 times
# beside one of one, and as long on idle ones. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
_HOMES = {"build": "iapt_export.building.build", "BuildRequest": "iapt_export.building.build_request"}
__all__ = ["build", "BuildRequest"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
