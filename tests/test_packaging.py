import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainers", "iapt_export", "engines", "validation", "optimum")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged; setuptools writes beside its sources."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def wheel(source):
    """The built wheel."""
    pytest.importorskip("setuptools", "77", reason="building a wheel needs setuptools 77; install the extra 'dev'")
    folder = source.parent
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_our_packages_and_nothing_else(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    shipped = {name for name in names if name.endswith(".py")}
    expected = {str(path.relative_to(source)) for package in PACKAGES for path in (source / package).rglob("*.py")}
    assert shipped == expected


def test_wheel_holds_the_report_template_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "validation/reporting/templates/report.html.jinja" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_names_command_and_light_core(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "iapt-export = iapt_export.cli:main" in archive.read(info).decode()
        metadata = archive.read(info.replace("entry_points.txt", "METADATA")).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    core = {line.split()[1].split(">")[0].split("<")[0] for line in required}
    assert core == {"cyclopts", "jinja2", "ml_dtypes", "numpy", "rich", "safetensors", "tokenizers"}
