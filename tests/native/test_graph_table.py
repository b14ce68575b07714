"""The table of graphs in C++ is Python's."""

from __future__ import annotations

import dataclasses
import re

from iapt_export.contract.graphs import ENCODER, KINDS, GraphKind
from tests.native.built import ROOT

CPP = ROOT / "engines" / "cpp"
HEADER = (CPP / "include" / "iapt" / "graphs.h").read_text(encoding="utf-8")


def test_both_tables_are_the_same() -> None:
    fields = re.findall(r"^  (?:std::string_view|bool) (\w+);", HEADER, re.MULTILINE)
    assert fields == ["name", *(field.name for field in dataclasses.fields(GraphKind))]
    rows = re.findall(r'^    \{"(\w+)", (.+?)\},', HEADER, re.MULTILINE)
    table = {name: GraphKind(*(word == "true" for word in words.split(", "))) for name, words in rows}
    assert list(table.items()) == list(KINDS.items())
    assert f'kEncoder = "{ENCODER}"' in HEADER


def test_no_other_source_names_a_graph() -> None:
    names = "|".join(KINDS)
    for path in (*CPP.glob("src/*"), *CPP.glob("apps/*"), *CPP.glob("include/iapt/*")):
        if path.name != "graphs.h":
            assert not re.findall(rf'"(?:{names})"', path.read_text(encoding="utf-8")), path.name
