"""Install the lowest versions that pyproject.toml allows into an environment of their own, and run tests with them.

``python -m tests.lowest`` (`make test-lowest`). The environment stands in ``.cache/lowest`` and is kept while the
bounds stay. PIP_ARGS goes to pip, as in the Makefile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "lowest"
EXTRAS = ("cpu", "train", "export")
TOOLS = ("pytest>=8", "hypothesis>=6.100", "filelock", "setuptools>=77")
TESTS = (
    "tests/engines/onnxruntime",
    "tests/engines/serving/test_text.py",
    "tests/iapt_export/graphs/test_passes.py",
    "tests/iapt_export/graphs/test_trace.py",
    "tests/iapt_export/building/test_bundle.py",
    "tests/trainers/training/test_train.py",
    "tests/validation/reporting",
)
"""Few, and every package takes part: training, tracing, a whole build with its proof, and serving."""


def lowest_pins(project: dict[str, Any]) -> list[str]:
    """Every requirement of the core and of `EXTRAS`, at its lower bound.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    wanted = [*project["dependencies"], *(text for name in EXTRAS for text in project["optional-dependencies"][name])]
    pins = {}
    for text in wanted:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", text)
        if not match:
            raise ValueError(f"{text!r} is not NAME>=VERSION, so it has no lowest version to test")
        pins[match[1]] = f"{match[1]}=={match[2]}"
    return list(pins.values())


def main() -> int:
    """See above; pytest's exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = lowest_pins(project)
    stamp, python = FOLDER / "installed.txt", FOLDER / "bin" / "python"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != "\n".join(pins):
        print(f"installing {', '.join(pins)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", *os.environ.get("PIP_ARGS", "").split()]
        subprocess.run([*pip, *pins, *TOOLS], check=True)
        stamp.write_text("\n".join(pins), encoding="utf-8")
    words = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(sys.argv[1:] or TESTS)]
    return subprocess.run(words, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
