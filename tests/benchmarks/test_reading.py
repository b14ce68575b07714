"""The arithmetic of the benchmark of reading beside decoding; not the timings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.reading import figures, main
from tests.bundles import TinyBuild


def listener(times: list[float], submitted: float = 0.0) -> Any:
    return SimpleNamespace(
        times=times, generation=SimpleNamespace(times=SimpleNamespace(submitted=submitted, first_token=times[0]))
    )


def test_only_gaps_until_the_last_instruction_count() -> None:
    talkers = [listener([0.5, 1.0, 1.1, 1.3, 9.0]), listener([1.05, 1.15, 1.35])]
    readers = [listener([1.2], 1.0), listener([1.4], 1.1)]
    found = figures(talkers, readers, 1.0, {"seconds": 2.0})
    assert found["gap_max_ms"] == pytest.approx(200) and found["gap_p50_ms"] == pytest.approx(150)
    assert found["first_token_p50_ms"] == pytest.approx(250) and found["seconds"] == 2.0


def test_a_bundle_of_eight_rows_is_refused(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["reading", str(tiny_build.bundle)])
    with pytest.raises(SystemExit, match="nine rows or more"):
        main()
