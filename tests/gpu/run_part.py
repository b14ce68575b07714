"""Run one part of first light in this process: ``python -m tests.gpu.run_part 01_device --device cuda ...``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from tests.gpu.part import Work, carry_out


def main(words: list[str] | None = None) -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--package", default="tests.gpu.parts")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(words)
    work = Work(given.device, given.folder, given.tiny, given.limit, given.out)
    work.save()
    carry_out(lambda each: importlib.import_module(f"{given.package}.{given.part}").run(each), work)


if __name__ == "__main__":
    main()
