"""JSON from outside is refused in words by whoever reads it: nested without end, not UTF-8, a name twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.http.access import Access
from engines.request_file import read_messages, read_requests
from engines.serving.sampling import Sampling
from engines.serving.text import template_source
from engines.tensorrt.engine_info import EngineInfo
from iapt_export.building.output import check_output
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.places import is_bundle
from iapt_export.contract.schema import parse_json, read_object
from iapt_export.inspection import describe
from trainers.adapters.directory import load_adapter
from trainers.training.records import read_examples
from trainers.training.work import read_record
from validation.reporting.report import read_report
from validation.sides.cases import read_examples as read_validation_examples

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "manifest": ("manifest.json", lambda path: BundleManifest.load(path.parent)),
    "output": ("manifest.json", lambda path: check_output(path.parent)),
    "tokenizer settings": ("tokenizer_config.json", lambda path: template_source(path.parent)),
    "engine": ("e.json", lambda path: EngineInfo.load(path.with_suffix(".engine"))),
    "inspected engine": ("e.json", lambda path: describe(_beside(path, ".engine"))),
    "adapter": ("adapter_config.json", lambda path: load_adapter(path.parent)),
    "report": ("report.json", read_report),
    "requests": ("r.jsonl", lambda path: read_requests(path, 8, Sampling())),
    "messages": ("m.json", read_messages),
    "keys": ("k.json", lambda path: Access.read(path, None)),
    "data": ("d.jsonl", read_examples),
    "examples": ("examples.jsonl", read_validation_examples),
}
CONTENTS = {
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "not UTF-8": b'{"a": "\xff"}',
    "a name twice": b'{"a": 1, "a": 2}',
    "a long name twice": b'{"%s": 1, "%s": 2}' % (b"a" * 5000, b"a" * 5000),
    "a huge number": b'{"a": ' + b"9" * 5000 + b"}",
}


def _beside(path: Path, suffix: str) -> Path:
    path.with_suffix(suffix).write_bytes(b"x")
    return path.with_suffix(suffix)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)
def test_every_reader_refuses_it_at_once(
    tmp_path: Path, name: str, read: Callable[[Path], Any], content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    began = time.process_time()
    with pytest.raises(IaptError) as caught:
        read(tmp_path / name)
    assert time.process_time() - began < 1
    assert len(str(caught.value)) < 1000, "a text for people"


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_what_asks_whether_something_is_there_says_no(tmp_path: Path, content: bytes) -> None:
    for name in ("manifest.json", "run.json"):
        (tmp_path / name).write_bytes(content)
    assert not is_bundle(tmp_path) and read_record(tmp_path) == {}


def test_an_object_and_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": [1, {"b": null}]}', encoding="utf-8")
    assert read_object(path, "try again") == {"a": [1, {"b": None}]}
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(IaptError, match=r"f.json holds a list; expected a JSON object; try again$"):
        read_object(path, "try again")
    path.write_text('{"a": 1, "b": 2, "b": 3}', encoding="utf-8")
    with pytest.raises(IaptError, match=r"f.json is not JSON: the name 'b' is given twice in one object; try again$"):
        read_object(path, "try again")


def test_deep_enough_for_what_people_write() -> None:
    assert parse_json("[" * 64 + "]" * 64)
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        parse_json("[" * 65 + "]" * 65)
    assert parse_json('"' + "[" * 100 + '"') == "[" * 100, "brackets in a text are no levels"
