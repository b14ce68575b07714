"""Adapter and backbone in, bundle out: export twins, tracing, graph passes, manifest, command line.

This module imports nothing heavy; import the submodule you need.
"""

__version__ = "0.1.0"
