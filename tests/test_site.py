"""The documentation site as a reader has it: opened from a disk, without a network, on a phone too."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.validation.reporting.test_report_browser import BROWSER

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (390, 1280)
PROBE = """<!doctype html><body><pre id="found"></pre><script>
const pages = %s, found = {}
const look = (page, width) => new Promise((resolve) => {
  const frame = document.createElement("iframe")
  frame.style = `width:${width}px;height:900px;border:0`
  frame.onload = () => {
    const seen = frame.contentDocument
    const isCut = (code) => code.scrollWidth > code.clientWidth
    const cut = [...seen.querySelectorAll(".language-sh code, .highlight-ipynb pre")].filter(isCut).length
    found[`${page} ${width}`] = [seen.documentElement.scrollWidth, cut]
    frame.remove()
    resolve()
  }
  frame.src = page
  document.body.append(frame)
})
const all = async () => {
  for (const page of pages) for (const width of %s) await look(page, width)
  document.getElementById("found").textContent = JSON.stringify(found)
}
all()
</script></body>"""
"""A page that opens the others in frames of some widths, and notes how wide they are and how much code is cut off."""
QUESTIONS = {
    "gemma 2": "models.html",
    "exit codes": "reference/files.html#exit-codes",
    "memory of tenants": "choose.html#memory-of-a-session-and-its-tenants",
    "int8": "choose.html#a-type-of-weights",
    "memory 50 tenants": "choose.html#memory-of-a-session-and-its-tenants",
    "exit code 3": "reference/files.html#exit-codes",
    "dora": "methods.html#which-of-pefts-adapters-work",
    "peft lora http": "serving.html#a-peft-lora-beside-an-iapt-tenant",
    "drafts": "python.html#drafts-several-tokens-in-one-step",
    "hostile request": "security.html#what-a-hostile-request-can-do",
    "tensorrt int4": "deploy.html#smaller-engines",
}
"""What a reader types, and where the answer stands."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


def dom_of(address: str, profile: Path, *more: str) -> str:
    """What a browser without a network makes of a page."""
    if BROWSER is None:
        pytest.skip("needs Chromium; none of chromium, google-chrome is installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", *more]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--virtual-time-budget=20000"]
    command = [BROWSER, *flags, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        pairs = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^" >]+)|<link[^>]* href="?([^" >]+)', text)
        loaded = ["".join(pair) for pair in pairs]
        assert loaded and not [address for address in loaded if re.match("(https?:)?//", address)], page


@pytest.mark.parametrize("asked", QUESTIONS)
def test_the_search_finds_answers(site: Path, tmp_path: Path, asked: str) -> None:
    dom = dom_of(f"{(site / 'index.html').as_uri()}?q={asked.replace(' ', '+')}", tmp_path)
    found = re.findall(r'<a href="([^"]+)" class="md-search-result__link"', dom)
    assert any(link.endswith(QUESTIONS[asked]) for link in found[:12]), found


def test_no_page_and_no_command_is_wider_than_its_window(site: Path, tmp_path: Path) -> None:
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    folder = Path(shutil.copytree(site, tmp_path / "site"))
    (folder / "probe.html").write_text(PROBE % (json.dumps(pages), json.dumps(WIDTHS)), encoding="utf-8")
    dom = dom_of((folder / "probe.html").as_uri(), tmp_path / "profile", "--allow-file-access-from-files")
    found = re.search(r'<pre id="found">(.+?)</pre>', dom)
    assert found
    looks = json.loads(found[1])
    assert len(looks) == len(pages) * len(WIDTHS)
    assert {page: look for page, look in looks.items() if look[0] > int(page.rsplit(" ", 1)[1]) or look[1]} == {}
