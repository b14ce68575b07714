"""A short form of ``python -m tests.torture``: kills of a cache's users, mutated files for every reader."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import pytest

from engines.serving.session import Session
from tests.bundles import TinyBuild
from tests.engines.serving.soak import Soak
from tests.tiny import tiny_llama
from tests.torture import killed, mutated
from tests.trainers.decoder.fp8_files import save_fp8


@pytest.mark.thorough
def test_no_reader_lets_a_raw_exception_through(tiny_build: TinyBuild, tmp_path: Path) -> None:
    adapter, engine = tiny_build.adapters["alpha"], dataclasses.asdict(mutated.ENGINE)
    fp8, _ = save_fp8(tmp_path / "models", tiny_llama())
    readers = mutated.readers(tiny_build.bundle, adapter, tiny_build.model, fp8, engine)
    work = tmp_path / "work"
    found = [mutated.torment(reader, work, max(6, int(30 * reader.share)), seed=5) for reader in readers]
    assert len({item.name for item in found}) == 25
    assert [fault for item in found for fault in (*item.raw, *item.slow)] == []
    assert all(item.growth_mib <= mutated.GROWTH_MIB and item.wrong == 0 for item in found)
    assert all(item.accepted < item.inputs for item in found), "every reader refuses some"


def test_a_reader_that_fails_is_seen(tmp_path: Path) -> None:
    def fragile(path: Path) -> None:
        if path.read_bytes() != b"{}":
            raise ZeroDivisionError("mine")

    found = mutated.torment(mutated.Reader("fragile", b"{}", fragile, "f.json"), tmp_path, 20)
    assert len(found.raw) >= 5 and "ZeroDivisionError: mine" in found.raw[0]


@pytest.fixture
def cache() -> killed.Scenario:
    none = lambda _: None  # noqa: E731
    return killed.Scenario("cache", none, killed._use_cache, killed._cache_problems, killed._cache_result, 1.0)


@pytest.mark.thorough
def test_a_cache_survives_kills(cache: killed.Scenario, tmp_path: Path) -> None:
    tally = killed.torment(cache, tmp_path, seconds=60, most=25)
    assert tally.faults == [] and tally.kills == 25 and tally.operations > 40
    assert 0 < tally.at_operations < 25


@pytest.mark.thorough
def test_a_command_that_loses_something_is_seen(cache: killed.Scenario, tmp_path: Path) -> None:
    def careless(folder: Path, again: bool) -> None:
        (folder / "answer").mkdir(exist_ok=True)
        (folder / "answer" / "half").write_text("half")
        (folder / "answer" / "rest").write_text("rest")

    half = dataclasses.replace(
        cache,
        name="careless",
        run=careless,
        problems=lambda folder: [] if len(list(folder.rglob("*"))) in (0, 3) else ["half of it"],
        result=lambda folder: len(list(folder.rglob("*"))),
    )
    tally = killed.torment(half, tmp_path, seconds=60, most=6)
    assert tally.operations == 3 and any("half of it" in fault for fault in tally.faults or ())


def test_a_thread_of_the_load_that_ends_early_is_seen() -> None:
    def change() -> None:
        raise KeyError("full")

    state = Soak(cast(Session, None), {})
    state.watched(change)
    assert state.lost == ["change ended: KeyError: 'full'"]


@pytest.mark.thorough
def test_a_cut_run_goes_on(cache: killed.Scenario, tmp_path: Path) -> None:
    """What was counted is not counted again, and the second part takes the kills that the first one left."""
    kept: list[int] = []
    tally = killed.torment(cache, tmp_path / "a", 60, 10, keep=lambda t: kept.append(t.kills))
    again = killed.Tally(**dataclasses.asdict(tally))
    killed.torment(cache, tmp_path / "b", 60, 14, tally=again)
    assert kept[-1] == 10 and again.kills == 14 and again.tried > tally.tried and again.faults == []
    reader = mutated.Reader("any", b"{}", lambda path: path.read_bytes(), "f.json")
    found = mutated.torment(reader, tmp_path, 5, seed=0)
    mutated.torment(reader, tmp_path, 5, seed=5, found=found)
    assert (found.inputs, found.accepted) == (10, 10)
