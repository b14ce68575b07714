"""Which adapters of PEFT are served: ``python -m benchmarks.peft_kinds`` writes the table in ``docs/methods.md``.

Each kind of `tests.peft_kinds` is made by stock PEFT on a tiny model. What is taken as it is goes into one bundle a
backbone; what PEFT can merge is refused by name, merged by PEFT, and built as a backbone alone. Both are proven, served
and held against what stock PEFT itself generated: its tokens, and the log-probability of each. It takes ten minutes of
processor time; ``--missing`` goes on where it was cut.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.pages import ROOT
from tests.iapt_export.building.test_peft_kinds import BACKBONES, refusal, served_as_they_are, served_merged
from tests.peft_kinds import AS_IT_IS, KINDS, MERGED

PAGE = ROOT / "docs" / "methods.md"
START, END = "<!-- table of PEFT -->\n", "<!-- end of table -->\n"
TITLES = ("PEFT's method", "PEFT's configuration", "Served", "Tokens", "Error", "How it is refused, without the advice")
MEASURED = TITLES[3:5]
Cells = dict[str, str]


def kept_lines() -> dict[str, Cells]:
    """What the table that is there says of each kind, by title."""
    lines = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells if line[0] in KINDS}


def described(name: str) -> Cells:
    """A kind's line of the table, but for what is measured."""
    kind, sentence = KINDS[name], ""
    if kind.expected != AS_IT_IS:
        with tempfile.TemporaryDirectory() as folder:
            sentence = refusal(name, Path(folder)).partition("; ")[0].rpartition(": ")[2]
    options = f"`{json.dumps(kind.options)}`".replace("|", r"\|")
    return dict(zip(TITLES, (name, options, kind.expected, "", "", sentence), strict=True))


def measured(error: float) -> Cells:
    """What is said of a kind whose tokens were PEFT's."""
    return {"Tokens": "same", "Error": f"{error:.0e}"}


def write_table(lines: dict[str, Cells]) -> None:
    """Put the table between its markers."""
    versions = f"PEFT {version('peft')}, transformers {version('transformers')}, torch {version('torch')}"
    table = [f"Measured with {versions}.", "", f"| {' | '.join(TITLES)} |", f"|{' --- |' * len(TITLES)}"]
    text = "\n".join(table + [f"| {' | '.join(line[title] for title in TITLES)} |" for line in lines.values()])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> int:
    """Write the table; an exception where a kind is not what is expected of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="keep what an earlier run measured")
    warnings.filterwarnings("ignore")  # PEFT's, of configurations that are meant so
    torch.set_num_threads(1)
    lines = {name: described(name) for name in KINDS}
    if parser.parse_args().missing:
        kept = kept_lines()
        lines = {name: line | {key: kept.get(name, line)[key] for key in MEASURED} for name, line in lines.items()}
    write_table(lines)
    for name, kind in KINDS.items():
        if kind.expected == MERGED and not lines[name]["Error"]:
            with tempfile.TemporaryDirectory() as folder:
                lines[name] |= measured(served_merged(name, Path(folder)))
            write_table(lines)  # at once: what was cut goes on with --missing
            print(name, lines[name]["Error"], flush=True)
    for backbone, make in BACKBONES.items():
        names = [name for name, kind in KINDS.items() if kind.expected == AS_IT_IS and kind.backbone is make]
        if not all(lines[name]["Error"] for name in names):
            with tempfile.TemporaryDirectory() as folder:
                found = served_as_they_are(backbone, Path(folder))
            lines |= {name: lines[name] | measured(found[name]) for name in names}
            write_table(lines)
            print(f"{len(names)} kinds on {backbone}, as they are", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
