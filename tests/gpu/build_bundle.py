"""Build one bundle of first light: ``python -m tests.gpu.build_bundle FOLDER iapt-fp16``; see its part 0."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

NUM_TENANTS, NUM_TINY_TENANTS = 64, 3


def main(words: list[str] | None = None) -> None:
    """Build it beside the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help="plain-fp32, iapt-fp16, ...")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(words)
    build_bundle(given.folder, given.name, tiny=given.tiny)


def build_bundle(folder: Path, name: str, *, tiny: bool) -> Path:
    """A bundle of ``folder/model`` with adapters of random weights, without a proof; the parts compare it."""
    from benchmarks.serving_bundles import random_adapter
    from iapt_export import BuildRequest, build
    from trainers.adapters.directory import save_adapter
    from trainers.decoder.backbone import load_backbone
    from trainers.methods.configs import IAPTConfig, LoRAConfig

    part = importlib.import_module("tests.gpu.parts.00_bundles")
    kind, dtype = name.split("-")
    backbone = load_backbone(str(folder / "model"))
    method: Any = IAPTConfig(bottleneck=8) if tiny else IAPTConfig()
    count = NUM_TINY_TENANTS if tiny else NUM_TENANTS
    if kind == "plain":
        method, count = LoRAConfig(rank=1, target_modules=("q_proj",)), 1
    adapters = []
    for number in range(count):
        adapter = random_adapter(number, method, backbone)
        adapters.append(folder / f"{name}-adapters" / f"tenant{number}")
        save_adapter(adapters[-1], adapter.config, adapter.tensors)
        prompts = adapters[-1] / "examples.jsonl"
        prompts.write_text(f'{{"prompt": "is this review positive or negative? number {number}"}}\n', encoding="utf-8")
    request = BuildRequest(
        model=str(folder / "model"),
        adapters=adapters,
        output=folder / name,
        targets=[f"onnxruntime:{dtype}"],
        merge_lora=kind == "plain",
        device="cuda",
        prove=False,
        cache=folder / "stages" / name,
        **(part.TINY_RANGES if tiny else part.RANGES),
    )
    build(request, lambda text, *_: print(f"{name}: {text}", flush=True))
    return folder / name


if __name__ == "__main__":
    main()
