"""What a build costs: the demo's beside that of an older commit, and a checkpoint of Llama-2-7B's shape.

``compare`` builds the demo's bundle (three tenants, both targets, empty cache) with the code of a worktree of the older
commit and with this one's, in turn, and prints what each part took; then one more tenant, and an export of twice the
layers. Both trees run with this interpreter's packages:

    git worktree add /big/disk/before a2e9189
    python -m benchmarks.build compare --folder /big/disk/demo --before /big/disk/before --rounds 3

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
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.pages import ROOT
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
DEMO = ("movie-sentiment", "sarcasm", "reuters-r8")
EXPORT_STEP = re.compile(r": (tracing|passes over) \S+\.onnx$|: writing graphs and weights$")
EXPORT_ALONE = """
from iapt_export import BuildRequest, build
from iapt_export.progress import Steps
build(BuildRequest(model={model!r}, output={folder!r} + "/bundle", cache={folder!r} + "/cache", prove=False), Steps())
"""


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


def measured(command: list[str], log: Path, tree: Path = ROOT) -> dict[str, float]:
    """Run a command: seconds, processor seconds, and the most memory that its process had, sampled ten times a second.

    Of a build also what its export took, the steps in which it says that it traces, runs passes and writes: seconds,
    and the most anonymous memory meanwhile, beyond what the process had at its first step.

    Args:
        command: what is run.
        log: where its output goes.
        tree: whose code it runs.

    Raises:
        SystemExit: it failed.
    """
    started, before = time.monotonic(), os.times()
    most, exporting, export_s, first, previous = [0, 0], 0, 0.0, 0, started
    with log.open("w") as stream:
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it would compile all our modules in every run
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=tree, env=environment)
        while process.poll() is None:
            try:
                now = memory_of(process.pid)
            except (OSError, KeyError):
                break  # it has just ended
            most = [max(pair) for pair in zip(most, now, strict=True)]
            moment, said = time.monotonic(), log.read_text().rstrip().rpartition("\n")[2]
            first = first or (now[0] if said else 0)
            if EXPORT_STEP.search(said):
                exporting, export_s = max(exporting, now[0] - first), export_s + moment - previous
            previous = moment
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
        "export_s": export_s,
        "export_gib": exporting / 2**30,
    }


def build_command(model: Path, folder: Path, adapters: list[Path], *flags: str) -> list[str]:
    """``build`` of ``folder/bundle`` with the cache ``folder/cache``, for `measured`, which chooses the tree."""
    places = ["--model", str(model), "--output", str(folder / "bundle"), "--cache", str(folder / "cache")]
    tenants = [f"--adapter={adapter}" for adapter in adapters]
    return [sys.executable, "-P", "-m", "iapt_export", "build", *places, *tenants, *flags]


def emptied(folder: Path) -> Path:
    """The folder, without a bundle or a cache."""
    for name in ("bundle", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def blocks_of_disk(folder: Path) -> int:
    """Bytes that the files of a folder take on its disk, those with several names once."""
    files = {stat.st_ino: stat for path in folder.rglob("*") if path.is_file() for stat in [path.stat()]}
    return sum(512 * stat.st_blocks for stat in files.values())


def compare(folder: Path, before: Path, model: Path, rounds: int) -> list[dict[str, Any]]:
    """What the demo's build takes in the tree of an older commit and in this one, in turn; then what else is aimed at.

    Args:
        folder: where both build.
        before: the older commit's worktree.
        model: the demo's backbone.
        rounds: builds of each.

    Returns:
        A record a measurement, printed as it comes.
    """
    adapters = [ROOT / "examples" / "adapters" / name for name in DEMO]
    targets = ["--target", "onnxruntime:fp32", "--target", "tensorrt-rtx:fp16"]
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    records = []

    def note(what: str, figures: dict[str, float]) -> None:
        records.append({"what": what, **{name: round(value, 2) for name, value in figures.items()}})
        print(json.dumps(records[-1]), flush=True)

    for _ in range(rounds):
        for name, tree in (("before", before), ("now", ROOT)):
            place = emptied(folder / name)
            figures = measured(build_command(model, place, adapters, *targets), place / "build.log", tree)
            figures["export_over_checkpoint"] = figures["export_gib"] * 2**30 / weights
            figures["disk_over_weights"] = blocks_of_disk(place) / weights
            note(name, figures)
    place = folder / "now"
    shutil.copytree(adapters[0], folder / "another", dirs_exist_ok=True)
    command = build_command(model, place, [*adapters, folder / "another"], *targets, "--depth", "quick")
    note("one more tenant", measured(command, place / "another.log"))
    for layers in (30, 60):
        place = emptied(folder / f"layers-{layers}")
        code = EXPORT_ALONE.format(model=str(_with_layers(model, place / "model", layers)), folder=str(place))
        note(f"{layers} layers", measured([sys.executable, "-P", "-c", code], place / "build.log"))
    return records


def _with_layers(model: Path, folder: Path, layers: int) -> Path:
    """A copy of a backbone with so many layers, its own again and again."""
    from transformers import AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    there = list(loaded.model.layers)
    loaded.model.layers = torch.nn.ModuleList([there[index % len(there)] for index in range(layers)])
    state = {name: value.clone() for name, value in loaded.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def summary(records: list[dict[str, Any]]) -> str:
    """Medians, and what is aimed at as ratios."""

    def median(what: str, name: str) -> float:
        return statistics.median(record[name] for record in records if record["what"] == what)

    lines = []
    for name in ("export_s", "seconds", "processor_s", "export_over_checkpoint", "anonymous_gib", "disk_over_weights"):
        before, now = median("before", name), median("now", name)
        lines.append(f"{name}: {before:.2f} before, {now:.2f} now, {before / now:.2f} times")
    longer = median("60 layers", "export_s") / median("30 layers", "export_s")
    lines.append(f"export of 60 layers over 30: {longer:.2f}")
    lines.append(f"one more tenant: {median('one more tenant', 'seconds'):.1f} s")
    return "\n".join(lines)


def measure(folder: Path, words: list[str]) -> dict[str, float]:
    """Build ``folder/bundle`` with an empty cache and let it answer; ``words`` are further flags of ``build``."""
    adapters = [folder / "adapters" / tenant for tenant in TENANTS]
    flags = ["--target", "onnxruntime:int4", "--peft-prompt-format", "chat", *words]
    command = build_command(folder / "model", emptied(folder), adapters, *flags)
    figures = measured(command, folder / "build.log")
    asked = ["generate", str(folder / "bundle"), "--tenant", TENANTS[0], "--prompt", "a film", "--max-new-tokens", "4"]
    command = [sys.executable, "-P", "-m", "iapt_export", *asked]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if answer.returncode:
        sys.exit(f"generate failed: {answer.stderr[-2000:]}")
    return figures


def main(words: list[str] | None = None) -> int:
    """Make or measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "measure", "compare"))
    parser.add_argument("--folder", type=Path, required=True, help="where the model and all that is built stand")
    parser.add_argument("--layers", type=int, default=32, help="that make writes (default: %(default)s, 13.5 GB)")
    parser.add_argument("--before", type=Path, help="worktree of the older commit, for compare")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "smollm2-135m-instruct", help="for compare")
    parser.add_argument("--rounds", type=int, default=3, help="of compare (default: %(default)s)")
    parser.epilog = "What stands behind -- are further flags of build, for measure."
    given = sys.argv[1:] if words is None else words
    split = given.index("--") if "--" in given else len(given)
    arguments, build_flags = parser.parse_args(given[:split]), given[split + 1 :]
    folder = arguments.folder.resolve()  # what is run stands in another one
    if arguments.command == "make":
        make(folder, arguments.layers)
    elif arguments.command == "compare":
        if arguments.before is None:
            parser.error("compare needs --before, a worktree of the older commit")
        print(summary(compare(folder, arguments.before.resolve(), arguments.model.resolve(), arguments.rounds)))
    else:
        print(json.dumps(measure(folder, build_flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
