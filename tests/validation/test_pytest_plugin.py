"""A user's pytest runs a bundle's comparison, through the plugin that the entry point names."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.bundles import TinyBuild, rehash
from tests.validation.sabotage import one_weight

ROOT = Path(__file__).resolve().parents[2]


ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def words(*flags: str) -> list[str]:
    return ["-p", "validation.pytest_plugin", "-q", "-p", "no:cacheprovider", *flags]


def user_pytest(folder: Path, *flags: str) -> tuple[int, str]:
    """Run pytest in this process, in a folder without tests of ours."""
    out = io.StringIO()
    into = contextlib.redirect_stdout(out), contextlib.redirect_stderr(out)
    with contextlib.chdir(folder), patch.dict(os.environ, ALONE), into[0], into[1]:
        code = pytest.main(words(*flags))
    return int(code), out.getvalue()


def test_the_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"iapt-export": "validation.pytest_plugin"}
    code = "import sys, validation.pytest_plugin; print(*[m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], "every pytest of a machine loads the plugin, so it must be light"


@pytest.mark.thorough
def test_checks_are_tests_beside_the_users_own(tiny_build: TinyBuild, tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own():\n    assert True\n", encoding="utf-8")
    flags = words(f"--iapt-bundle={tiny_build.bundle}", "--iapt-case=most-padding", "-v", "-v")
    environment = {**os.environ, **ALONE, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", *flags]  # as a user does
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "test_own.py::test_own PASSED" in text
    assert "prefill logits: most-padding" in text and "15 passed" in text
    code, text = user_pytest(tmp_path)
    assert code == 0 and "1 passed" in text


def test_a_failing_check_says_where(tiny_bundle: Path, tmp_path: Path) -> None:
    one_weight(tiny_bundle)
    rehash(tiny_bundle)
    code, text = user_pytest(tmp_path, f"--iapt-bundle={tiny_bundle}", "--iapt-case=one-token")
    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert "prefill logits, one-token (alpha): relative" in text
    assert "first difference: layer 1, model.layers.1.mlp.down_proj.output" in text
    assert "Traceback" not in text


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    code, text = user_pytest(tmp_path, f"--iapt-bundle={tmp_path}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "holds no manifest.json; expected a bundle written by 'iapt-export build'" in text
