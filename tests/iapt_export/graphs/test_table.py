"""What a bundle's graphs are for, as readers ask, and that the two tables of graphs speak of the same ones."""

from __future__ import annotations

import pytest

from iapt_export.contract.graphs import ENCODER, GENERATOR, KINDS, runs_on, step_graphs
from iapt_export.graphs.table import TABLE

PORTABLE = ("prefill", "decode")
ENGINES = ("serve_prefill", "serve_decode")


def test_every_graph_is_made_and_described() -> None:
    assert TABLE.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert (kind.reads or kind.continues or kind.verifies) != (name in (ENCODER, GENERATOR)), name
        assert TABLE[name].twin.__doc__, name


@pytest.mark.parametrize(
    ("names", "in_place", "concatenated"),
    [
        (KINDS, ("serve", "serve"), PORTABLE),
        ((*PORTABLE, *ENGINES), ENGINES, PORTABLE),
        (ENGINES, ENGINES, ()),
        (("serve", ENCODER), ("serve", "serve"), ()),
        (("prefill", GENERATOR, "serve_decode"), (), ()),
        ((), (), ()),
    ],
)
def test_the_graphs_to_step_through(
    names: tuple[str, ...], in_place: tuple[str, ...], concatenated: tuple[str, ...]
) -> None:
    assert step_graphs(names, in_place=True) == in_place
    assert step_graphs(names, in_place=False) == concatenated


@pytest.mark.parametrize(
    ("name", "device", "dtype", "runs"),
    [
        ("serve", "cpu", "fp32", True),
        ("serve", "cpu", "int4", True),
        ("serve", "cuda", "fp32", False),
        ("serve", "cuda", "int8", False),
        ("serve", "cuda", "fp16", True),
        ("serve", "cuda", "bf16", True),
        ("serve_decode", "cuda", "fp32", True),
        ("prefill", "cuda", "fp32", True),
        (ENCODER, "cuda", "int8", True),
    ],
)
def test_where_a_graph_runs(name: str, device: str, dtype: str, runs: bool) -> None:
    assert runs_on(name, device, dtype) == runs
