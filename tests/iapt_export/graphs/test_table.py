"""What a bundle's graphs are for, as readers ask, and that the two tables of graphs speak of the same ones."""

from __future__ import annotations

import pytest

from iapt_export.contract.graphs import ENCODER, GENERATOR, KINDS, step_graphs
from iapt_export.graphs.table import TABLE

PORTABLE = ("prefill", "decode")
ENGINES = ("serve_prefill", "serve_decode")


def test_every_graph_is_made_and_described() -> None:
    assert TABLE.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert (kind.reads or kind.continues) != (name in (ENCODER, GENERATOR)), name
        assert TABLE[name].twin.__doc__, name


@pytest.mark.parametrize(
    ("names", "device", "in_place", "concatenated"),
    [
        (KINDS, "cpu", ("serve", "serve"), PORTABLE),
        (KINDS, "cuda", ENGINES, PORTABLE),
        ((*PORTABLE, "serve"), "cuda", (), PORTABLE),
        (ENGINES, "cpu", ENGINES, ()),
        (("serve", ENCODER), "cpu", ("serve", "serve"), ()),
        (("prefill", GENERATOR, "serve_decode"), "cpu", (), ()),
        ((), "cpu", (), ()),
    ],
)
def test_the_graphs_to_step_through(
    names: tuple[str, ...], device: str, in_place: tuple[str, ...], concatenated: tuple[str, ...]
) -> None:
    assert step_graphs(names, in_place=True, device=device) == in_place
    assert step_graphs(names, in_place=False, device=device) == concatenated
