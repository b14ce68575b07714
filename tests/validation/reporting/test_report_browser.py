"""The report in a real headless browser: no script error, nothing fetched, nothing wider than a phone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.validation.fake_report import failing_report, located_report, passing_report
from validation.judging.result import Report
from validation.reporting.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<!doctype html><body>
<iframe id="page" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const root = frame.contentDocument.documentElement;
  const plots = [...frame.contentDocument.querySelectorAll("figure svg")];
  const place = frame.contentDocument.querySelector(".found .place");
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.scrollWidth,
    word: frame.contentDocument.querySelector(".verdict .word").textContent,
    place: place ? place.textContent.trim() : null,
    bottom: place ? place.getBoundingClientRect().bottom : null,
    plots: plots.every(svg => svg.getBoundingClientRect().height > 80),
    loaded: frame.contentWindow.performance.getEntriesByType("resource").length,
  }});
}};
</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium; none of chromium, google-chrome is installed")


def look(report: Report, folder: Path, width: int) -> tuple[dict[str, object], str]:
    """What a browser of that width makes of a report, and what it logged."""
    write_report(report, folder)
    (folder / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (folder / "probe.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(found[1]), done.stderr


@pytest.mark.parametrize("width", [390, 1280])
def test_the_failing_layer_stands_on_the_first_screen(width: int, tmp_path: Path) -> None:
    seen, log = look(located_report(), tmp_path, width)
    assert seen["word"] == "FAIL"
    assert seen["place"] == "Layer 17, model.layers.17.self_attn.o_proj.input"
    assert isinstance(seen["bottom"], float) and seen["bottom"] < 600
    assert isinstance(seen["width"], int) and seen["width"] <= width
    assert seen["plots"] is True and seen["loaded"] == 0
    assert "CONSOLE" not in log


@pytest.mark.parametrize("width", [360, 1280])
def test_other_reports_fit_too(width: int, tmp_path: Path) -> None:
    long = dataclasses.replace(passing_report(), bundle="a-rather-long-name-" * 8, command="x" * 300)
    for name, report in (("good", long), ("bad", failing_report())):
        (tmp_path / name).mkdir()
        seen, log = look(report, tmp_path / name, width)
        assert isinstance(seen["width"], int) and seen["width"] <= width, name
        assert seen["place"] is None and "CONSOLE" not in log
