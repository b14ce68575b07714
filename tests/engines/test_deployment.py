"""A machine that only answers needs no PyTorch: sessions run where torch, transformers and onnx cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engines
from engines.serving.session import Request, Session
from tests.bundles import TinyBuild, tokens_of

ROOT = Path(engines.__file__).resolve().parent.parent
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "trainers.methods.iapt",
    "iapt_export.cli",
    "validation",
)
BLOCK = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r} or name in {HEAVY!r}:
            raise ImportError(name + " is not on a deployment machine")
sys.meta_path.insert(0, Block())
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_a_session_loads_nothing_heavy() -> None:
    names = (*HEAVY, "onnxruntime", "tensorrt", "tensorrt_rtx")
    found = python(f"import sys, engines.serving.session; print([name for name in {names!r} if name in sys.modules])")
    assert found.strip() == "[]"


def test_a_session_runs_without_pytorch(tiny_build: TinyBuild) -> None:
    code = BLOCK + (
        "import json\n"
        "from engines.serving.session import Request, Session\n"
        f"with Session.open({str(tiny_build.bundle)!r}) as session:\n"
        "    requests = [Request(name, 'the film', max_new_tokens=5) for name in ('alpha', 'beta', 'gamma')]\n"
        "    print(json.dumps([answer.tokens for answer in session.generate(requests)]))\n"
        "try:\n"
        "    import torch\n"
        "except ImportError:\n"
        "    print('blocked')\n"
    )
    answers, blocked = python(code).splitlines()
    with Session.open(tiny_build.bundle) as session:
        requests = [Request(name, "the film", max_new_tokens=5) for name in ("alpha", "beta", "gamma")]
        wanted = tokens_of(session, requests)
    assert (json.loads(answers), blocked) == (wanted, "blocked")


def test_the_generate_command_runs_without_pytorch(tiny_build: TinyBuild) -> None:
    argv = ["generate", str(tiny_build.bundle), "--tenant=beta", "--prompt=the film", "--max-new-tokens=5", "--json"]
    allowed = BLOCK.replace("'iapt_export.cli', ", "").replace("'trainers.methods.iapt', ", "")
    out = python(f"{allowed}\nfrom iapt_export.cli import main\nmain({argv!r})")
    (row,) = json.loads(out)
    assert row["finish_reason"] in ("length", "eos") and row["tokens"]
