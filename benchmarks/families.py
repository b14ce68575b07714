"""Which families of decoders are supported, as a table: ``python -m benchmarks.families`` writes ``docs/models.md``.

With ``--served FAMILY`` or ``--served all`` (a minute each) they are built with four tenants, proven and served too;
what an earlier run found for the others is kept.

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


def row(name: str, served: str) -> str:
    """A family's line of the table; ``served`` is its last column."""
    _, config, _ = FAMILIES[name]
    family = family_of(tiny_family(name))
    if family.refusal:
        return f"| {name} | `{config}Config` | refused | {family.refusal} | | | | |"
    same, of_peft, alone = truth.tokens_agree(name), truth.error_to_peft(name), truth.error_beside_a_long_row(name)
    verdict = "yes" if family.in_place else "portable graphs"
    notes = "; ".join(family.restrictions)
    compared = f"{same and 'same'} | {of_peft:.0e} | {alone:.0e} | {served}"
    return f"| {name} | `{config}Config` | {verdict} | {notes} | {compared} |"


def served_error(name: str) -> str:
    """What the exported graphs add: see `tests.iapt_export.building.test_families`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return f"{served_and_compared(name, Path(folder)):.0e}"
        except (AssertionError, IaptError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return FAILS


def main() -> int:
    """Write the table between its markers; 1 where a family that was served failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--served", action="append", default=[], choices=("all", *SUPPORTED), metavar="FAMILY")
    asked = parser.parse_args().served
    served = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in _table() if line.count("|") == 9}
    for name in SUPPORTED:
        if name in asked or "all" in asked:
            served[name] = served_error(name)
            print(f"{name}: {served[name]}", flush=True)
    versions = f"transformers {version('transformers')}, PEFT {version('peft')}, torch {version('torch')}"
    titles = (
        "Family",
        "Configuration",
        "Supported",
        "Why not, or how",
        "Tokens",
        "Error to PEFT",
        "Error beside a row",
        "Served",
    )
    head = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    lines = [f"Measured with {versions}.", "", *head, *(row(name, served.get(name, "")) for name in FAMILIES)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + "\n".join(lines) + "\n" + END + after, encoding="utf-8")
    return int(FAILS in served.values())


def _table() -> list[str]:
    """The lines of the table that is there."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines()


if __name__ == "__main__":
    sys.exit(main())
