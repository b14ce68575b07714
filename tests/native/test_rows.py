"""Tenants with prompts of different lengths: C++ and Python answer the same, and refuse the same, over each cache."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from engines.serving.session import Request, Session
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import MIXED, TinyBuild
from tests.native.built import ROWS, needs_runner

SHORT, LONG = "topics", "style"
"""Tenants with 4 soft tokens and with 7."""
LONGEST, CAPACITY, BATCH = 96, 160, 8
"""Of the tiny bundle's ranges."""
MOST = {name: CAPACITY - MIXED[name].prompt_length - LONGEST + 1 for name in (SHORT, LONG)}
"""New tokens after the longest instruction, with which a tenant's row fills the cache."""

Row = tuple[str, int, list[int]]

pytestmark = needs_runner
both_caches = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "portable"])


@pytest.fixture(scope="module")
def bundle(mixed_build: TinyBuild) -> Path:
    return mixed_build.bundle


def ids(length: int) -> list[int]:
    return [5 + n % 50 for n in range(length)]


def from_python(bundle: Path, in_place: bool, rows: list[Row]) -> list[list[int]]:
    requests = [Request(name, tokens=tuple(ids), max_new_tokens=n, ignore_eos=True) for name, n, ids in rows]
    with Session.open(bundle, in_place=in_place) as session:
        return [answer.tokens for answer in session.generate(requests)]


def answer_rows(bundle: Path, in_place: bool, rows: list[Row], mode: str = "") -> subprocess.CompletedProcess[str]:
    words = [word for name, n, ids in rows for word in (name, str(n), " ".join(map(str, ids)))]
    command = [str(ROWS), str(bundle), str(int(in_place)) + mode, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@both_caches
@pytest.mark.parametrize(
    "rows",
    [
        [(SHORT, MOST[SHORT], ids(LONGEST))],
        [(LONG, MOST[LONG], ids(LONGEST))],
        [(SHORT, 1, ids(LONGEST)), (LONG, 120, ids(3)), (SHORT, 7, ids(20))],
        [(LONG, 1 + n, ids(1 + 3 * n)) for n in range(BATCH + 3)],
    ],
    ids=["short fills the cache", "long fills the cache", "rows end early", "more rows than a batch"],
)
def test_equal_answers(bundle: Path, in_place: bool, rows: list[Row]) -> None:
    wanted = from_python(bundle, in_place, rows)
    assert [len(answer) for answer in wanted] == [n for _, n, _ in rows]
    outcome = answer_rows(bundle, in_place, rows)
    assert outcome.returncode == 0, outcome.stderr
    assert [[int(word) for word in line.split()] for line in outcome.stdout.splitlines()] == wanted


@both_caches
def test_a_callback_that_asks_its_own_session_is_refused(bundle: Path, in_place: bool) -> None:
    """It would write over the cache of the rows that it is told of."""
    rows = [(SHORT, 3, ids(LONGEST)), (LONG, 6, ids(3))]
    outcome = answer_rows(bundle, in_place, rows, "n")
    assert outcome.returncode == 0, outcome.stderr
    assert [[int(word) for word in line.split()] for line in outcome.stdout.splitlines()] == from_python(
        bundle, in_place, rows
    )
    told = outcome.stderr.splitlines()
    assert len(told) == 9
    assert set(told) == {"this session is answering already; open another one to answer beside it"}


def test_a_bundle_that_is_moved_before_its_tokenizer_is_read_gives_no_empty_texts(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    outcome = answer_rows(copy, True, [(SHORT, 3, ids(4))], "m")
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert outcome.stderr == f"{copy} was changed after it was opened (tokenizer.json, at least); open it again\n"


def test_equal_answers_over_a_cache_in_8_bits(small_cache_build: TinyBuild) -> None:
    rows = [("alpha", 12, ids(LONGEST)), ("beta", 20, ids(3)), ("gamma", 7, ids(20))]
    wanted = from_python(small_cache_build.bundle, True, rows)
    outcome = answer_rows(small_cache_build.bundle, True, rows)
    assert outcome.returncode == 0, outcome.stderr
    assert [[int(word) for word in line.split()] for line in outcome.stdout.splitlines()] == wanted


@both_caches
@pytest.mark.parametrize(
    "row",
    [
        (SHORT, MOST[SHORT] + 1, ids(LONGEST)),
        (LONG, MOST[LONG] + 1, ids(LONGEST)),
        (SHORT, CAPACITY, ids(5)),
        (SHORT, 1, ids(LONGEST + 1)),
        (SHORT, 0, ids(5)),
        (SHORT, 1, [5, 10**6]),
    ],
    ids=str,
)
def test_equal_refusals(bundle: Path, in_place: bool, row: Row) -> None:
    fine = (LONG, 2, ids(5))
    with pytest.raises(IaptError) as refused:
        from_python(bundle, in_place, [fine, row])
    outcome = answer_rows(bundle, in_place, [fine, row])
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert outcome.stderr.strip() == str(refused.value)


@both_caches
def test_too_short_an_instruction(bundle: Path, in_place: bool, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = BundleManifest.load(copy)
    sequence = dataclasses.replace(manifest.ranges.sequence, min=4)
    dataclasses.replace(manifest, ranges=dataclasses.replace(manifest.ranges, sequence=sequence)).save(copy)
    with pytest.raises(IaptError, match="has 3 tokens; this bundle takes at least 4") as refused:
        from_python(copy, in_place, [(LONG, 2, ids(3))])
    assert answer_rows(copy, in_place, [(LONG, 2, ids(3))]).stderr.strip() == str(refused.value)
