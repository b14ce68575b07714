"""What commands say beside their results: nothing when they are to be quiet, and everything in a file on request."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from iapt_export.progress import listening
from tests.bundles import RANGES, TinyBuild, run

ROOT = Path(__file__).resolve().parents[2]


EACH = """
import json, sys
from iapt_export.cli import main

for command in json.loads(sys.argv[1]):
    try:
        main(command)
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    print("code", code, command[0], flush=True)
"""
"""Runs commands one after the other, and says how each ended."""


def noisy() -> None:
    """What libraries do: matplotlib logs warnings, others raise Python's."""
    logging.getLogger("matplotlib.font_manager").warning("building the font cache")
    warnings.warn("an old call", FutureWarning, stacklevel=1)


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(quiet=True, verbose=False, file=None):
        noisy()
    assert capsys.readouterr().err == ""
    with listening(quiet=False, verbose=False, file=None), pytest.warns(FutureWarning):
        noisy()
    assert "building the font cache" in capsys.readouterr().err


def test_errors_are_shown_whatever_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(quiet=True, verbose=False, file=None):
        logging.getLogger("engines.serving.session").error("the session has failed")
    assert capsys.readouterr().err == "the session has failed\n"


def test_a_file_gets_all_with_times_and_nothing_stays_behind(tmp_path: Path) -> None:
    file, before = tmp_path / "log.txt", list(logging.getLogger().handlers)
    with listening(quiet=True, verbose=False, file=file):
        noisy()
        logging.getLogger("iapt_export").info("a pass")
    with pytest.raises(ZeroDivisionError), listening(quiet=True, verbose=False, file=file):
        _ = 1 / 0
    text = file.read_text(encoding="utf-8")
    assert "WARNING matplotlib.font_manager: building the font cache" in text
    assert "an old call" in text and "INFO iapt_export: a pass" in text
    assert "Traceback (most recent call last)" in text and "ZeroDivisionError" in text
    assert text[:4].isdigit(), "a line begins with its time"
    assert logging.getLogger().handlers == before


def test_the_log_file_of_a_command(tiny_build: TinyBuild, tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    asked = ["--quick", "--new-tokens=4", f"--log={file}"]
    assert run("validate", tiny_build.bundle, "--quiet", *asked).err == ""
    assert "PyTorch generates the reference" in file.read_text(encoding="utf-8")
    assert run("validate", tmp_path, f"--log={file}").code == 1
    assert "BundleError" in file.read_text(encoding="utf-8"), "what came before stays, and the trace is added"
    outcome = run("doctor", f"--log={tmp_path}/none/log.txt")
    assert outcome.code == 1 and "there is no folder" in outcome.err


@pytest.mark.thorough
def test_whole_runs_write_nothing_to_stderr(tiny_build: TinyBuild, tmp_path: Path) -> None:
    """In a process of their own, because C++ libraries write past Python."""
    lines = [{"instruction": f"is this positive? {n}", "output": ("yes", "no")[n % 2]} for n in range(16)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    model, bundle = f"--model={tiny_build.model}", str(tiny_build.bundle)
    training = ["--max-steps=2", "--batch-size=2", "--bottleneck=8"]
    ranges = [f"--{name}={text}" for name, text in RANGES.items()]
    commands = [
        ["train", model, "--data=data.jsonl", "--output=fresh", *training],
        ["build", model, "--adapter=fresh", "--output=out", f"--cache={tiny_build.cache}", *ranges, "--new-tokens=4"],
        ["validate", bundle, "--quick", "--new-tokens=4", "--report=report"],
        ["bench", bundle, "--rows", "1", "--repeat=1", "--prompt-tokens=4", "--new-tokens=4", "--plot=plot.png"],
        ["tenant", f"guest={tiny_build.adapters['beta']}", f"--bundle={bundle}", "--output=guest.safetensors"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path / "fonts")}
    quiet = json.dumps([[*command, "--quiet"] for command in commands])
    argv = [sys.executable, "-c", EACH, quiet]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("code ")] == [
        f"code 0 {command[0]}" for command in commands
    ]
