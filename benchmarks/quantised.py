"""What int8 and int4 weights cost in accuracy, against fp32 weights; `benchmarks.serving` has what they bring in time.

    python -m benchmarks.quantised --graphs fp32=DIR --graphs int8=DIR --graphs int4=DIR --data .cache/data

Each DIR holds ``serve.onnx`` (a bundle, or the folder of an export). The shipped adapters answer the first held-out
examples greedily; an answer counts where it is the right label and nothing else. Errors of the logits are those after
the instruction, the largest difference over fp32's largest value.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stepping import Steps
from iapt_export.plan import TenantPlan, load_tenants, plan_tenants
from trainers.adapter import Adapter
from trainers.backbone import Backbone, load_backbone
from trainers.data import encode_examples, encode_response, read_examples

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantised.json"
TASKS = ("movie-sentiment", "sarcasm", "reuters-r8")
MAX_TOKENS = {"reuters-r8": 112}
"""Instructions are cut as in training."""
BATCH = 8


def stacks_of(plan: TenantPlan) -> dict[str, np.ndarray]:
    """The weights of a plan's tenants as a graph's inputs."""
    stacks = {}
    for item in plan.installed:
        tenants = [name for name, owner in plan.owner.items() if owner == item.name]
        for tensor, _ in item.stacked.named_parameters():
            stacks[f"{item.name}.{tensor}"] = np.stack([plan.shipped[name][tensor].numpy() for name in tenants])
    return stacks


def answers(steps: Steps, prompts: list[list[int]], tenant: int, num_slots: int, length: int) -> tuple[Any, Any]:
    """Greedy tokens ``[prompts, length]`` of one tenant, and the first step's logits ``[prompts, V]``."""
    tokens, logits = [], []
    for start in range(0, len(prompts), BATCH):
        rows = prompts[start : start + BATCH]
        steps.start({"iapt.tenant_index": np.full(len(rows), tenant)}, num_slots + max(map(len, rows)) + length)
        made = steps.read(rows, num_slots)
        logits.append(made)
        chosen = [made.argmax(axis=1)]
        while len(chosen) < length:
            chosen.append(steps.step(chosen[-1]).argmax(axis=1))
        tokens.append(np.stack(chosen, axis=1))
    return np.concatenate(tokens), np.concatenate(logits)


def accuracy(
    steps: Steps, backbone: Backbone, adapter: Adapter, data: Path, task: str, tenant: int, count: int
) -> tuple[float, np.ndarray]:
    """The share of examples that one tenant answers right, and the logits after each instruction."""
    examples = read_examples(data / f"{task}.eval.jsonl")[:count]
    items = encode_examples(backbone.tokenizer, examples, adapter.config.prompt_format, MAX_TOKENS.get(task, 512), None)
    prompts = [item["input_ids"][: item["instruction_length"]] for item in items]
    wanted = [encode_response(backbone.tokenizer, example.response) for example in examples]
    made, logits = answers(steps, prompts, tenant, adapter.module().num_slots, max(map(len, wanted)))
    right = [list(row[: len(tokens)]) == tokens for row, tokens in zip(made, wanted, strict=True)]
    return float(np.mean(right)), logits


def compare(logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """How far logits ``[examples, V]`` are from fp32's."""
    worst = np.abs(logits - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    return {
        "relative_max": float(worst.max()),
        "relative_median": float(np.median(worst)),
        "top1_agreement": float((logits.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole record."""
    backbone = load_backbone(arguments.model)
    plan = plan_tenants(load_tenants([str(arguments.adapters / task) for task in TASKS], backbone), backbone.model)
    record: dict[str, Any] = {
        "examples": arguments.examples,
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("onnxruntime", "numpy")},
        "types": {},
    }
    fp32: dict[str, np.ndarray] = {}
    for name, folder in arguments.graphs:
        steps = Steps(Path(folder) / "serve.onnx", stacks_of(plan), arguments.threads)
        size = sum(
            path.stat().st_size for path in Path(folder).glob("*") if path.name in ("serve.onnx", "weights.data")
        )
        entry: dict[str, Any] = {"bytes": size, "tasks": {}}
        for tenant, task in enumerate(TASKS):
            share, logits = accuracy(
                steps, backbone, plan.adapters[task], arguments.data, task, tenant, arguments.examples
            )
            entry["tasks"][task] = {"accuracy": share, **compare(logits, fp32.setdefault(task, logits))}
            print(name, task, entry["tasks"][task], flush=True)
        record["types"][name] = entry
    return record


def named_folder(text: str) -> tuple[str, str]:
    """Read ``NAME=DIR``."""
    name, equals, folder = text.partition("=")
    if not equals or not (Path(folder) / "serve.onnx").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR of a folder with serve.onnx")
    return name, folder


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", action="append", type=named_folder, required=True, metavar="NAME=DIR")
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2-135m-instruct"), help="the backbone")
    parser.add_argument("--adapters", type=Path, default=ROOT / "examples" / "adapters", metavar="DIR")
    parser.add_argument("--data", type=Path, default=ROOT / ".cache" / "data", metavar="DIR")
    parser.add_argument("--examples", type=int, default=200, metavar="N", help="of each task")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    record = measure(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
