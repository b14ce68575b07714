"""Files of other tools as the JSON Lines that training reads: CSV, ShareGPT, Alpaca. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from iapt_export.contract.disk import write_atomically
from iapt_export.contract.errors import IaptError
from iapt_export.contract.schema import parse_json
from trainers.training.records import FORMS as READ
from trainers.training.records import example_of, refuse_records

Record = dict[str, Any]
FORMS = (READ["instruction"], READ["prompt"])
"""The columns of a record; the input may be missing."""
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""ShareGPT's names of who speaks."""
PAIR = ["user", "assistant"]
"""A question and its answer."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a file is, and what becomes of it."""

    format: Literal["csv", "sharegpt", "alpaca"]
    """csv: a header, then rows; sharegpt: conversations; alpaca: instruction, input, output. JSON as list or lines."""
    output: Annotated[Path, Parameter(alias="-o", metavar="FILE.jsonl")]
    """File to write, which must not exist."""
    column: Annotated[tuple[str, ...], Parameter(metavar="NAME=COLUMN")] = ()
    """csv: a column of another name, such as input=review; once for each."""
    instruction: Annotated[str, Parameter(metavar="TEXT")] = ""
    """csv: what each row's input is asked, where no column says it."""
    every_answer: bool = False
    """sharegpt: a record for each answer of a conversation; without it, the last answer alone is learnt."""


@dataclass(frozen=True)
class Converted:
    """What `convert` did."""

    records: int
    notes: tuple[str, ...]
    """What of the file is not in the records, a line each."""


def convert(source: Path, asked: Conversion) -> Converted:
    """Write a file of another tool as JSON Lines, whole or not at all.

    Args:
        source: UTF-8 text.
        asked: its format, and where to write.

    Raises:
        IaptError: the file is missing, is not of that format, or has bad records, each named by its row; the output
            exists; or a setting is of another format.
    """
    settings = {"csv": ("column", "instruction"), "sharegpt": ("every_answer",), "alpaca": ()}
    for owner, names in settings.items():
        for name in names:
            if getattr(asked, name) and asked.format != owner:
                raise IaptError(f"--{name.replace('_', '-')} is for --format {owner}, not for {asked.format}")
    if asked.output.exists():
        raise IaptError(f"{asked.output} exists and is not replaced; give another --output")
    text = _text_of(source)
    notes: Counter[str] = Counter()
    made_of: dict[str, Callable[[Any], list[Record]]] = {
        "csv": lambda row: [row],
        "alpaca": lambda row: [_of_alpaca(row, notes)],
        "sharegpt": lambda row: _of_sharegpt(row, asked.every_answer, notes),
    }
    records: list[Record] = []
    problems: list[str] = []
    is_csv = asked.format == "csv"
    rows = _csv_rows(text, source, asked, notes, problems) if is_csv else _json_rows(text, source, problems)
    for where, row in rows:
        try:
            made = made_of[asked.format](row)
            for record in made:
                example_of(record)
            records += made
        except ValueError as error:
            problems.append(f"{where}: {error}")
    refuse_records(problems)
    if not records:
        raise IaptError(f"{source} holds no records; expected {asked.format}")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(asked.output, "".join(lines).encode())
    return Converted(
        len(records), tuple(f"{what}{f', {count:,} times' if count > 1 else ''}" for what, count in notes.items())
    )


def _text_of(source: Path) -> str:
    if not source.is_file():
        what = "is no file" if source.exists() else "does not exist"
        raise IaptError(f"the file {source} {what}; expected one to convert")
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise IaptError(f"{source} is not UTF-8 text: {error}; save it as UTF-8") from error


def _csv_rows(
    text: str, source: Path, asked: Conversion, notes: Counter[str], problems: list[str]
) -> Iterator[tuple[str, Record]]:
    """Each row as a record, a line to ``problems`` for each that is none.

    The delimiter is the one that gives the wanted columns.
    """
    names = _named_columns(asked.column)
    headers = {delimiter: _header(text, delimiter) for delimiter in ",;\t"}
    choices = {delimiter: _wanted(header, names, asked.instruction) for delimiter, header in headers.items()}
    delimiter = next((delimiter for delimiter, wanted in choices.items() if wanted), "")
    if not delimiter:
        found = max(headers.values(), key=len)
        raise IaptError(
            f"{source}:1: the header has the columns {', '.join(found) or '(none)'}; expected instruction, output and "
            "perhaps input, or prompt and completion; --column output=NAME names a column of another name, and "
            "--instruction TEXT stands for a missing column instruction beside input"
        )
    header, wanted = headers[delimiter], choices[delimiter]
    if doubles := sorted({name for name in wanted.values() if header.count(name) > 1}):
        raise IaptError(f"{source}:1: the header names {', '.join(doubles)} twice; give each column its own name")
    if unused := [name or "without a name" for name in header if name not in wanted.values()]:
        notes[f"left out: the columns {', '.join(unused)}"] += 1
    # as the header has it: a space behind a delimiter is no part of a cell, and a quote behind it opens one
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    spaced = any(name.startswith(" ") for name in next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    next(reader)
    while True:
        before = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # nothing after it can be trusted
            problems.append(f"{source}:{before}: this row cannot be read: {error}")
            return
        if len(cells) not in (0, len(header)):
            expected = f"{len(header)} for the columns {', '.join(header)}"
            problems.append(f"{source}:{before}: {len(cells)} cells, expected {expected}")
        elif cells:
            row = dict(zip(header, cells, strict=True))
            record = {name: row[column] for name, column in wanted.items()}
            if asked.instruction and not record["input"].strip():  # nothing but the question, which is everybody's
                problems.append(f"{source}:{before}: '{wanted['input']}' is empty")
                continue
            yield f"{source}:{before}", {"instruction": asked.instruction, **record} if asked.instruction else record


def _header(text: str, delimiter: str) -> list[str]:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        return [name.strip() for name in next(reader, [])]
    except csv.Error:
        return []


def _named_columns(pairs: tuple[str, ...]) -> dict[str, str]:
    """What ``--column`` says: field of a record to column."""
    names: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column or not any(name in form for form in FORMS):
            known = ", ".join(name for form in FORMS for name in form)
            raise IaptError(f"--column {pair!r} is not NAME=COLUMN with a NAME of {known}")
        if name in names:
            raise IaptError(f"--column names {name} twice, {names[name]} and {column}; give it once")
        names[name] = column
    return names


def _wanted(header: list[str], names: dict[str, str], instruction: str) -> dict[str, str]:
    """Field to column, of the first form that a header has; empty where it has none."""
    for form in FORMS:
        columns = {name: names.get(name, name) for name in form if names.get(name, name) in header}
        needed = {"input", "output"} if instruction else {*form} - {"input"}
        if (
            needed <= columns.keys()
            and names.keys() <= columns.keys()
            and not (instruction and "instruction" in columns)
        ):
            return columns
    return {}


def _json_rows(text: str, source: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The records of a JSON list, or of JSON Lines; a line to ``problems`` for each that is no JSON."""
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{source}: record {number}", row) for number, row in enumerate(parse_json(text), 1))
        except ValueError as error:
            raise IaptError(f"{source} is not JSON: {error}; expected a list of records, or one a line") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{source}:{number}", parse_json(line)
            except ValueError as error:
                problems.append(f"{source}:{number}: not JSON: {error}; expected a list of records, or one a line")


def _of_alpaca(record: Any, notes: Counter[str]) -> Record:
    """One of Alpaca's records; with earlier turns or a system prompt it becomes a conversation."""
    fields = _fields(record, ("instruction", "output"), ("input", "system", "history"), notes)
    if not fields.get("system") and not fields.get("history"):
        return {name: fields[name] for name in ("instruction", "input", "output") if fields.get(name) is not None}
    example_of({name: fields.get(name, "") for name in ("instruction", "input", "output")})
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' is no list of [question, answer]")
    question = "\n\n".join(filter(None, (fields["instruction"], fields.get("input"))))
    spoken = [turn for pair in [*history, [question, fields["output"]]] for turn in zip(PAIR, pair, strict=True)]
    if system := fields.get("system"):
        spoken.insert(0, ("system", system))
    return _conversation(spoken)


def _of_sharegpt(record: Any, every_answer: bool, notes: Counter[str]) -> list[Record]:
    """One of ShareGPT's conversations, up to its last answer, or to each."""
    fields = _fields(record, ("conversations",), ("system",), notes)
    if not isinstance(turns := fields["conversations"], list):
        raise ValueError(f"'conversations' is {type(turns).__name__}, expected a list of {{from, value}}")
    spoken = [("system", fields["system"])] if fields.get("system") else []
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise ValueError(f"turn {place} is no object with from and value")
        if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
            raise ValueError(f"turn {place} is from {turn['from']!r}, expected one of {', '.join(ROLES)}")
        spoken.append((ROLES[turn["from"]], turn["value"]))
    ends = [place for place in range(1, len(spoken)) if [who for who, _ in spoken[place - 1 : place + 1]] == PAIR]
    if not ends:
        raise ValueError("no answer follows a question; expected a turn from human and then one from gpt")
    if not every_answer:
        for _ in ends[:-1]:
            notes["read but not learnt, as --every-answer would: earlier answers of conversations"] += 1
        ends = ends[-1:]
    if ends[-1] < len(spoken) - 1:
        notes["left out: turns after a conversation's last answer"] += 1
    return [_conversation(spoken[: end + 1]) for end in ends]


def _fields(record: Any, needed: tuple[str, ...], known: tuple[str, ...], notes: Counter[str]) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, this is {type(record).__name__}")
    if missing := [name for name in needed if name not in record]:
        raise ValueError(f"'{missing[0]}' is missing; found {', '.join(sorted(record)) or 'no fields'}")
    for name in record.keys() - {*needed, *known}:
        notes[f"left out: the field {name}"] += 1
    return record


def _conversation(spoken: list[tuple[str, Any]]) -> Record:
    return {"messages": [{"role": role, "content": text} for role, text in spoken]}
