"""The demo's bundle in C++: the answers that PyTorch gives, and Python's tokens, for each tenant."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.bundles import run
from tests.native.built import RUNNER, needs_runner, needs_tokenizer
from tests.test_shipped_adapters import ADAPTERS, ANSWERS
from trainers.adapters.adapter import EXAMPLES_FILE
from validation.sides.cases import read_examples

pytestmark = pytest.mark.slow  # it builds the real backbone; tests/native/test_iapt_run.py has a tiny one


@pytest.fixture(scope="module")
def demo_bundle(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    adapters = [f"--adapter={ADAPTERS / name}" for name in ANSWERS]
    places = [f"--output={folder / 'bundle'}", f"--cache={folder / 'cache'}"]
    built = run("build", f"--model={smollm2}", *adapters, *places, "--new-tokens=4")
    assert built.code == 0, built.err
    return folder / "bundle"


@needs_runner
@needs_tokenizer
def test_the_demo_answers_the_same_in_cpp(demo_bundle: Path) -> None:
    """``ANSWERS`` is the golden record that PyTorch, Python and C++ are held to."""
    for name, answers in ANSWERS.items():
        examples = read_examples(ADAPTERS / name / EXAMPLES_FILE)
        prompts = [f"--prompt={examples[index]}" for index in answers]
        flags = [
            f"--tenant={name}",
            *prompts,
            "--prompt=Write about the sea — und über Möwen 🌊.",
            "--max-new-tokens=32",
        ]
        made = subprocess.run([RUNNER, demo_bundle, *flags, "--json"], capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        assert [row["text"] for row in json.loads(made.stdout)][: len(answers)] == list(answers.values())
        assert made.stdout == run("generate", demo_bundle, *flags, "--json").out
