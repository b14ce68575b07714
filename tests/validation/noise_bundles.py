"""Make the bundles that `noise` measures: ``python -m tests.validation.noise_bundles OUTPUT``.

``shipped/DTYPE`` has the example adapters, ``mixed/DTYPE`` one shortly trained adapter of every method. They are not
validated, because limits that refuse them are what is to be found out. Needs the data of ``examples/prepare_data.py``.
What is there already is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from iapt_export import BuildRequest, build
from trainers import TrainConfig, TrainRequest, train
from trainers.methods.configs import config_of

ROOT = Path(__file__).resolve().parents[2]
RUN = TrainConfig(
    max_steps=60,
    batch_size=8,
    warmup_steps=6,
    max_instruction_tokens=96,
    max_eval_examples=20,
)
MIXED = {
    "lamp": ("movie-sentiment", 3e-3),
    "adept": ("movie-sentiment", 3e-3),
    "lopa": ("movie-sentiment", 3e-3),
    "prefix-tuning": ("alpaca-demo", 3e-3),
    "lora": ("alpaca-demo", 5e-4),
    "dept": ("sarcasm", 3e-3),
    "prompt-tuning": ("sarcasm", 3e-2),
    "iapt": ("reuters-r8", 3e-3),
}
"""Method to data and learning rate; adapters are named after their methods."""


def main() -> None:
    """Train what is missing, then build what is missing."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("output", type=Path)
    own.add_argument("--model", default=".cache/smollm2-135m-instruct")
    own.add_argument("--data", type=Path, default=Path(".cache/data"))
    own.add_argument("--dtype", nargs="+", default=["int8", "int4"])
    args = own.parse_args()
    adapters = args.output / "adapters"
    for name, (data, rate) in MIXED.items():
        if not (adapters / name).exists():
            config = dataclasses.replace(RUN, learning_rate=rate)
            examples = args.data / f"{data}.train.jsonl"
            train(TrainRequest(args.model, examples, adapters / name, config_of(name)(), config))
    folders = {
        "shipped": sorted((ROOT / "examples" / "adapters").iterdir()),
        "mixed": [adapters / name for name in MIXED],
    }
    for bundle, tenants in folders.items():
        for dtype in args.dtype:
            if not (args.output / bundle / dtype).exists():
                output, target = args.output / bundle / dtype, f"onnxruntime:{dtype}"
                build(BuildRequest(model=args.model, adapters=tenants, targets=[target], output=output, prove=False))


if __name__ == "__main__":
    main()
