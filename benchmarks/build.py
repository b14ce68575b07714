"""What the build of a large model costs: a checkpoint of Llama-2-7B's shape, made of random shards, with two tenants.

``make`` writes it, or one of fewer layers, with a small tokenizer; ``measure`` builds a bundle of it in a process of
its own, asks that for an answer, and prints time and memory. Weights are drawn, because what they are does not change
what a build costs. But whether its proof holds in int4 they decide: where each layer replaces what stood there before,
as with weights of one size everywhere, rounding to four bits changes more than half of the likeliest tokens, which no
trained model does. So layers add little to what they read, as in a trained model (`_drawn`):

    python -m benchmarks.build make --folder /big/disk/seven --layers 4
    python -m benchmarks.build measure --folder /big/disk/seven -- --batch 1:2:4 --past 1:128:640
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.serving_bundles import random_adapter
from tests.tiny import tiny_tokenizer
from trainers.adapters.directory import save_adapter
from trainers.decoder.backbone import Backbone
from trainers.decoder.checkpoint import INDEX
from trainers.methods.configs import IAPTConfig

LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}
TENANTS = ("first", "second")


def make(folder: Path, num_layers: int) -> None:
    """Write ``folder/model`` (a shard a layer, drawn in bf16) and ``folder/adapters``."""
    model_folder = folder / "model"
    model_folder.mkdir(parents=True)
    config = LlamaConfig(**LLAMA_2_7B, num_hidden_layers=num_layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(model_folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(model_folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        shards.setdefault(f"layer-{parts[2]}" if "layers" in parts else parts[-2], []).append(name)
    draw = torch.Generator().manual_seed(0)
    for shard, names in shards.items():
        drawn = {name: _drawn(name, model.state_dict()[name], num_layers, draw) for name in names}
        save_file(drawn, _shard(model_folder, shard))
    places = {name: _shard(model_folder, shard).name for shard, names in shards.items() for name in names}
    size = sum(2 * tensor.numel() for tensor in model.state_dict().values())
    (model_folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    backbone = Backbone(model, tokenizer, str(model_folder))
    for number, tenant in enumerate(TENANTS):
        adapter = random_adapter(number, IAPTConfig(), backbone)
        save_adapter(folder / "adapters" / tenant, adapter.config, adapter.tensors)


def _shard(folder: Path, name: str) -> Path:
    return folder / f"model-{name}.safetensors"


def _drawn(name: str, like: torch.Tensor, num_layers: int, draw: torch.Generator) -> torch.Tensor:
    """Norms of one, matrices that keep the size of what they multiply; what is added to the hidden states together no
    larger than the embedding, as GPT-2 begins (its report, 2.3).
    """
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    spread = like.shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        spread /= (2 * num_layers) ** 0.5
    elif "embed_tokens" in name:
        spread = 1.0
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, spread, generator=draw)


def memory_of(pid: int) -> tuple[int, int]:
    """Anonymous and all resident bytes of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Run a command: seconds, processor seconds, and the most memory that its process had, sampled ten times a second.

    Raises:
        SystemExit: it failed.
    """
    started, before = time.monotonic(), os.times()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        most = [0, 0]
        while process.poll() is None:
            try:
                most = [max(pair) for pair in zip(most, memory_of(process.pid), strict=True)]
            except (OSError, KeyError):
                break  # it has just ended
            time.sleep(0.1)
        code = process.wait()
    after = os.times()
    if code:
        sys.exit(f"{' '.join(command)} failed; {log} ends with: {log.read_text()[-2000:]}")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "seconds": time.monotonic() - started,
        "processor_s": processor,
        "anonymous_gib": most[0] / 2**30,
        "resident_gib": most[1] / 2**30,
    }


def measure(folder: Path, words: list[str]) -> dict[str, float]:
    """Build ``folder/bundle`` with an empty cache and let it answer; ``words`` are further flags of ``build``."""
    program = [sys.executable, "-m", "iapt_export"]
    places = ["--model", folder / "model", "--output", folder / "bundle", "--cache", folder / "cache"]
    tenants = [f"--adapter={folder / 'adapters' / tenant}" for tenant in TENANTS]
    asked = ["--target", "onnxruntime:int4", "--peft-prompt-format", "chat", *words]
    for name in ("bundle", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    figures = measured([*program, "build", *map(str, places), *tenants, *asked], folder / "build.log")
    request = [
        "generate",
        str(folder / "bundle"),
        "--tenant",
        TENANTS[0],
        "--prompt",
        "a film",
        "--max-new-tokens",
        "4",
    ]
    answer = subprocess.run([*program, *request], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"generate failed: {answer.stderr[-2000:]}")
    return figures


def main(words: list[str] | None = None) -> int:
    """Make or measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "measure"))
    parser.add_argument("--folder", type=Path, required=True, help="where the model and all that is built stand")
    parser.add_argument("--layers", type=int, default=32, help="that make writes (default: %(default)s, 13.5 GB)")
    parser.add_argument("build_flags", nargs="*", help="behind --: further flags of build")
    arguments = parser.parse_args(words)
    if arguments.command == "make":
        make(arguments.folder, arguments.layers)
    else:
        print(json.dumps(measure(arguments.folder, arguments.build_flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
