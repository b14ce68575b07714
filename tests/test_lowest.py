"""What `make test-lowest` installs is what pyproject.toml declares."""

from __future__ import annotations

import tomllib

import pytest

from tests.lowest import ROOT, TESTS, lowest_pins


def test_every_requirement_has_a_lowest_version_to_test() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = lowest_pins(project)
    assert "onnxruntime==1.23.1" in pins and len(pins) == len(set(pins))
    assert {pin.split("==")[0] for pin in pins} >= {"numpy", "tokenizers", "torch", "transformers", "onnx", "onnx-ir"}


def test_a_requirement_without_a_lowest_version_is_named() -> None:
    project = {"dependencies": ["numpy"], "optional-dependencies": {"cpu": [], "train": [], "export": []}}
    with pytest.raises(ValueError, match=r"'numpy' is not NAME>=VERSION"):
        lowest_pins(project)


def test_the_tests_that_it_runs_exist() -> None:
    assert all((ROOT / name).exists() for name in TESTS)
