"""Records of training data: one JSON object a line, read and checked. Needs no torch.

A record is one of

    {"instruction": ..., "input": ..., "output": ...}     input may be missing or empty
    {"prompt": ..., "completion": ...}
    {"messages": [{"role": ..., "content": ...}, ..., {"role": "assistant", "content": ...}]}
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError, shown
from iapt_export.contract.schema import parse_json
from trainers.decoder.instruction import Message, user_message

UNREAD = ("system", "history", "tools", "functions", "images", "audios", "videos", "context")
"""Fields of other tools' records that change what their models see; what else stands in a record is about it."""
FORMS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
}
"""The field that a record is known by, to the fields that are read then."""
LOGGER = logging.getLogger(__name__)
MAX_PROBLEMS = 10
"""Bad records that one error lists; the rest is counted."""


@dataclass(frozen=True)
class Example:
    """One record: the messages before the answer, and the answer."""

    messages: tuple[Message, ...]
    """What the model reads; the last message is the user's."""
    response: str
    """What it should answer."""
    keep: int = 0
    """Characters at the start of the last message that truncation must leave (the instruction before an input)."""
    continues: bool = False
    """Whether the answer goes on from the text as it is (a prompt with its completion), without a template."""
    where: str = field(default="", compare=False)
    """File and line that it was read from."""


def read_examples(path: str | Path) -> list[Example]:
    """Read and check a JSONL file.

    Raises:
        IaptError: missing or empty file, or bad records; each is named by file and line, the first ten in full.
    """
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise IaptError(f"the data file {path} {what}; expected JSONL, one record per line")
    examples, problems, unread = [], [], Counter[str]()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise IaptError(f"{path} is not UTF-8 text: {error}; expected JSONL, one record per line") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            examples.append(replace(example_of(record), where=f"{path}:{number}"))
            unread.update(_unread_texts(record))
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    refuse_records(problems, _conversion(path, lines))
    if unread:
        named = ", ".join(f"{name} ({count:,} of {len(examples):,} records)" for name, count in unread.items())
        LOGGER.warning("%s: no model sees the text of the fields %s", path, named)
    if not examples:
        raise IaptError(f"the data file {path} holds no records; expected JSONL, one record per line")
    return examples


def _conversion(path: Path, lines: Sequence[str]) -> str:
    """How a file of another tool becomes JSONL, or nothing where this is none."""
    start = next((line.strip() for line in lines if line.strip()), "")
    if path.suffix.lower() in (".csv", ".tsv"):
        form = "csv"
    elif '"conversations"' in start or any('"conversations"' in line for line in lines[:MAX_PROBLEMS]):
        form = "sharegpt"
    elif start.startswith("[") or ('"instruction"' in start and ('"system"' in start or '"history"' in start)):
        form = "alpaca"
    else:
        return ""
    return f"iapt-export data convert {path} --format {form} --output {path.with_suffix('.jsonl').name}"


def refuse_records(problems: Sequence[str], remedy: str = "") -> None:
    """Raise one `IaptError` for all bad records, the first ten in full, or return when there is none.

    Args:
        problems: a line each.
        remedy: a command that makes a good file of this one.
    """
    if problems:
        more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        text = "\n  ".join(problems[:MAX_PROBLEMS])
        more += f"\ntry: {remedy}" if remedy else ""
        raise IaptError(f"{len(problems)} bad record(s) in the data:\n  {text}{more}")


def example_of(record: Any) -> Example:
    """Check one record.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, this is {type(record).__name__}")
    if dropped := [name for name in UNREAD if not _is_nothing(record.get(name))]:
        raise ValueError(f"its {' and '.join(dropped)} would not be read; put what the model shall see into messages")
    form = next((form for form in FORMS if form in record), None)
    read = FORMS[form] if form else ()
    for name in [name for name in record if name not in read and not _is_nothing(record[name])]:
        if meant := [field for field in read if _is_like(name, field)]:
            raise ValueError(f"{shown(name)} would not be read; expected {meant[0]!r}, with exactly this name")
    if form == "messages":
        return _from_messages(record["messages"])
    if form == "prompt":
        return Example((user_message(_text(record, "prompt")),), _text(record, "completion"), continues=True)
    if form == "instruction":
        instruction, response = _text(record, "instruction"), _text(record, "output")
        text = record.get("input")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"'input' is {type(text).__name__}, expected a string")
        if not text:
            return Example((user_message(instruction),), response)
        return Example((user_message(f"{instruction}\n\n{text}"),), response, keep=len(instruction) + 2)
    raise ValueError(
        "no known fields; expected instruction (and input) with output, prompt with completion, or messages; "
        f"found {', '.join(sorted(record)) or 'none'}"
    )


def _from_messages(messages: Any) -> Example:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("'messages' is not a list of at least two messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} is {type(message).__name__}, expected an object with role and content")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {index} has role {message.get('role')!r}, expected system, user or assistant")
        _text(message, "content")
        if dropped := [name for name in message if name not in ("role", "content") and not _is_nothing(message[name])]:
            raise ValueError(f"message {index} has {', '.join(dropped)}, which is not read; expected role and content")
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        raise ValueError("'messages' does not end with a user message and the assistant's answer to it")
    turns = tuple({"role": message["role"], "content": message["content"]} for message in messages[:-1])
    return Example(turns, messages[-1]["content"])


def _is_like(name: str, field: str) -> bool:
    """Whether a name may be a slip for a field's: ``Input``, ``inputs``, ``input ``."""
    return name.strip().lower().rstrip("s") == field.rstrip("s")


def _unread_texts(record: dict[str, Any]) -> list[str]:
    """Fields that are not read and hold words, perhaps the text itself; single ones and numbers are about a record."""
    form = next(form for form in FORMS if form in record)
    others = {name: value for name, value in record.items() if name not in FORMS[form]}
    return [name for name, value in others.items() if isinstance(value, str) and len(value.split()) > 1]


def _is_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _text(record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise ValueError(f"'{field}' is missing")
    if not isinstance(record[field], str):
        raise ValueError(f"'{field}' is {type(record[field]).__name__}, expected a string")
    if not record[field].strip():
        raise ValueError(f"'{field}' is empty")
    return str(record[field])
