"""The tiny bundle for the comparison's tests."""

from tests.bundles import one_thread, tiny_build, tiny_bundle

__all__ = ["one_thread", "tiny_build", "tiny_bundle"]
