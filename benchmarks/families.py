"""Which families of decoders are supported, as a table: ``python -m benchmarks.families`` writes ``docs/models.md``.

With ``--served FAMILY``, ``--served all`` or ``--served missing`` (a minute each) they are built with four tenants,
proven and served too; what an earlier run found for the others is kept.

Each family of `tests.families` is held against the outside truth in PyTorch: the plain backbone's tokens against
``generate`` of stock transformers, a soft prompt's logits against stock PEFT, and a short row beside a long one against
the same row alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from iapt_export.contract.errors import IaptError
from tests.families import FAMILIES, tiny_family
from tests.iapt_export.building.test_families import SUPPORTED, served_and_compared
from tests.trainers.decoder import test_family as truth
from trainers.decoder.family import family_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
FAILS = "fails"
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
)


def row(name: str) -> str:
    """A family's line of the table, without its last column."""
    _, config, _ = FAMILIES[name]
    family = family_of(tiny_family(name))
    if family.refusal:
        return f"| {name} | `{config}Config` | refused | {family.refusal} | | |"
    same, of_peft, alone = truth.tokens_agree(name), truth.error_to_peft(name), truth.error_beside_a_long_row(name)
    verdict = "yes" if family.in_place else "portable graphs"
    notes = "; ".join(family.restrictions)
    return f"| {name} | `{config}Config` | {verdict} | {notes} | {same and 'same'} | {of_peft:.0e} | {alone:.0e}"


def served_error(name: str) -> str:
    """What the exported graphs add: see `tests.iapt_export.building.test_families`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return f"{served_and_compared(name, Path(folder)):.0e}"
        except (AssertionError, IaptError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return FAILS


def write_table(rows: dict[str, str], served: dict[str, str]) -> None:
    """Put the table between its markers."""
    versions = f"transformers {version('transformers')}, PEFT {version('peft')}, torch {version('torch')}"
    head = [f"| {' | '.join(TITLES)} |", f"|{' --- |' * len(TITLES)}"]
    lines = [f"{text} | {served.get(name, '')} |" for name, text in rows.items()]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    table = "\n".join([f"Measured with {versions}.", "", *head, *lines])
    PAGE.write_text(f"{before}{START}{table}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Write the table; 1 where a family that was served failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("all", "missing", *SUPPORTED)
    parser.add_argument("--served", action="append", default=[], choices=choices, metavar="all|missing|FAMILY")
    asked = parser.parse_args().served
    kept = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in _table() if line.count("|") == 9}
    served = {name: text for name, text in kept.items() if name in SUPPORTED}
    rows = {name: row(name) for name in FAMILIES}
    write_table(rows, served)
    for name in SUPPORTED:
        if name in asked or "all" in asked or ("missing" in asked and served.get(name, "") in ("", FAILS)):
            served[name] = served_error(name)
            write_table(rows, served)  # at once: what was cut goes on with `--served missing`
            print(f"{name}: {served[name]}", flush=True)
    return int(FAILS in served.values())


def _table() -> list[str]:
    """The lines of the table that is there."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines()


if __name__ == "__main__":
    sys.exit(main())
