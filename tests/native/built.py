"""What ``make cpp`` leaves, and the words with which tests skip where it was not called."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.native import LIBRARIES, OPS_LIBRARY, PLUGIN_LIBRARY

ROOT = Path(__file__).resolve().parents[2]
OPS = LIBRARIES / OPS_LIBRARY
PLUGIN = LIBRARIES / PLUGIN_LIBRARY

needs_ops = pytest.mark.skipif(not OPS.is_file(), reason=f"{OPS_LIBRARY} is not built; 'make cpp' builds it")
needs_plugin = pytest.mark.skipif(
    not PLUGIN.is_file(), reason=f"{PLUGIN_LIBRARY} is not built; 'make cpp' builds it where nvcc is"
)
