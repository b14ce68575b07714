"""One peer in a process and an environment of its own, measured whenever it is asked.

    PYTHON benchmarks/serving_peers.py '{"peer": "genai", "model": "DIR", "rows": 8, "tokens": 128, ...}'

loads, and for each line on stdin prints one line of JSON: milliseconds of a prefill and of each decode step, and the
peak of memory. Every peer reads the same random tokens and writes as many, greedily, and none stops early. Standard
library and the peer's own package only, so that it runs where this project is not installed; `session` alone imports
it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Step = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """What is measured."""

    peer: str
    model: str
    """A bundle, a genai folder, or a Hugging Face folder."""
    rows: int
    tokens: int
    """Of each instruction."""
    steps: int
    threads: int
    tenants: int = 0
    """Tenants among which the rows are dealt out; 0 for none."""
    rank: int = 0
    """PEFT's LoRA rank."""
    modules: tuple[str, ...] = ()
    """PEFT's target modules."""

    def prompts(self) -> list[list[int]]:
        """The same random instructions for every peer."""
        source = random.Random(0)
        return [[source.randrange(5, 40000) for _ in range(self.tokens)] for _ in range(self.rows)]


def session(job: Job) -> tuple[Step, Step]:
    """This project's, over the cache that is written in place; its stepper, as its scheduler drives it."""
    from engines.serving.session import Session
    from engines.serving.stepper import Instruction

    opened = Session.open(job.model, verify=False)
    stepper = opened.stepper
    stepper.runners["serve"].threads = job.threads  # type: ignore[attr-defined]
    stepper.activate()
    names = list(stepper.bank.tenants)
    chosen = [stepper.bank.get(names[row % max(job.tenants, 1)]) for row in range(job.rows)]
    rows = [Instruction(tenant, prompt) for tenant, prompt in zip(chosen, job.prompts(), strict=True)]
    last: dict[str, Any] = {}

    def prefill() -> None:
        while stepper.num_rows:
            stepper.leave(stepper.num_rows - 1)
        last["tokens"] = stepper.read(rows).argmax(axis=1).tolist()

    def decode() -> None:
        last["tokens"] = stepper.step(last["tokens"]).argmax(axis=1).tolist()

    return prefill, decode


def base(job: Job) -> tuple[Step, Step]:
    """The runtime alone: what a process holds before a model is loaded."""
    import onnxruntime

    import engines.serving.session  # noqa: F401

    onnxruntime.SessionOptions()
    return (lambda: None), (lambda: None)


def genai(job: Job) -> tuple[Step, Step]:
    """onnxruntime-genai with the model that its builder made of the same weights."""
    import numpy as np
    import onnxruntime_genai as og  # type: ignore[import-not-found, unused-ignore]

    config = og.Config(job.model)
    options = {"intra_op_num_threads": job.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    length = job.tokens + job.steps + 2
    last: dict[str, Any] = {}

    def prefill() -> None:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, batch_size=job.rows, do_sample=False)
        last["generator"] = og.Generator(model, parameters)
        last["generator"].append_tokens(np.array(job.prompts(), np.int32))
        last["generator"].generate_next_token()  # the first token comes of prefill's logits

    return prefill, lambda: last["generator"].generate_next_token()


def _torch_steps(job: Job, model: Any, **named: Any) -> tuple[Step, Step]:
    import torch

    torch.set_num_threads(job.threads)
    ids = torch.tensor(job.prompts())
    last: dict[str, Any] = {}

    @torch.inference_mode()
    def prefill() -> None:
        made = model(input_ids=ids, use_cache=True, logits_to_keep=1, **named)
        last.update(cache=made.past_key_values, tokens=made.logits[:, -1:].argmax(-1))

    @torch.inference_mode()
    def decode() -> None:
        made = model(input_ids=last["tokens"], past_key_values=last["cache"], use_cache=True, **named)
        last.update(cache=made.past_key_values, tokens=made.logits[:, -1:].argmax(-1))

    return prefill, decode


def transformers(job: Job) -> tuple[Step, Step]:
    """transformers, eager."""
    from transformers import AutoModelForCausalLM

    return _torch_steps(job, AutoModelForCausalLM.from_pretrained(job.model, dtype="float32").eval())


def peft(job: Job) -> tuple[Step, Step]:
    """PEFT's mixed batch: each row names its LoRA adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    backbone = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32")
    config = LoraConfig(r=job.rank, target_modules=list(job.modules), init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(backbone, config, adapter_name="tenant0")
    for number in range(1, job.tenants):
        model.add_adapter(f"tenant{number}", config)
    names = [f"tenant{row % max(job.tenants, 1)}" for row in range(job.rows)]
    return _torch_steps(job, model.eval(), adapter_names=names)


def optimum(job: Job) -> tuple[Step, Step]:
    """optimum-onnx's ONNX Runtime model, exported by itself."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-untyped, import-not-found, unused-ignore]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    model = ORTModelForCausalLM.from_pretrained(job.model, session_options=options)
    ids = torch.tensor(job.prompts())
    last: dict[str, Any] = {}

    def run(tokens: Any, past: Any, total: int) -> None:
        mask = torch.ones(job.rows, total, dtype=torch.long)
        positions = mask.cumsum(-1)[:, -tokens.shape[1] :] - 1
        made = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
        last.update(cache=made.past_key_values, tokens=made.logits[:, -1:].argmax(-1), total=total)

    return lambda: run(ids, None, job.tokens), lambda: run(last["tokens"], last["cache"], last["total"] + 1)


PEERS = {each.__name__: each for each in (session, base, genai, transformers, peft, optimum)}


def measure(job: Job, prefill: Step, decode: Step) -> dict[str, Any]:
    """Time a prefill, and the decode steps after the first."""
    prefill_ms = _timed(prefill)
    decode()
    steps = [_timed(decode) for _ in range(job.steps - 1)]
    sizes = needed_mib(job) if job.peer == "session" else {}
    return {"prefill_ms": prefill_ms, "decode_ms": steps, "peak_mib": peak_mib(), **sizes}


def peak_mib() -> float:
    """The most memory that was resident; what getrusage says may be the parent's, from before this program began."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def needed_mib(job: Job) -> dict[str, float]:
    """What a bundle cannot do without: one copy of its weights, its tenants', and the cache entries in use."""
    folder = Path(job.model)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (target,) = manifest["targets"]
    past = [x for x in target["graphs"]["serve"]["inputs"] if x["name"].startswith("past_key_values.")]
    entry = sum(heads * width * 4 for _, heads, _, width in (tensor["shape"] for tensor in past))
    weights = sum(path.stat().st_size for pattern in ("*.data", "tenants/*") for path in folder.glob(pattern))
    return {"weights_mib": weights / 2**20, "cache_mib": job.rows * (job.tokens + job.steps) * entry / 2**20}


def _timed(action: Step) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    """Load and answer until stdin ends."""
    fields = json.loads(sys.argv[1])
    if fields["peer"] not in PEERS:
        sys.exit(f"peer {fields['peer']!r} is not known; use one of {', '.join(PEERS)}")
    job = Job(**{**fields, "modules": tuple(fields.get("modules", ()))})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    prefill, decode = PEERS[job.peer](job)
    for _ in sys.stdin:
        print(json.dumps(measure(job, prefill, decode)), file=answers, flush=True)


if __name__ == "__main__":
    main()
