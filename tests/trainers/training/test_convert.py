"""Files of other tools become what training reads, or are refused by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iapt_export.contract.errors import IaptError
from tests.bundles import run
from trainers.training.convert import Conversion, Converted, convert
from trainers.training.records import read_examples

QUESTION = "Positive or negative?"
HUMAN, GPT = {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}
AGAIN, LATER = {"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Bye."}


LONG = "a film " * 30_000
"""More than the csv module takes unless it is told."""


def converted(tmp_path: Path, text: str, form: Any, **settings: Any) -> tuple[list[dict[str, Any]], Converted]:
    source, output = tmp_path / "given", tmp_path / "made.jsonl"
    source.write_bytes(text.encode())
    done = convert(source, Conversion(format=form, output=output, **settings))
    assert len(read_examples(output)) == done.records
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()], done


@pytest.mark.parametrize(
    ("text", "settings", "records"),
    [
        (
            "instruction,output\na,b\n\nc,d",
            {},
            [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}],
        ),
        ("prompt;completion\na,1;b", {}, [{"prompt": "a,1", "completion": "b"}]),
        (
            "\ufeffinput\tinstruction\toutput\r\n\tdo\tdone\r\n",
            {},
            [{"instruction": "do", "input": "", "output": "done"}],
        ),
        ('prompt, completion\n"is it, really?", "yes"\n', {}, [{"prompt": "is it, really?", "completion": "yes"}]),
        ('"prompt", "completion"\na, b\n', {}, [{"prompt": "a", "completion": "b"}]),
        ("prompt,completion\na, b\n", {}, [{"prompt": "a", "completion": " b"}]),
        ('prompt,completion,"source, year"\na, b,c\n', {}, [{"prompt": "a", "completion": " b"}]),
        ("prompt,completion,,\na,b,,\n", {}, [{"prompt": "a", "completion": "b"}]),
        ("id,prompt,completion,id\n1,a,b,2\n", {}, [{"prompt": "a", "completion": "b"}]),
        (
            f"prompt,completion\n{LONG},b\nc,d\n",
            {},
            [{"prompt": LONG, "completion": "b"}, {"prompt": "c", "completion": "d"}],
        ),
        ('prompt,completion\n"a ""b""\nnext",c\n', {}, [{"prompt": 'a "b"\nnext', "completion": "c"}]),
        (
            "text,label\nfine,yes\n",
            {"column": ("input=text", "output=label"), "instruction": QUESTION},
            [{"instruction": QUESTION, "input": "fine", "output": "yes"}],
        ),
    ],
)
def test_csv(tmp_path: Path, text: str, settings: Any, records: Any) -> None:
    made, done = converted(tmp_path, text, "csv", **settings)
    assert (made, done.records) == (records, len(records))
    assert all(note.startswith("left out: the columns") for note in done.notes)


def test_an_empty_cell_beside_a_question_for_all_is_named(tmp_path: Path) -> None:
    source = tmp_path / "given"
    source.write_text('text,label\n"a\nb",pos\n ,neg\n', encoding="utf-8")
    how = {"column": ("input=text", "output=label"), "instruction": QUESTION}
    with pytest.raises(IaptError, match="given:4: 'text' is empty"):
        convert(source, Conversion(format="csv", output=tmp_path / "made.jsonl", **how))
    assert not (tmp_path / "made.jsonl").exists()


def test_columns_that_are_left_out_are_named(tmp_path: Path) -> None:
    _, done = converted(tmp_path, "id,prompt,completion,date\n1,a,b,c\n", "csv")
    assert done.notes == ("left out: the columns id, date",)


def test_alpaca(tmp_path: Path) -> None:
    plain = {"instruction": "a", "input": "b", "output": "c"}
    talk = {"instruction": "now", "input": "", "output": "c", "system": "Brief.", "history": [["q", "r"]]}
    records, done = converted(tmp_path, json.dumps([{**plain, "text": "all"}, talk]), "alpaca")
    roles = ["system", "user", "assistant", "user", "assistant"]
    spoken = zip(roles, ["Brief.", "q", "r", "now", "c"], strict=True)
    assert records == [plain, {"messages": [{"role": role, "content": text} for role, text in spoken]}]
    assert done.notes == ("left out: the field text",)


def test_sharegpt(tmp_path: Path) -> None:
    text = "\n".join(
        json.dumps({"conversations": turns}) for turns in ([HUMAN, GPT, AGAIN, LATER], [HUMAN, GPT, AGAIN])
    )
    records, done = converted(tmp_path, text, "sharegpt")
    first = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    second = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Bye."}]
    assert records == [{"messages": [*first, *second]}, {"messages": first}]
    assert done.notes == (
        "read but not learnt, as --every-answer would: earlier answers of conversations",
        "left out: turns after a conversation's last answer",
    )
    (tmp_path / "made.jsonl").unlink()
    records, _ = converted(tmp_path, text, "sharegpt", every_answer=True)
    assert records == [{"messages": first}, {"messages": [*first, *second]}, {"messages": first}]


@pytest.mark.parametrize(
    ("form", "text", "settings", "message"),
    [
        ("csv", "text,label\na,b", {}, "given:1: the header has the columns text, label; expected instruction, output"),
        ("csv", "", {}, "given:1: the header has the columns (none); expected"),
        ("csv", "prompt,completion\na,b\nc\n", {}, "given:3: 1 cells, expected 2 for the columns prompt, completion"),
        ("csv", 'prompt,completion\na,"b\n', {}, "given:2: this row cannot be read: unexpected end of data"),
        ("csv", "prompt,completion\na, \n", {}, "given:2: 'completion' is empty"),
        ("csv", "prompt,prompt,completion\na,b,c\n", {}, "given:1: the header names prompt twice"),
        (
            "csv",
            "a,b,c\n",
            {"column": ("output=a", "output=b")},
            "--column names output twice, a and b; give it once",
        ),
        ("csv", "prompt,completion\n", {}, "given holds no records; expected csv"),
        ("csv", "a,b\n", {"column": ("text=a",)}, "--column 'text=a' is not NAME=COLUMN with a NAME of instruction"),
        ("alpaca", "[{]", {}, "given is not JSON"),
        ("alpaca", '{"instruction": "a"}', {}, "given:1: 'output' is missing; found instruction"),
        ("alpaca", '{"instruction": "a", "output": 3}', {}, "given:1: 'output' is int, expected a string"),
        ("alpaca", '{"instruction": "a", "output": "b", "history": ["q"]}', {}, "'history' is no list of [question,"),
        ("alpaca", "\n3", {}, "given:2: a record is a JSON object, this is int"),
        ("alpaca", "{", {}, "given:1: not JSON"),
        ("sharegpt", '[{"conversations": {}}]', {}, "given: record 1: 'conversations' is dict, expected a list"),
        ("sharegpt", json.dumps([{"conversations": [HUMAN]}]), {}, "record 1: no answer follows a question"),
        ("sharegpt", json.dumps([{"conversations": [{"from": "tool", "value": ""}]}]), {}, "turn 0 is from 'tool'"),
        ("sharegpt", json.dumps([{"conversations": ["a"]}]), {}, "turn 0 is no object with from and value"),
        ("alpaca", "[]", {"every_answer": True}, "--every-answer is for --format sharegpt, not for alpaca"),
    ],
)
def test_what_is_refused(tmp_path: Path, form: str, text: str, settings: Any, message: str) -> None:
    with pytest.raises(IaptError) as caught:
        converted(tmp_path, text, form, **settings)
    assert message in str(caught.value)
    assert not (tmp_path / "made.jsonl").exists()


def test_the_command(tmp_path: Path) -> None:
    source, output = tmp_path / "a.csv", tmp_path / "a.jsonl"
    argv = ("data", "convert", source, "--format=csv", f"--output={output}")
    assert "does not exist; expected one to convert" in run(*argv).err
    source.write_bytes(b"prompt,completion\n\xff,b\n")
    assert "is not UTF-8 text" in run(*argv).err
    source.write_text("prompt,completion,id\na,b,1\n", encoding="utf-8")
    done = run(*argv, "--json")
    assert done.code == 0 and json.loads(done.out) == {"records": 1, "notes": ["left out: the columns id"]}
    assert done.err == f"{output} holds 1 record\nleft out: the columns id\n"
    again = run(*argv)
    assert again.code == 1 and f"{output} exists and is not replaced" in again.err
    missing = run("data", "convert", source, "--format=csv")
    assert (
        missing.code == 2 and "iapt-export data convert needs" in missing.err and "--output is missing" in missing.err
    )
