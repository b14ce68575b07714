"""What the benchmarks share: records, a JSON object a line, and the tables and plots of pages that people write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
INK, MUTED, OWN, OTHER = "#1f2328", "#6e7781", "#c2410c", "#0b6e99"
"""Two colours that also readers who see few colours tell apart, on white."""
STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "xtick.color": INK,
    "ytick.color": INK,
}


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record, a line, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, in the order in which they were made; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def brief(value: float) -> float:
    """Six digits of a measured figure."""
    return float(f"{value:.6g}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page, each between ``<!-- table NAME -->`` and ``<!-- end -->``; all else stays as it is.

    Raises:
        SystemExit: the page has no such place for a table, or one for a table that there is not.
    """
    text = page.read_text(encoding="utf-8")
    if unlike := set(re.findall(r"<!-- table (.*?) -->", text)) ^ tables.keys():
        raise SystemExit(f"{page} and this program differ in the tables {', '.join(sorted(unlike))}")
    for name, content in tables.items():
        place = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        text = place.sub(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", text)  # type: ignore[misc]
    page.write_text(text, encoding="utf-8")


@contextmanager
def figure(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **shared: Any) -> Iterator[Any]:
    """Panels ``[rows][columns]`` to draw in, written as PNG at the end; equal figures give equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=size)
        yield made.subplots(rows, columns, squeeze=False, **shared)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, metadata={"Software": None})
