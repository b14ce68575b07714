"""One peer in a process and an environment of its own: ``PYTHON benchmarks/serving_peers.py '{"peer": "genai", ...}'``.

Loads, measures twice, and prints the second as JSON: milliseconds of a prefill and of a decode step, and memory. Every
peer reads the same random tokens and writes as many, greedily, and none stops early. Standard library and the peer's
own package only, so that it runs where this project is not installed; `session` alone imports it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Step = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """What is measured; the fields of the JSON."""

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

    stepper = Session.open(job.model, verify=False, allow_unproven=True).stepper
    stepper.runners["serve"].threads = job.threads  # type: ignore[attr-defined]
    stepper.activate()
    return stepper_steps(stepper, job.prompts(), job.tenants)


def stepper_steps(stepper: Any, prompts: list[list[int]], tenants: int) -> tuple[Step, Step]:
    """Reading and one step as a session's scheduler drives them: tokens in, logits out, the best taken on the host.

    Args:
        stepper: active.
        prompts: token ids, a list a row.
        tenants: how many the rows take turns with, at least one.
    """
    from engines.serving.stepper import Instruction

    names = list(stepper.bank.tenants)
    chosen = [stepper.bank.get(names[row % max(tenants, 1)]) for row in range(len(prompts))]
    rows = [Instruction(tenant, prompt) for tenant, prompt in zip(chosen, prompts, strict=True)]
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
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": job.threads}}}}))
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


def _torch_steps(job: Job, call: Callable[..., Any]) -> tuple[Step, Step]:
    """Greedy steps of a model that returns ``logits`` and ``past_key_values``."""
    import torch

    torch.set_num_threads(job.threads)
    last: dict[str, Any] = {"cache": None, "length": 0}

    @torch.inference_mode()
    def step(tokens: Any) -> None:
        length = last["length"] + tokens.shape[1]
        made = call(input_ids=tokens, past_key_values=last["cache"], use_cache=True, length=length)
        last.update(cache=made.past_key_values, tokens=made.logits[:, -1:].argmax(-1), length=length)

    def prefill() -> None:
        last.update(cache=None, length=0)
        step(torch.tensor(job.prompts()))

    return prefill, lambda: step(last["tokens"])


def transformers(job: Job) -> tuple[Step, Step]:
    """transformers, eager."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32").eval()
    return _torch_steps(job, lambda length, **inputs: model(logits_to_keep=1, **inputs))


def peft(job: Job) -> tuple[Step, Step]:
    """PEFT's mixed batch: each row names its LoRA adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    backbone = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32")
    config = LoraConfig(r=job.rank, target_modules=list(job.modules), init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(backbone, config, adapter_name="tenant0")
    for number in range(1, job.tenants):
        model.add_adapter(f"tenant{number}", config)
    model.eval()
    names = [f"tenant{row % max(job.tenants, 1)}" for row in range(job.rows)]
    return _torch_steps(job, lambda length, **inputs: model(logits_to_keep=1, adapter_names=names, **inputs))


def optimum(job: Job) -> tuple[Step, Step]:
    """optimum-onnx's ONNX Runtime model, exported by itself."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-untyped, import-not-found, unused-ignore]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    model = ORTModelForCausalLM.from_pretrained(job.model, session_options=options)

    def call(length: int, input_ids: Any, **inputs: Any) -> Any:
        mask = torch.ones(job.rows, length, dtype=torch.long)
        positions = mask.cumsum(-1)[:, -input_ids.shape[1] :] - 1
        return model(input_ids=input_ids, attention_mask=mask, position_ids=positions, **inputs)

    return _torch_steps(job, call)


def llama(job: Job) -> Callable[[], dict[str, float]]:
    """llama.cpp by the package xllamacpp, which has its server and no steps: by the server's own clock.

    Rows are requests that are sent at once. A prefill ends when the last of them was read; a step takes what the row
    that was read last, and so had all others beside it, took for a token.
    """
    import xllamacpp  # type: ignore[import-untyped, import-not-found, unused-ignore]

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_gpu_layers, parameters.n_parallel = job.model, 0, job.rows
    parameters.n_ctx = job.rows * 512
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job.threads
    server = xllamacpp.Server(parameters)

    def ask(prompt: list[int]) -> dict[str, float]:
        request = {"prompt": prompt, "n_predict": job.steps, "ignore_eos": True, "temperature": 0}
        request["cache_prompt"] = False  # or the second time reads nothing
        timings: dict[str, float] = server.handle_completions(request)["timings"]
        return timings

    def once() -> dict[str, float]:
        with ThreadPoolExecutor(job.rows) as pool:
            found = list(pool.map(ask, job.prompts()))
        last = max(found, key=lambda timings: timings["prompt_ms"])
        decode_ms = last["predicted_ms"] / (last["predicted_n"] - 1)  # the first token comes of prefill's logits
        return {"prefill_ms": last["prompt_ms"], "decode_ms": decode_ms, "peak_mib": peak_mib()}

    return once


def openvino(job: Job) -> Callable[[], dict[str, float]]:
    """OpenVINO GenAI with a GGUF file, in one batch; by answers of one token and of ``steps`` more."""
    import numpy as np
    import openvino_genai  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from openvino import Tensor

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # or the second time reads nothing
    threads = {"INFERENCE_NUM_THREADS": job.threads}
    pipeline = openvino_genai.LLMPipeline(job.model, "CPU", scheduler_config=scheduler, **threads)
    ids = np.array(job.prompts(), np.int64)
    inputs = openvino_genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))

    def answer(length: int) -> float:
        config = openvino_genai.GenerationConfig(max_new_tokens=length, min_new_tokens=length, ignore_eos=True)
        began = time.perf_counter()
        found = pipeline.generate(inputs, config)
        passed = (time.perf_counter() - began) * 1e3
        if [len(row) for row in found.tokens] != [length] * job.rows:
            raise RuntimeError(f"rows of {[len(row) for row in found.tokens]} tokens, expected {length}")
        return passed

    def once() -> dict[str, float]:
        prefill_ms = answer(1)  # the first token comes of prefill's logits
        decode_ms = (answer(1 + job.steps) - prefill_ms) / job.steps
        return {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "peak_mib": peak_mib()}

    return once


PEERS: dict[str, Callable[[Job], Any]] = {
    each.__name__: each for each in (session, base, genai, transformers, peft, optimum, llama, openvino)
}


def measure(job: Job, prefill: Step, decode: Step) -> dict[str, float]:
    """Time a prefill, and the median of the decode steps after the first."""
    prefill_ms = _timed(prefill)
    decode()
    decode_ms = statistics.median(_timed(decode) for _ in range(job.steps - 1))
    made = {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "peak_mib": peak_mib()}
    return {**made, **needed_mib(job)} if job.peer == "session" else made


def peak_mib() -> float:
    """The most memory that was resident; what getrusage says may be the parent's, from before this program began."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def needed_mib(job: Job) -> dict[str, float]:
    """What a bundle cannot do without: the weights of its graph, its tenants', and the cache entries in use."""
    import onnx

    folder = Path(job.model)
    graph = onnx.load(folder / "serve.onnx", load_external_data=False).graph
    stored = [
        {entry.key: int(entry.value) for entry in x.external_data if entry.key != "location"} for x in graph.initializer
    ]
    weights = sum({entry["offset"]: entry["length"] for entry in stored if entry}.values())
    weights += sum(path.stat().st_size for path in folder.glob("tenants/*"))
    past = [x.type.tensor_type.shape.dim for x in graph.input if x.name.startswith("past_key_values.")]
    entry = sum(shape[1].dim_value * shape[3].dim_value * 4 for shape in past)
    return {"weights_mib": weights / 2**20, "cache_mib": job.rows * (job.tokens + job.steps) * entry / 2**20}


def _timed(action: Step) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    """Load, warm up, measure."""
    fields = json.loads(sys.argv[1])
    if fields["peer"] not in PEERS:
        sys.exit(f"peer {fields['peer']!r} is not known; use one of {', '.join(PEERS)}")
    job = Job(**{**fields, "modules": tuple(fields.get("modules", ()))})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    made = PEERS[job.peer](job)
    once = made if callable(made) else partial(measure, job, *made)
    once()
    print(json.dumps(once()), file=answers, flush=True)


if __name__ == "__main__":
    main()
