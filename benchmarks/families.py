"""Which families of decoders are supported, as a table: ``python -m benchmarks.families`` writes ``docs/models.md``.

Each family of `tests.families` is held against the outside truth in PyTorch: the plain backbone's tokens against
``generate`` of stock transformers, a soft prompt's logits against stock PEFT, and a short row beside a long one against
the same row alone.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from tests.families import FAMILIES, tiny_family
from tests.trainers.decoder import test_family as truth
from trainers.decoder.family import family_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"


def row(name: str) -> str:
    """A family's line of the table."""
    _, config, _ = FAMILIES[name]
    family = family_of(tiny_family(name))
    if family.refusal:
        return f"| {name} | `{config}Config` | refused | {family.refusal} | | | |"
    same, of_peft, alone = truth.tokens_agree(name), truth.error_to_peft(name), truth.error_beside_a_long_row(name)
    verdict = "yes" if family.in_place else "portable graphs"
    notes = "; ".join(family.restrictions)
    return f"| {name} | `{config}Config` | {verdict} | {notes} | {same and 'same'} | {of_peft:.0e} | {alone:.0e} |"


def main() -> None:
    """Write the table between its markers."""
    versions = f"transformers {version('transformers')}, PEFT {version('peft')}, torch {version('torch')}"
    titles = (
        "Family",
        "Configuration",
        "Supported",
        "Why not, or how",
        "Tokens",
        "Error to PEFT",
        "Error beside a row",
    )
    head = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    lines = [f"Measured with {versions}.", "", *head, *map(row, FAMILIES)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + START + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
