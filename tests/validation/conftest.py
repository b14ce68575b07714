"""The figure of planted faults that were caught."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many planted faults the validator caught, and how many it located."""
    reports = [
        report
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, [])
        if report.when == "call"
    ]
    counts = dict.fromkeys(("planted", "caught", "located"), 0)
    for report in reports:
        for name, _ in report.user_properties:
            if name in counts:
                counts[name] += 1
    if counts["planted"]:
        terminalreporter.write_line(
            f"planted faults: {counts['planted']}, caught {counts['caught']}, located {counts['located']}"
        )
