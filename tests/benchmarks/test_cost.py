"""The arithmetic of what whole answers cost, and that it can be measured; not the timings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost import IAPT, LENGTHS, TITLES, break_even, compare_costs, cost_ms, cost_rows, draw_costs
from tests.bundles import TinyBuild


def batches(read: float, step: float, slope: float = 0.0) -> dict[str, Any]:
    return {str(length): {"read_ms": read * length, "step_ms": step + slope * length} for length in LENGTHS}


def a_round(factor: float = 1.0) -> dict[str, Any]:
    """Reading costs IAPT 1.5 ms a token and LoRA 1.0; a step 10 and 12 ms, whatever the entries."""
    kinds = {"plain": (1.0, 10.0), IAPT: (1.5, 10.0), "lora-equal": (1.0, 12.0), "lora-all": (1.5, 20.0)}
    return {"rows": 8, "kinds": {name: batches(*(factor * each for each in of)) for name, of in kinds.items()}}


RECORDS = [a_round(), a_round(3.0), a_round(2.0)]


def test_a_step_costs_what_the_entries_before_it_cost() -> None:
    # 64 tokens are read, and 16 steps are taken with 64 to 80 entries before them, 72 on average
    assert cost_ms(batches(2.0, 5.0, 0.25), 64, 16) == pytest.approx(2 * 64 + 16 * (5 + 0.25 * 72))
    assert cost_ms(batches(2.0, 5.0, -0.25), 64, 16) < cost_ms(batches(2.0, 5.0), 64, 16) + 16 * 0.25 * 512


def test_break_even_is_where_saved_steps_have_paid_for_reading() -> None:
    # reading 128 tokens costs 64 ms more, a step saves 2 ms: 32 steps
    assert break_even(RECORDS, "lora-equal", 8, 128) == 32
    assert break_even(RECORDS, "lora-equal", 8, 512) == 128
    assert break_even(RECORDS, "lora-all", 8, 128) == 1
    assert break_even(RECORDS, "plain", 8, 128) is None, "no answer is so long that a tenant costs nothing"
    assert break_even(RECORDS, "lora-equal", 8, 128, most=31) is None


def test_the_table_and_the_plot_show_every_kind(tmp_path: Path) -> None:
    rows = list(cost_rows(RECORDS))
    assert [row[0] for row in rows] == [title for title in TITLES.values() for _ in LENGTHS]
    of = {(row[0], row[2]): row for row in rows}
    equal = of[TITLES["lora-equal"], "128"]
    # (128 + 12 A) / (192 + 10 A)
    assert equal == [TITLES["lora-equal"], "8", "128", "32", "0.82", "1.00", "1.13", "1.18"]
    assert of[TITLES["plain"], "128"][3] == "none"
    draw_costs([*RECORDS, {**a_round(), "rows": 1}], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


@pytest.mark.thorough
def test_measuring_leaves_no_row_behind(tiny_build: TinyBuild) -> None:
    bundles = dict.fromkeys(("plain", IAPT), tiny_build.bundle)
    found = list(compare_costs(bundles, rounds=2, threads=1, rows=(1, 2), lengths=(4, 8)))
    assert [each["rows"] for each in found] == [1, 2, 1, 2]
    for each in found:
        assert set(each["kinds"]) == set(bundles)
        for lengths in each["kinds"].values():
            assert list(lengths) == ["4", "8"]
            assert all(batch["read_ms"] > 0 and batch["step_ms"] > 0 for batch in lengths.values())
