"""The tiny bundle for the comparison's tests."""

from tests.bundles import tiny_build, tiny_bundle

__all__ = ["tiny_build", "tiny_bundle"]
