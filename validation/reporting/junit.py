"""A report as JUnit XML, which every CI system reads: a suite for each target, a test for each check."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from iapt_export.contract.manifest import write_atomically
from validation.judging.result import Check, Report, TargetResult
from validation.reporting.summary import whereabouts

FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


def write_junit(report: Report, path: Path) -> None:
    """Write ``report`` as JUnit XML to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = ElementTree.Element("testsuites", name=_text(f"iapt-export validate {report.bundle}"))
    for target in report.targets:
        root.append(_suite(report, target))
    ElementTree.indent(root)
    write_atomically(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _suite(report: Report, target: TargetResult) -> ElementTree.Element:
    name = f"{target.name}:{target.dtype}"
    was_run = target.status in ("pass", "fail")
    suite = ElementTree.Element(
        "testsuite",
        name=_text(f"{report.bundle} {name}"),
        tests=str(len(target.checks) + (not was_run)),
        failures=str(sum(not check.passed for check in target.checks)),
        errors="0",
        skipped=str(int(not was_run)),
        time=f"{target.seconds:.3f}",
    )
    for check in target.checks:
        suite.append(_test(name, check))
    if not was_run:
        test = ElementTree.SubElement(suite, "testcase", classname=_text(name), name="parity with PyTorch")
        ElementTree.SubElement(test, "skipped", message=_text(f"not run: {target.reason}"))
    if target.bisection is not None:
        ElementTree.SubElement(suite, "system-out").text = _text("\n".join(whereabouts(target.bisection)))
    return suite


def _test(target: str, check: Check) -> ElementTree.Element:
    name = f"{check.stage}: {', '.join(filter(None, (check.fed, check.part)))}"
    test = ElementTree.Element("testcase", classname=_text(target), name=_text(name))
    if not check.passed:
        figures = ", ".join(
            f"{name} {check.measured[name]:.3g}, allowed {limit:.3g}" for name, limit in check.limits.items()
        )
        failure = ElementTree.SubElement(test, "failure", type="parity", message=_text(figures))
        failure.text = _text(check.detail)
    return test


def _text(text: str) -> str:
    return FORBIDDEN.sub("?", text)
