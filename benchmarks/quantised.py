r"""What int8 and int4 weights cost in accuracy, against fp32 weights; `benchmarks.serving` has what they bring in time.

    for dtype in fp32 int8 int4; do
        iapt-export build -m .cache/smollm2-135m-instruct -t onnxruntime:$dtype -a examples/adapters/movie-sentiment \
            -a examples/adapters/sarcasm -a examples/adapters/reuters-r8 -o .cache/quantised/$dtype
    done
    python -m benchmarks.quantised .cache/quantised/{fp32,int8,int4} --data .cache/data

The tenants answer held-out examples of the task they are named after, greedily; an answer counts where it is the right
label and nothing else. Errors of the logits are those after the instruction, the largest difference over fp32's
largest value.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from transformers import AutoTokenizer

from engines.serving.loading import open_stepper
from engines.serving.stepper import Instruction, Stepper
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.save import WEIGHTS_FILE
from trainers.training.data import encode_examples, read_examples

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantised.json"
MAX_TOKENS = {"reuters-r8": 112}
"""Instructions are cut as in training."""
CHOSEN_ON = 48
"""The first examples decided which products int4 keeps in 8 bits, so they are not measured."""


def answers(stepper: Stepper, tenant: str, prompts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens ``[prompts, length]`` of one tenant, and the logits ``[prompts, V]`` after each instruction."""
    tokens, logits = [], []
    for start in track(range(0, len(prompts), stepper.max_rows), f"{stepper.target.dtype} {tenant}"):
        rows = [Instruction(stepper.bank.get(tenant), prompt) for prompt in prompts[start : start + stepper.max_rows]]
        logits.append(stepper.read(rows).copy())
        chosen = [logits[-1].argmax(axis=1)]
        while len(chosen) < length:
            chosen.append(stepper.step(chosen[-1].tolist()).argmax(axis=1))
        tokens.append(np.stack(chosen, axis=1))
        while stepper.num_rows:
            stepper.leave(stepper.num_rows - 1)
    return np.concatenate(tokens), np.concatenate(logits)


def accuracy(stepper: Stepper, tokenizer: Any, tenant: str, data: Path, count: int) -> tuple[float, np.ndarray]:
    """The share of examples that one tenant answers right, and the logits after each instruction."""
    examples = read_examples(data / f"{tenant}.eval.jsonl")[CHOSEN_ON : CHOSEN_ON + count]
    prompt_format = stepper.bank.get(tenant).prompt_format
    items = encode_examples(tokenizer, examples, prompt_format, MAX_TOKENS.get(tenant, 512), None)
    prompts = [item["input_ids"][: item["instruction_length"]] for item in items]
    wanted = [item["input_ids"][item["instruction_length"] :] for item in items]
    made, logits = answers(stepper, tenant, prompts, max(map(len, wanted)))
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


def measure(bundles: Sequence[Path], data: Path, count: int) -> dict[str, Any]:
    """The whole record; the first bundle's weights are fp32, and what the others are compared with."""
    types: dict[str, Any] = {}
    fp32: dict[str, np.ndarray] = {}
    for bundle in bundles:
        manifest = BundleManifest.load(bundle)
        target = manifest.target("onnxruntime")
        tokenizer = AutoTokenizer.from_pretrained(str(bundle))
        graph = bundle / target.graphs["serve"].path
        entry: dict[str, Any] = {"tasks": {}}
        entry["bytes"] = graph.stat().st_size + graph.with_name(WEIGHTS_FILE).stat().st_size
        with open_stepper(bundle, manifest, target, in_place=True) as stepper:
            for tenant in manifest.tenants:
                share, logits = accuracy(stepper, tokenizer, tenant.name, data, count)
                wanted = fp32.setdefault(tenant.name, logits)
                entry["tasks"][tenant.name] = {"accuracy": share, **compare(logits, wanted)}
                print(target.dtype, tenant.name, entry["tasks"][tenant.name], flush=True)
        types[target.dtype] = entry
    return {
        "examples": count,
        "skipped": CHOSEN_ON,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("onnxruntime", "numpy")},
        "types": types,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="of the same tenants, fp32 first")
    parser.add_argument("--data", type=Path, default=ROOT / ".cache" / "data", metavar="DIR")
    parser.add_argument("--examples", type=int, default=200, metavar="N", help="of each task")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    record = measure(arguments.bundles, arguments.data, arguments.examples)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
