"""The real ``optimum-cli`` finds our commands, and they are those of ``iapt-export``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from iapt_export.cli import command_line
from tests.bundles import TinyBuild, run
from tests.doors.environments import OPTIMUM
from trainers.methods.configs import DEFAULT_METHOD

pytestmark = pytest.mark.door


@pytest.fixture(autouse=True)
def _environment() -> None:
    OPTIMUM.need()


def optimum(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it somewhere else than in this repository, whose folder would be found without being installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(word) for word in (OPTIMUM.bin / "optimum-cli", *words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_export_makes_a_proven_bundle_that_answers(tiny_build: TinyBuild, tmp_path: Path) -> None:
    words = tiny_build.arguments(tmp_path / "bundle", "alpha", "beta")
    made = optimum(tmp_path, "export", "iapt", *words[1:])
    assert made.returncode == 0, made.stderr
    assert "verdict: pass" in made.stdout
    assert json.loads((tmp_path / "bundle" / "report.json").read_text(encoding="utf-8"))["verdict"] == "pass"
    asked = ("generate", tmp_path / "bundle", "--tenant=beta", "--prompt=the film", "--max-new-tokens=6", "--json")
    answered = optimum(tmp_path, "iapt", *asked)
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout) == json.loads(run(*asked).out)


def test_every_command_is_there(tmp_path: Path) -> None:
    told = optimum(tmp_path, "iapt", "--help").stdout
    for name in command_line(DEFAULT_METHOD):
        assert name in told


def test_help_is_that_of_build(tmp_path: Path) -> None:
    assert "iapt" in optimum(tmp_path, "--help").stdout
    assert "iapt" in optimum(tmp_path, "export", "--help").stdout
    told = optimum(tmp_path, "export", "iapt", "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("Usage: iapt-export build") and "--max-lora-rank" in told.stdout


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("export", "iapt"), 2, "iapt-export build needs --model, --output"),
        (("export", "iapt", "--model", "m", "--adapter", "a", "-o", "b", "c"), 2, "'c' belongs to no flag"),
        (("export", "iapt", "--model", "m", "--adapter", "./gone", "-o", "b"), 1, "gone: adapter_config"),
        (("export", "iapt", "--model", "m", "--adapter", "a", "-o", "b", "--task", "t"), 2, "--task"),
        (("iapt",), 2, "iapt-export needs a command"),
        (("iapt", "publish"), 2, "publish"),
        (("iapt", "inspect", "gone"), 1, "gone"),
    ],
)
def test_bad_input_is_refused_as_iapt_export_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = optimum(tmp_path, *words)
    own = run(*(("build", *words[2:]) if words[0] == "export" else words[1:]))
    assert (found.returncode, found.stderr) == (own.code, own.err)
    assert found.returncode == code and text in found.stderr and "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_registering_imports_nothing_of_ours(tmp_path: Path) -> None:
    code = "import sys, optimum.commands.register.iapt; print(*{name.split('.')[0] for name in sys.modules})"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [OPTIMUM.bin / "python", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    heavy = {"iapt_export", "trainers", "engines", "validation", "cyclopts", "torch", "transformers", "onnx"}
    assert not heavy & set(found.stdout.split())
