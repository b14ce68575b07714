from __future__ import annotations

from tests.bundles import one_thread, tiny_build, tiny_bundle

__all__ = ["one_thread", "tiny_build", "tiny_bundle"]
