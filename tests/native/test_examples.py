"""The embedding examples, compiled as a user would: against the installed library, through ``find_package``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import TinyBuild
from tests.native.built import INSTALLED, ROOT, needs_runner, needs_tokenizer

APPS = ROOT / "examples" / "apps"
WORDS = ["alpha", "the film is a quiet joy", "beta", "a dull story"]


def output_of(*command: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_runner
@needs_tokenizer
def test_both_programs_say_the_same(tiny_build: TinyBuild, tmp_path: Path) -> None:
    output_of(
        "cmake", "-S", APPS, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={INSTALLED}", "-DCMAKE_CXX_FLAGS=-Wall -Werror"
    )
    output_of("cmake", "--build", tmp_path)
    made = output_of(tmp_path / "ask_two_tenants", tiny_build.bundle, *WORDS)
    assert made == output_of(sys.executable, APPS / "ask_two_tenants.py", tiny_build.bundle, *WORDS)
    assert made.startswith("alpha: ") and "\nbeta: " in made


@pytest.mark.parametrize(("name", "most"), [("ask_two_tenants.cc", 40), ("ask_two_tenants.py", 20)])
def test_the_examples_stay_small(name: str, most: int) -> None:
    assert len((APPS / name).read_text(encoding="utf-8").splitlines()) <= most
