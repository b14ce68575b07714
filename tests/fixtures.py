"""Fixtures and hooks of every process that runs tests; `tests.conftest` loads them."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bundles import mixed_build, small_cache_build, tiny_build, tiny_bundle
from tests.graphs import engine_bundle
from tests.pictures import shared_plots
from tests.traces import fresh_traces, shared_traces
from tests.truths import shared_truths

__all__ = [
    "engine_bundle",
    "fresh_traces",
    "mixed_build",
    "shared_plots",
    "shared_traces",
    "shared_truths",
    "small_cache_build",
    "tiny_build",
    "tiny_bundle",
]

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = ROOT / ".cache" / "smollm2-135m-instruct"
THREADS = 1
"""Of PyTorch: sums are then split the same way on every machine, and tiny matrices gain nothing from more."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    _keep_to_own_cores()


def _keep_to_own_cores() -> None:
    """Deal the cores out to pytest-xdist's workers: a runtime starts a thread for each core it sees, and spins."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(worker[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, own or cores)


def pytest_collection_finish() -> None:
    """Let garbage collections pass over all that was imported, a million objects; transformers asks for many.

    Tracing makes many objects and lets few of them go in circles: collecting as often as Python does takes a twentieth
    of all processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 20)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests in words where there is no GPU, also when they are asked for by name."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU with its driver; none was found on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):  # not `keywords`, which has the names of folders too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    if not (BACKBONE / "config.json").is_file():
        pytest.skip("needs SmolLM2-135M-Instruct in .cache/smollm2-135m-instruct; run 'make backbone' to get it")
    return BACKBONE
