"""The graphs that a bundle may have, a row each: what a reader asks, so that it compares no names.

Standard library only. How each is made stands in `iapt_export.graphs.table`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class GraphKind:
    """What a graph is for."""

    reads: bool = False
    """It reads instructions."""
    continues: bool = False
    """It goes on from them, a token a row."""
    in_place: bool = False
    """Its cache is written in place; else each step returns a longer one."""
    verifies: bool = False
    """It goes on by several tokens a row, which a session drafted; what each place gives equals single steps to the
    bit."""
    needs_onnxruntime: bool = False
    """It has operators of ONNX Runtime's own; see `runs_on`."""


PAST, PRESENT = "past_key_values.", "present."
"""How the tensors begin that hold the cache before and after a step, ``LAYER.key`` and ``LAYER.value`` behind it."""
ENCODER = "encoder"
"""Makes the prompts of a method that computes them beforehand."""
VERIFY = "verify"
"""Reads a row's last token and the drafted ones behind it, in one step for all rows."""
GENERATOR = "generator"
"""The generators of methods that make prompts at every layer, alone, for comparison."""
KINDS: dict[str, GraphKind] = {
    ENCODER: GraphKind(),
    "prefill": GraphKind(reads=True),
    "decode": GraphKind(continues=True),
    "serve": GraphKind(reads=True, continues=True, in_place=True, needs_onnxruntime=True),
    VERIFY: GraphKind(in_place=True, verifies=True, needs_onnxruntime=True),
    "serve_prefill": GraphKind(reads=True, in_place=True),
    "serve_decode": GraphKind(continues=True, in_place=True),
    GENERATOR: GraphKind(),
}
"""Name in a manifest and of the file to what it is for; of graphs for one purpose, the better first."""
PORTABLE = (ENCODER, "prefill", "decode")
"""The graphs that are written for any runtime: of standard operators without functions, every known size a number."""


GPU_ATTENTION = ("fp16", "bf16")
"""Types in which ONNX Runtime has its own attention on a GPU; in another it would fetch the cache for every layer."""


def runs_on(name: str, device: str, dtype: str) -> bool:
    """Whether a graph has all its kernels on a device.

    Args:
        name: the graph's.
        device: ``cpu`` or ``cuda``.
        dtype: of the target, such as ``fp16`` or ``int8``.
    """
    return device == "cpu" or not KINDS[name].needs_onnxruntime or dtype in GPU_ATTENTION


def step_graphs(names: Container[str], *, in_place: bool) -> tuple[str, ...]:
    """The graphs that read instructions and that go on from them over one kind of cache.

    Args:
        names: the graphs that there are.
        in_place: which kind, see `GraphKind`.

    Returns:
        Two names, which may be equal; none where ``names`` has no such two.
    """
    there = {name: kind for name, kind in KINDS.items() if name in names and kind.in_place == in_place}
    reading = [name for name, kind in there.items() if kind.reads]
    continuing = [name for name, kind in there.items() if kind.continues]
    return (reading[0], continuing[0]) if reading and continuing else ()
