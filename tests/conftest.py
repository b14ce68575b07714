"""What every test shares: fixed seeds, few threads, no network, and skips that say why."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs a hub must fail at once

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load all else, but not where pytest-xdist hands tests out to others: torch takes seconds to import."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        gc.disable()  # until all is imported
        config.pluginmanager.import_plugin("tests.fixtures")
