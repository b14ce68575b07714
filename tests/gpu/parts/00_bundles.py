"""Make what other parts run: the backbone, and bundles of it in fp32 and fp16, each in a process of its own.

The backbone is the demo's where its GGUF file or converted folder is at hand, else random weights of the same shape,
which cost the same and can be compared as well; what they answer is noise.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.part import Skip, Work

TITLE = "Bundles to run"
LIMIT_S = 420
IN_BACKGROUND = True
ROOT = Path(__file__).resolve().parents[3]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLES = ("plain-fp16", "iapt-fp16", "iapt-fp32")
"""Backbone alone (one adapter merged into it), and IAPT tenants."""
TINY_BUNDLES = ("plain-fp32", "iapt-fp32")
RANGES = {"batch": "1:8:64", "sequence": "1:128:256", "past": "1:256:512", "tenants": "1:8:64"}
TINY_RANGES = {"batch": "1:2:8", "sequence": "1:16:64", "past": "1:64:128", "tenants": "1:3:4"}
SMOL: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's shape; weights wider than usual, so that answers are no near ties."""


def run(work: Work) -> None:
    """Make the backbone, then the bundles side by side."""
    work.record(backbone=make_backbone(work))
    began = time.monotonic()
    names = TINY_BUNDLES if work.tiny else BUNDLES
    words = [sys.executable, "-m", "tests.gpu.build_bundle", str(work.folder), *(["--tiny"] if work.tiny else [])]
    started = {name: subprocess.Popen([*words, name], cwd=ROOT) for name in names}
    for name, process in started.items():
        code = process.wait()
        work.row("bundles", name=name, seconds=round(time.monotonic() - began, 1), exit_code=code)
        work.check(f"{name} is built", code == 0)


def make_backbone(work: Work) -> str:
    """Write the backbone's folder; returns what it is."""
    from tests.tiny import save_tiny_backbone, tiny_llama

    folder = work.folder / "model"
    if (folder / "config.json").is_file():
        return "made before"
    if work.tiny:
        save_tiny_backbone(folder, tiny_llama())
        return "tiny, random"
    converted = ROOT / ".cache" / "smollm2-135m-instruct"
    if (converted / "config.json").is_file():
        folder.symlink_to(converted)
        return "SmolLM2-135M-Instruct"
    gguf = Path(os.environ.get("BACKBONE_GGUF", ROOT / ".cache" / "gpu" / "site" / GGUF))
    if gguf.is_file():
        from trainers.decoder.backbone import load_backbone, save_backbone

        save_backbone(load_backbone(str(gguf)), folder)
        return f"SmolLM2-135M-Instruct, from {gguf.name}"
    save_tiny_backbone(folder, tiny_llama(**SMOL))
    return "random, of SmolLM2-135M's shape"


def bundle(work: Work, name: str) -> Path:
    """A bundle's folder.

    Raises:
        Skip: it was not made.
    """
    folder = work.folder / name
    if not (folder / "manifest.json").is_file():
        raise Skip(f"the bundle {name} is not there; run part 0 too")
    return folder
