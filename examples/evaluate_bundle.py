r"""How often a bundle's tenants answer right: what int8 and int4 weights cost in accuracy, for example.

    for dtype in fp32 int8 int4; do
        iapt-export build -m .cache/smollm2-135m-instruct -t onnxruntime:$dtype -a examples/adapters/movie-sentiment \
            -a examples/adapters/sarcasm -a examples/adapters/reuters-r8 -o .cache/quantised/$dtype
    done
    python examples/evaluate_bundle.py .cache/quantised/{fp32,int8,int4} --data .cache/data

The tenants answer held-out examples of the task they are named after, greedily; an answer counts where it is the right
label and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.progress import track
from transformers import AutoTokenizer

from engines.serving.session import Request, Session
from iapt_export.contract.low_bits import in_words
from iapt_export.graphs.save import WEIGHTS_FILE
from trainers.training.data import encode_examples
from trainers.training.records import read_examples

ROOT = Path(__file__).resolve().parent.parent
MAX_TOKENS = {"reuters-r8": 112}
"""Instructions are cut as in training."""


def accuracy(session: Session, tenant: str, examples: list[Any]) -> float:
    """The share of examples that one tenant answers right."""
    tokenizer = AutoTokenizer.from_pretrained(str(session.bundle))
    prompt_format = session.stepper.bank.get(tenant).prompt_format
    items = encode_examples(tokenizer, examples, prompt_format, MAX_TOKENS.get(tenant, 512), None)
    parts = [(item["input_ids"], item["instruction_length"]) for item in items]
    wanted = [tuple(tokens[length:]) for tokens, length in parts]
    requests = [
        Request(tenant, tokens=tuple(tokens[:length]), max_new_tokens=len(tokens) - length, ignore_eos=True)
        for tokens, length in parts
    ]
    answers = track(session.generate(requests), f"{session.target.dtype} {tenant}", total=len(requests))
    return sum(tuple(answer.tokens) == right for answer, right in zip(answers, wanted, strict=True)) / len(wanted)


def measure(bundle: Path, data: Path, skip: int, count: int) -> dict[str, Any]:
    """One bundle's type, bytes of graph and weights, and its tenants' accuracies."""
    with Session.open(bundle, "onnxruntime") as session:
        graph = bundle / session.target.graphs["serve"].path
        size = graph.stat().st_size + graph.with_name(WEIGHTS_FILE).stat().st_size
        tasks = {name: read_examples(data / f"{name}.eval.jsonl")[skip : skip + count] for name in session.tenants}
        shares = {name: accuracy(session, name, examples) for name, examples in tasks.items()}
        target = session.target
        print(in_words(target.dtype, target.quantise), shares, flush=True)
        settings = {"quantise": target.quantise} if target.quantise else {}
        return {"dtype": target.dtype, **settings, "bytes": size, "accuracy": shares}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="of the same tenants")
    parser.add_argument("--data", type=Path, default=ROOT / ".cache" / "data", metavar="DIR")
    parser.add_argument("--examples", type=int, default=200, metavar="N", help="of each task")
    parser.add_argument(
        "--skip", type=int, default=48, metavar="N", help="the first ones, on which int4's 8-bit products were chosen"
    )
    results = ROOT / "benchmarks" / "results" / "quantised.json"
    parser.add_argument("--output", type=Path, default=results, metavar="FILE")
    arguments = parser.parse_args()
    record = {
        "examples": arguments.examples,
        "skipped": arguments.skip,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("onnxruntime", "numpy")},
        "bundles": [
            measure(bundle, arguments.data, arguments.skip, arguments.examples) for bundle in arguments.bundles
        ],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
