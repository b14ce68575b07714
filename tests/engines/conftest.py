"""The tiny bundle for the runtimes' tests."""

from tests.bundles import one_thread, tiny_build, tiny_bundle

__all__ = ["one_thread", "tiny_build", "tiny_bundle"]
