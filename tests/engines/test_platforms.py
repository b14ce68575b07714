"""The run-time package calls nothing that macOS, Windows or aarch64 lack: a session runs where it is taken away.

A rehearsal, not those systems: what Linux has and they have not is removed from the standard library.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import engines
from engines.bench import peak_memory_mb
from engines.serving.session import Request, Session
from tests.bundles import TinyBuild, tokens_of

ROOT = Path(engines.__file__).resolve().parents[1]
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "spwd", "readline")
POSIX_CALLS = (
    *("sched_getaffinity", "sched_setaffinity", "sysconf", "fork", "register_at_fork", "getuid", "geteuid", "getgid"),
    *("posix_fadvise", "mkfifo", "O_DIRECTORY", "O_CLOEXEC", "killpg", "setsid", "chown", "nice", "getloadavg"),
    *("uname", "sync", "sendfile", "memfd_create", "pread", "pwrite"),
)
"""Names of ``os`` that Windows lacks; macOS lacks the first two and ``posix_fadvise``, ``memfd_create``."""
WITHOUT = f"""
import asyncio, concurrent.futures, ctypes, json, multiprocessing, os, platform, subprocess, sys, tempfile
import onnxruntime, numpy, tokenizers, safetensors, jinja2, rich.console  # they may use what they like
for name in {POSIX_MODULES!r}:
    sys.modules[name] = None
for name in {POSIX_CALLS!r}:
    if hasattr(os, name):
        delattr(os, name)
whole = ctypes.CDLL
class CDLL(whole):
    def __init__(self, name, *args, **settings):
        if name is None or str(name).endswith(".so") or ".so." in str(name):
            raise OSError(f"no library {{name}}")
        super().__init__(name, *args, **settings)
ctypes.CDLL = CDLL
platform.machine = lambda: "aarch64"
platform.processor = lambda: ""
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_session_runs_without_what_other_systems_lack(tiny_build: TinyBuild, tmp_path: Path) -> None:
    code = WITHOUT + (
        "from pathlib import Path\n"
        "from engines.bench import measure, report\n"
        "from engines.doctor import diagnose\n"
        "from engines.serving.session import Request, Session\n"
        "from iapt_export.contract.disk import exchange, file_sha256, sync_folder, write_atomically\n"
        "bundle, folder = sys.argv[1], Path(sys.argv[2])\n"
        "with Session.open(bundle) as session:\n"
        "    requests = [Request(name, 'the film', max_new_tokens=5) for name in ('alpha', 'beta', 'gamma')]\n"
        "    tokens = [answer.tokens for answer in session.generate(requests)]\n"
        "    measured = report(session, [measure(session, 2, 4, 3, 1)])\n"
        "write_atomically(folder / 'file', b'whole')\n"
        "sync_folder(folder)\n"
        "(folder / 'a').mkdir(), (folder / 'b').mkdir()\n"
        "findings = {finding.name: finding.status for finding in diagnose()}\n"
        "changed = exchange(folder / 'a', folder / 'b')\n"
        "print(json.dumps([tokens, measured['peak_memory_mb'], changed, findings]))\n"
    )
    tokens, peak, exchanged, findings = json.loads(python(code, str(tiny_build.bundle), str(tmp_path)))
    with Session.open(tiny_build.bundle) as session:
        requests = [Request(name, "the film", max_new_tokens=5) for name in ("alpha", "beta", "gamma")]
        assert tokens == tokens_of(session, requests)
    assert peak is None and exchanged is False
    assert findings["python"] == "ok"
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_http_is_answered_without_what_other_systems_lack(tiny_build: TinyBuild) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    code = WITHOUT.replace("rich.console ", "rich.console, fastapi, uvicorn, prometheus_client, pydantic ") + (
        "from pathlib import Path\n"
        "from tests.engines.http.served import in_thread\n"
        "with in_thread(Path(sys.argv[1])) as served:\n"
        "    asked = {'model': 'alpha', 'prompt': 'the film', 'max_tokens': 5, 'temperature': 0}\n"
        "    status, answer, _ = served.ask('/v1/completions', asked)\n"
        "    print(status, answer['model'], answer['usage']['completion_tokens'] > 0)\n"
    )
    assert python(code, str(tiny_build.bundle)) == "200 alpha True\n"


def test_locks_are_refused_in_words_where_there_are_none(tmp_path: Path) -> None:
    code = WITHOUT + (
        "from pathlib import Path\n"
        "from iapt_export.contract.disk import locked\n"
        "from iapt_export.contract.errors import IaptError\n"
        "try:\n"
        "    with locked(Path(sys.argv[1])):\n"
        "        print('locked')\n"
        "except IaptError as error:\n"
        "    print(error)\n"
    )
    assert "no locks of files (flock)" in python(code, str(tmp_path / "lock"))


def test_memory_is_counted_in_the_systems_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    here = peak_memory_mb()
    monkeypatch.setattr(sys, "platform", "darwin")
    there = peak_memory_mb()
    assert here is not None and there is not None and 10 < here < 2**20
    assert there == pytest.approx(here / 1024, rel=0.2), "the same number, read as bytes"


def unguarded(path: Path) -> Iterator[str]:
    """POSIX modules that a file imports outside ``try``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name in POSIX_MODULES and id(node) not in guarded:
                yield f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"


def test_no_module_of_the_run_time_needs_posix() -> None:
    files = [*(ROOT / "engines").rglob("*.py"), *(ROOT / "iapt_export" / "contract").rglob("*.py")]
    assert len(files) > 60
    assert [problem for path in files for problem in unguarded(path)] == []
