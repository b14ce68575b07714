"""Adapter and backbone in, bundle out: graphs, the build, the contract of a bundle, the command line.

This module imports nothing heavy; import the submodule you need.
"""

__version__ = "0.1.0"
