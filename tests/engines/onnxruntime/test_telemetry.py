"""Nothing of ours lets ONNX Runtime keep an identifier of the machine, or send events.

findings/onnxruntime-reports-home.sh shows what it does without that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from engines.onnxruntime.devices import load_onnxruntime
from tests.bundles import TinyBuild
from tests.native.built import RUNNER, needs_runner, needs_tokenizer


def left_behind(home: Path, *command: str | Path) -> list[str]:
    """What a command leaves in an empty home folder, outside CI, where ONNX Runtime sends nothing anyhow."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment = {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return [str(path.relative_to(home)) for path in home.rglob("*")]


def test_a_session_leaves_nothing_behind(tiny_build: TinyBuild, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from engines.serving.session import Request, Session\n"
        "with Session.open(sys.argv[1]) as session:\n"
        "    print(*(answer.tokens for answer in session.generate([Request('alpha', tokens=(5, 6))])))\n"
    )
    assert left_behind(tmp_path / "home", sys.executable, "-c", code, tiny_build.bundle) == []


@needs_runner
@needs_tokenizer
def test_iapt_run_leaves_nothing_behind(tiny_build: TinyBuild, tmp_path: Path) -> None:
    """With a prompt as text, so that the tokenizer of onnxruntime-genai is loaded, too."""
    command = (RUNNER, tiny_build.bundle, "--tenant=alpha", "--prompt=a film", "--max-new-tokens=2")
    assert left_behind(tmp_path / "home", *command) == []


@pytest.mark.parametrize(("wish", "calls"), [("1", 1), ("0", 0)])
def test_who_wants_events_is_heard(monkeypatch: pytest.MonkeyPatch, wish: str, calls: int) -> None:
    """An application that has loaded ONNX Runtime before has its events ended, unless they are wished for."""
    called: list[None] = []
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", wish)
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: called.append(None))
    load_onnxruntime()
    assert len(called) == calls
    code = "import os, iapt_export; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{wish}\n"
