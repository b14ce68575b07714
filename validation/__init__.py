"""Runners and inputs in, verdict and report out: does an export compute what PyTorch computes?

This module imports nothing heavy; import the submodule you need.
"""
