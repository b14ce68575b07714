"""Which families of decoders are supported, as a table: ``python -m benchmarks.families`` writes ``docs/models.md``.

Each family of `tests.families` is held against the outside truth in PyTorch: the plain backbone's tokens against
``generate`` of stock transformers, a soft prompt's logits against stock PEFT, and a short row beside a long one against
the same row alone.

``--served FAMILY``, ``all`` or ``missing`` builds bundles of four tenants, proves and serves them (a minute each), and
``--targets FAMILY``, ``all`` or ``missing`` does it with weights in 4 and 8 bits, and builds TensorRT for RTX engines
(two minutes each). What an earlier run found for the others is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from tests.families import FAMILIES, IN_PLACE, tiny_family
from tests.iapt_export.building.test_families import (
    SUPPORTED,
    built,
    engines_of,
    report_on,
    rounded_error,
    served_and_compared,
)
from tests.trainers.decoder import test_family as truth
from trainers.decoder.family import family_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
FAILS = "fails"
ROUNDS_BADLY = "not shipped"
"""Of a target whose weights are right, and which is too far from fp32 as it is served; of random weights."""
NOT_BUILT, NO_ENGINE = "not built", "cannot build"
"""TensorRT's own compiler stopped, which the build says in words."""
START, END = "<!-- table -->\n", "<!-- end of table -->\n"


TITLES = (
    "Family",
    "Configuration",
    "Supported",
    "Why not, or how",
    "Tokens",
    "Error to PEFT",
    "Error beside a row",
    "Served",
    "int4",
    "RTX engines",
    "int8",
)
RUN = TITLES[7:]
"""Columns that take minutes a family, and are kept."""
Cells = dict[str, str]


def row(name: str) -> Cells:
    """A family's line of the table, but for the columns of `RUN`."""
    _, config, _ = FAMILIES[name]
    family = family_of(tiny_family(name))
    cells = {"Family": name, "Configuration": f"`{config}Config`"}
    if family.refusal:
        return cells | {"Supported": "refused", "Why not, or how": family.refusal}
    return cells | {
        "Supported": "yes" if family.in_place else "portable graphs",
        "Why not, or how": "; ".join(family.restrictions),
        "Tokens": "same" if truth.tokens_agree(name) else FAILS,
        "Error to PEFT": f"{truth.error_to_peft(name):.0e}",
        "Error beside a row": f"{truth.error_beside_a_long_row(name):.0e}",
    }


def served_cells(name: str) -> Cells:
    """What the exported graphs add: see `tests.iapt_export.building.test_families`."""
    with tempfile.TemporaryDirectory() as folder:
        return {"Served": _tried(name, lambda: f"{served_and_compared(name, Path(folder)):.0e}")}


def target_cells(name: str) -> Cells:
    """The largest error of a logit with weights in 4 bits, and which engines were built."""
    in_place = FAMILIES[name][0] == IN_PLACE
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            targets = f"onnxruntime:{'int4' if in_place else 'fp32'}", "tensorrt-rtx:fp16"
            report = report_on(built(name, folder, *targets, prove=False))
        except IaptError as error:
            if NO_ENGINE not in str(error):
                return dict.fromkeys(("int4", "RTX engines"), _failed(name, error))
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            return {"int4": "" if in_place else "refused", "RTX engines": NOT_BUILT}
        except Exception as error:
            return dict.fromkeys(("int4", "RTX engines"), _failed(name, error))
        return {
            "int4": _tried(name, partial(_error, folder / "out", report, "int4")) if in_place else "refused",
            "RTX engines": _tried(name, lambda: ", ".join(engines_of(folder / "out", report))),
        }


def int8_cells(name: str) -> Cells:
    """The same with weights in 8 bits."""
    if FAMILIES[name][0] != IN_PLACE:
        return {"int8": "refused"}

    def tried() -> str:
        with tempfile.TemporaryDirectory() as folder:
            bundle = built(name, Path(folder), "onnxruntime:int8", prove=False)
            return _error(bundle, report_on(bundle), "int8")

    return {"int8": _tried(name, tried)}


def _error(bundle: Path, report: dict[str, Any], dtype: str) -> str:
    error, ships = rounded_error(bundle, report, dtype)
    return f"{error:.0e}" if ships else f"{error:.0e}, {ROUNDS_BADLY}"


def _tried(name: str, make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:  # whatever it is: the other families go on, and this one is mended
        return _failed(name, error)


def _failed(name: str, error: Exception) -> str:
    print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return FAILS


def write_table(lines: dict[str, Cells]) -> None:
    """Put the table between its markers."""
    versions = f"transformers {version('transformers')}, PEFT {version('peft')}, torch {version('torch')}"
    table = [f"Measured with {versions}.", "", f"| {' | '.join(TITLES)} |", f"|{' --- |' * len(TITLES)}"]
    table += [f"| {' | '.join(line.get(title, '') for title in TITLES)} |" for line in lines.values()]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    text = "\n".join(table)
    page = f"{before}{START}{text}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(page, encoding="utf-8")


def kept_lines() -> dict[str, Cells]:
    """What the table that is there says of each family, by title."""
    lines = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells if line[0] in FAMILIES}


def main() -> int:
    """Write the table; 1 where a family failed in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("all", "missing", *SUPPORTED)
    for flag in ("--served", "--targets"):
        parser.add_argument(flag, action="append", default=[], choices=choices, metavar="all|missing|FAMILY")
    asked, kept = parser.parse_args(), kept_lines()
    lines: dict[str, Cells] = {}
    for name in FAMILIES:
        is_kept = name in kept and (asked.served or asked.targets)
        lines[name] = kept[name] if is_kept else kept.get(name, {}) | row(name)
    write_table(lines)
    jobs = (
        (RUN[:1], asked.served, served_cells),
        (RUN[1:3], asked.targets, target_cells),
        (RUN[3:], asked.targets, int8_cells),
    )
    for titles, wanted, make in jobs:
        for name in SUPPORTED:
            is_missing = any(lines[name].get(title, "") in ("", FAILS) for title in titles)
            if name in wanted or "all" in wanted or ("missing" in wanted and is_missing):
                lines[name] |= make(name)
                write_table(lines)  # at once: what was cut goes on with `missing`
                print(name, {title: lines[name][title] for title in titles}, flush=True)
    return int(any(FAILS in line.values() for line in lines.values()))


if __name__ == "__main__":
    sys.exit(main())
