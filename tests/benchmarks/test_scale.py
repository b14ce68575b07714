"""The simulation's arithmetic, by hand; not the timings."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks.scale import (
    MEAN_ANSWER,
    PROMPTS,
    Arrival,
    Costs,
    affinity,
    arrivals,
    figures,
    main,
    simulate,
    two_choices,
)
from tests.bundles import TinyBuild

COSTS = Costs([1, 2, 4], [0.010, 0.012, 0.016], read_fixed_s=0.005, read_token_s=0.001, tenant_s=0.002)


def test_one_request_alone() -> None:
    (outcome,) = simulate([Arrival(1.0, 0, 16, 5)], COSTS, 1)
    assert outcome.first == pytest.approx(1.0 + 0.002 + 0.005 + (16 + PROMPTS) * 0.001)  # its tenant is new
    assert outcome.finished == pytest.approx(outcome.first + 4 * 0.010)
    assert (outcome.tokens, outcome.loaded) == (5, True)


def test_a_request_that_comes_while_another_decodes() -> None:
    """It waits for the step under way; after the next one it is read while the other waits; then both step together."""
    first, second = simulate([Arrival(0.0, 0, 16, 4), Arrival(0.031, 0, 16, 4)], COSTS, 1)
    assert first.first == pytest.approx(0.027)
    joined = 0.027 + 2 * 0.010 + 0.025  # it comes during the first of these steps
    assert second.first == pytest.approx(joined)
    assert first.finished == pytest.approx(joined + 0.012)
    assert second.finished == pytest.approx(joined + 0.012 + 2 * 0.010)


def test_every_request_is_answered_whole_by_any_number_of_replicas() -> None:
    load = arrivals(2 * COSTS.capacity(), 5, 20)
    for replicas in (1, 3):
        outcomes = simulate(load, COSTS, replicas, affinity, places=20)
        assert [each.tokens for each in outcomes] == [each.answer for each in load]
        assert all(each.arrived < each.first <= each.finished for each in outcomes)


def test_two_replicas_do_twice_as_much_where_one_is_flooded() -> None:
    load = arrivals(6 * COSTS.capacity(), 10, 8)
    one, two = (figures(simulate(load, COSTS, count))["tokens_per_s"] for count in (1, 2))
    assert 1.8 < two / one < 2.1


def test_affinity_takes_in_fewer_tenants() -> None:
    load = arrivals(0.5 * 10 * COSTS.capacity(), 10, 100)
    by_chance, by_tenant = (figures(simulate(load, COSTS, 10, routing, 16)) for routing in (two_choices, affinity))
    assert by_tenant["loaded"] < 0.9 * by_chance["loaded"]


def test_a_replica_without_a_place_refuses() -> None:
    load = [Arrival(0.0, 0, 16, 50), Arrival(0.1, 1, 16, 50), Arrival(0.2, 0, 16, 1)]
    outcomes = simulate(load, COSTS, 1, places=1)
    assert [each.refused for each in outcomes] == [False, True, False]
    assert figures(outcomes)["refused"] == pytest.approx(1 / 3)


def test_a_load_is_what_it_says() -> None:
    load = arrivals(100, 100, 10)
    assert load == arrivals(100, 100, 10)
    assert load[-1].time == pytest.approx(100, rel=0.05)
    assert statistics.mean(each.answer for each in load) == pytest.approx(MEAN_ANSWER, rel=0.05)
    share = statistics.mean(each.tenant == 0 for each in load)
    assert share == pytest.approx(1 / sum(1 / n for n in range(1, 11)), rel=0.1)


def test_the_command_measures_compares_and_simulates(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.scale.INSTRUCTION", (6, 12))
    monkeypatch.setattr("benchmarks.scale.MOST_ANSWER", 8)
    output = tmp_path / "scale.json"
    monkeypatch.setattr("sys.argv", ["scale", str(tiny_build.bundle), "--seconds", "0.05", "--output", str(output)])
    main()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [row["what"] for row in found["compared"]] == ["session", "simulated"] * 2
    assert all(row["tokens_per_s"] > 0 for row in found["compared"] + found["replicas"] + found["fleet"])
    assert "Fifty machines" in capsys.readouterr().out
