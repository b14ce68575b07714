"""The built-in page in a real headless browser: it asks a tenant, shows stream and figures, and fits a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import TinyBuild

pytest.importorskip("fastapi", reason="needs the extra serve")

from engines.http.app import PAGE
from tests.engines.http.served import Served, in_thread

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVE = """<script>
window.addEventListener("load", async () => {
  document.body.style.cssText = "margin: 0; width: WIDTHpx";
  // the browser's clock stands still while it fetches, so that the server has its time
  const until = async (ready) => {
    while (!ready()) { await fetch("state"); await new Promise((done) => setTimeout(done, 20)); }
  };
  await until(() => $("model").options.length);
  $("model").value = "beta"; $("tokens").value = "20"; $("prompt").value = "the film";
  $("form").requestSubmit();
  await until(() => /ended by/.test($("note").textContent));
  await until(() => /[0-9]/.test($("rows").textContent));
  const rights = [...document.querySelectorAll("body, body *")].map((each) => each.getBoundingClientRect().right);
  document.body.dataset.found = JSON.stringify({ width: Math.ceil(Math.max(...rights)),
    plot: $("plot").firstElementChild.getAttribute("points").length, rows: $("rows").textContent });
});
</script></body>"""


@pytest.fixture
def server(tiny_build: TinyBuild) -> Iterator[Served]:
    with in_thread(tiny_build.bundle) as served:
        yield served


def test_the_page_is_one_file_that_fetches_nothing_else(server: Served) -> None:
    status, text, headers = server.ask("/")
    assert status == 200 and headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "https://" not in text
    assert set(re.findall(r'fetch\("([^"]+)"', text)) == {"v1/models", "state", "v1/chat/completions"}


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium; none of chromium, google-chrome is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_question_in_the_browser(server: Served, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven = tmp_path / "page.html"
    driven.write_text(
        PAGE.read_text(encoding="utf-8").replace("</body>", DRIVE.replace("WIDTH", str(width))), encoding="utf-8"
    )
    monkeypatch.setattr("engines.http.app.PAGE", driven)
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={max(width, 500)},900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=60000",
        f"--screenshot={tmp_path / 'page.png'}",
        "--dump-dom",
        server.url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-found="([^"]+)"', done.stdout)
    assert found, done.stderr[-2000:]
    assert f'"rows":"0 / {server.state()["max_rows"]}"'.replace('"', "&quot;") in found[1]
    shown = re.search(r"&quot;width&quot;:(\d+),&quot;plot&quot;:(\d+)", found[1])
    assert shown and int(shown[1]) <= width and int(shown[2]) > 0
    assert "CONSOLE" not in done.stderr
