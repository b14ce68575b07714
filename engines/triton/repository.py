"""Write a model repository for NVIDIA Triton: one model, whose python backend runs a session of a bundle."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from iapt_export.contract.errors import IaptError
from iapt_export.contract.integrity import open_manifest
from iapt_export.contract.manifest import TargetSpec
from iapt_export.contract.settings import choice_problems, raise_problems, range_problems

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
INPUTS = {
    "text_input": ("TYPE_STRING", 1),
    "input_ids": ("TYPE_INT64", -1),
    "tenant": ("TYPE_STRING", 1),
    "max_tokens": ("TYPE_INT32", 1),
    "temperature": ("TYPE_FP32", 1),
    "top_p": ("TYPE_FP32", 1),
    "seed": ("TYPE_UINT64", 1),
    "stop": ("TYPE_STRING", -1),
    "ignore_eos": ("TYPE_BOOL", 1),
    "stream": ("TYPE_BOOL", 1),
}
"""Each one may be left out; ``text_input`` or ``input_ids`` is the instruction."""
OUTPUTS = {"text_output": ("TYPE_STRING", 1), "token": ("TYPE_INT32", -1), "finish_reason": ("TYPE_STRING", 1)}
BUNDLE = "bundle"
MODEL = '''"""Triton's python backend runs this; iapt-export must be installed where it runs, see config.pbtxt."""

from engines.triton.session_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, kw_only=True)
class TritonRepository:
    """A model repository that is wanted.

    Raises:
        IaptError: a name that Triton takes for no model, or a number out of range.
    """

    output: Path
    """Model repository to put the model into; made where it is missing."""
    name: str = "iapt"
    """What Triton calls the model; the tenant is an input of each request."""
    target: str | None = None
    """Which of the bundle's targets runs; without it, the first."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where ONNX Runtime runs."""
    environment: Path | None = None
    """Python environment that holds iapt-export on the serving machine; without it, Triton's own Python."""
    threads: int | None = None
    """Of ONNX Runtime on the CPU; without it, as many as the process may use cores."""
    max_waiting: int = 256
    """Requests that may wait for a row; beyond that, clients get UNAVAILABLE."""
    refer: bool = False
    """Let the model read the bundle where it stands, instead of a copy in the repository."""

    def __post_init__(self) -> None:
        problems = choice_problems(self) + range_problems(self, max_waiting=(1, 2**20))
        if self.threads is not None:
            problems += range_problems(self, threads=(1, 1024))
        if not NAME.fullmatch(self.name):
            problems.append(f"name={self.name!r} is no name; expected letters, digits, . _ -")
        raise_problems("Triton repository", problems)


def write_repository(bundle: Path, asked: TritonRepository) -> Path:
    """Write the model, whole or not at all.

    Args:
        bundle: a bundle's folder.
        asked: the repository.

    Returns:
        The model's folder.

    Raises:
        IaptError: the bundle is damaged or not proven, has no such target, or the model is there already.
    """
    manifest = open_manifest(bundle)
    target = manifest.target(asked.target)
    folder = asked.output / asked.name
    if folder.exists():
        raise IaptError(f"{folder} exists and is not replaced; remove it, or name the model otherwise with --name")
    asked.output.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{asked.name}.", dir=asked.output))
    try:
        version = partial / "1"
        version.mkdir()
        if not asked.refer:
            shutil.copytree(bundle, version / BUNDLE)
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        (partial / "config.pbtxt").write_text(configuration(bundle, target, asked), encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def configuration(bundle: Path, target: TargetSpec, asked: TritonRepository) -> str:
    """``config.pbtxt``."""
    parameters = {
        "bundle": str(bundle.resolve()) if asked.refer else BUNDLE,
        "target": target.name,
        "device": asked.device,
        "threads": "" if asked.threads is None else str(asked.threads),
        "max_waiting": str(asked.max_waiting),
    }
    if asked.environment is not None:
        parameters["EXECUTION_ENV_PATH"] = str(asked.environment.resolve())
    # one session holds the batch, so there is one instance; where a GPU is used, the session finds it by itself
    on_cpu = target.name == "onnxruntime" and asked.device == "cpu"
    lines = [
        f"name: {_quoted(asked.name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ count: 1, kind: {'KIND_CPU' if on_cpu else 'KIND_MODEL'} }} ]",
        *_tensors("input", INPUTS, "optional: true, "),
        *_tensors("output", OUTPUTS),
        *(
            f"parameters {{ key: {_quoted(key)}, value {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
            if value
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensors(kind: str, tensors: dict[str, tuple[str, int]], more: str = "") -> Iterator[str]:
    for name, (dtype, size) in tensors.items():
        yield f"{kind} [ {{ name: {_quoted(name)}, {more}data_type: {dtype}, dims: [ {size} ] }} ]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
