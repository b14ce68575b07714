"""What a release and a user's CI say of themselves: no index has the project yet, and nothing publishes unasked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from iapt_export import __version__
from iapt_export.contract.manifest import DOCUMENTATION

ROOT = Path(__file__).resolve().parent.parent
RELEASE = ".github/workflows/release.yml"
VALIDATE = "examples/ci/validate-bundle.yml"
HINTING = (".py", ".md", ".ipynb", ".yml", ".yaml", ".sh", ".cc", ".h", ".html", ".txt", ".cmake")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def commands(workflow: Any) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])
    assert citation["cff-version"] == "1.2.0" and citation["title"].startswith(project["name"])
    assert "arXiv:2405.18203" in str(citation["references"])


def test_a_release_waits_for_a_tag_a_switch_and_the_wheels_tests() -> None:
    workflow = read(RELEASE)
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key "on" as true
    jobs = workflow["jobs"]
    assert jobs["build"]["if"] == "vars.RELEASES == 'on'"
    assert {name: job.get("needs") for name, job in jobs.items()} == {"build": None, "test": "build", "publish": "test"}
    assert workflow["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert jobs["publish"]["environment"] == "release"
    assert "NOT SWITCHED ON" in (ROOT / RELEASE).read_text(encoding="utf-8").splitlines()[0]


def test_the_wheels_tests_exist_and_run_without_the_sources() -> None:
    (line,) = [line for text in commands(read(RELEASE)) for line in text.splitlines() if "pytest" in line]
    folders = re.findall(r"tests/[a-z_/]+", line)
    assert folders and all((ROOT / folder).is_dir() for folder in folders)
    copied = next(line for text in commands(read(RELEASE)) for line in text.splitlines() if line.startswith("cp "))
    assert copied.split()[2:-1] == ["tests", "pyproject.toml", "docs"]  # and no package of ours


def test_a_users_ci_installs_from_a_place_that_can_have_the_project() -> None:
    workflow = read(VALIDATE)
    installs = [line for text in commands(workflow) for line in text.splitlines() if "pip install" in line]
    assert len(installs) == len(workflow["jobs"])
    assert all('"iapt-export[train,export,cpu] @ $IAPT_EXPORT"' in line for line in installs)
    assert re.fullmatch(r"git\+https://[^@]+@v[0-9.]+", workflow["env"]["IAPT_EXPORT"])
    assert "Replace" in (ROOT / VALIDATE).read_text(encoding="utf-8").partition("\nname:")[0]


def test_no_hint_installs_from_an_index_that_lacks_the_project() -> None:
    """Until a release is out, hints name the clone: ``pip install -e ".[cpu]"``."""
    folders = ("iapt_export", "trainers", "engines", "validation", "docs", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in HINTING]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    assert len(files) > 200
    wrong = re.compile(r"(?:pip|pipx|uv|poetry)\b.* (?:install|add)\b.*\biapt[-_]export\b(?!\[[a-z,]+\] @ )")
    assert wrong.search("pip install iapt-export[cpu]") and wrong.search("uv pip install 'iapt_export'")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if wrong.search(line)
    ]
    assert found == []


def test_what_a_bundle_says_of_itself_is_explained_where_it_says() -> None:
    page, _, place = DOCUMENTATION.partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert place in [heading.lower().replace(" ", "-") for heading in headings]
