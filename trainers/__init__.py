"""PyTorch in, adapter directories out: the prompt-tuning methods and how they are trained.

Shape legend, used in every docstring and trailing comment of this package:

    B batch          T instruction tokens    P prompt tokens per layer   L layers
    D hidden width   R bottleneck width      G weight-sharing groups     V vocabulary
    m numerator degree                       n denominator degree

This module imports nothing heavy; import the submodule you need.
"""
