"""Speed: decode and prefill of mixed tenants, against PyTorch eager and compiled, PEFT's mixed LoRA, and the floor.

The floor of a decode step is the time in which the memory moves the weights once, by the copy that part 1 measured.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.part import Skip, Work, median_ms

TITLE = "Speed"
LIMIT_S = 300
WAITS_FOR = "00_bundles"
TOKENS, STEPS = 128, 16
ROWS, TENANTS = (1, 8, 32, 64), (1, 8, 64)
PEFT_TENANTS, PEFT_RANK = 8, 16
PEFT_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_TENANT_COST, MIN_OVER_EAGER, MIN_OF_FLOOR = 1.03, 3.0, 0.6
"""The goals: decode with tenants over without; over eager PyTorch, and of the floor, at one row with fp16 weights."""

Step = Callable[[], Any]


def run(work: Work) -> None:
    """Ours, then the others, then what was aimed at."""
    part = importlib.import_module("tests.gpu.parts.00_bundles")
    rows = (1, 2) if work.tiny else ROWS
    for dtype in ("fp32",) if work.tiny else ("fp16", "fp32"):
        for kind in ("plain", "iapt"):
            bundle = work.attempt(f"{kind}-{dtype}", lambda k=kind, d=dtype: part.bundle(work, f"{k}-{d}"))
            if bundle is not None:
                work.attempt(f"{kind}-{dtype}", lambda b=bundle, d=dtype: ours(work, b, d, rows))
    for dtype in ("fp32",) if work.tiny else ("fp16", "fp32"):
        work.attempt(f"PyTorch {dtype}", lambda d=dtype: eager(work, d, rows))
        work.attempt(f"torch.compile {dtype}", lambda d=dtype: compiled(work, d, rows[1:2] if work.tiny else rows[:2]))
    work.attempt("PEFT", lambda: peft(work, rows))
    work.attempt("goals", lambda: goals(work))


def put(work: Work, what: str, dtype: str, rows: int, tenants: int, prefill: Step, decode: Step) -> None:
    """Time a reading and the steps after it, as a row of the table."""
    repeats = 3 if work.tiny else 5
    prefill_ms = median_ms(prefill, work.device, repeats, warm=2)
    decode_ms = median_ms(decode, work.device, 3 if work.tiny else STEPS, warm=2)
    work.row("speed", what=what, dtype=dtype, rows=rows, tenants=tenants, prefill_ms=prefill_ms, decode_ms=decode_ms)


def prompts(work: Work, rows: int, words: int) -> np.ndarray:
    """Random instructions ``[rows, TOKENS]``, the same for all."""
    return np.random.default_rng(0).integers(5, words - 1, (rows, 12 if work.tiny else TOKENS))


def ours(work: Work, bundle: Path, dtype: str, all_rows: tuple[int, ...]) -> None:
    """Rows of the bundle's tenants in turn, over the cache that the device serves from."""
    from benchmarks.serving_peers import stepper_steps
    from engines.serving.session import Session

    session = Session.open(bundle, device=work.device, verify=False, allow_unproven=True)
    words, most = session.manifest.backbone.vocab_size, len(session.tenants)
    with session.stepper:
        work.row("caches", bundle=bundle.name, cache=type(session.stepper).__name__)
        for rows in all_rows:
            read = prompts(work, rows, words).tolist()
            for tenants in sorted({min(count, rows, most) for count in TENANTS}):
                count = 0 if bundle.name.startswith("plain") else tenants
                put(work, "ours", dtype, rows, count, *stepper_steps(session.stepper, read, tenants))


def load(work: Work, dtype: str) -> Any:
    """The backbone in transformers, on the device."""
    from trainers.decoder.backbone import load_backbone

    return load_backbone(str(work.folder / "model"), dtype=dtype).model.to(work.device).eval()


def torch_steps(work: Work, rows: int, words: int, call: Callable[..., Any]) -> tuple[Step, Step]:
    """Greedy steps of a model over a growing cache."""
    import torch

    last: dict[str, Any] = {}
    read = torch.from_numpy(prompts(work, rows, words)).to(work.device)

    @torch.inference_mode()
    def step(tokens: Any, cache: Any) -> None:
        made = call(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        last.update(cache=made.past_key_values, tokens=made.logits[:, -1:].argmax(-1))
        last["tokens"].tolist()  # as a server, which looks at each token

    return (lambda: step(read, None)), (lambda: step(last["tokens"], last["cache"]))


def eager(work: Work, dtype: str, all_rows: tuple[int, ...]) -> None:
    """transformers as it is."""
    model = load(work, dtype)
    for rows in all_rows:
        put(work, "PyTorch eager", dtype, rows, 0, *torch_steps(work, rows, model.config.vocab_size, model))


def compiled(work: Work, dtype: str, all_rows: tuple[int, ...]) -> None:
    """Decode steps over a static cache under torch.compile; reading runs eager."""
    import torch

    for rows in all_rows:
        torch._dynamo.reset()
        model = load(work, dtype)
        put(work, "torch.compile", dtype, rows, 0, *static_steps(work, rows, model))


def static_steps(work: Work, rows: int, model: Any) -> tuple[Step, Step]:
    """Greedy steps over a cache of fixed size; a captured graph's outputs are overwritten, so tokens are copied."""
    import torch
    from transformers import StaticCache

    read = torch.from_numpy(prompts(work, rows, model.config.vocab_size)).to(work.device)
    cache = StaticCache(config=model.config, max_cache_len=64 if work.tiny else 512)
    mode: dict[str, Any] = {"backend": "eager"} if work.tiny else {"mode": "reduce-overhead"}
    forward = torch.compile(model.forward, **mode)
    last: dict[str, Any] = {}

    @torch.inference_mode()
    def prefill() -> None:
        cache.reset()
        made = model(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1)
        last.update(tokens=made.logits[:, -1:].argmax(-1), place=read.shape[1])

    @torch.inference_mode()
    def decode() -> None:
        place = torch.full((rows, 1), last["place"], device=work.device)
        made = forward(input_ids=last["tokens"], position_ids=place, past_key_values=cache, use_cache=True)
        last.update(tokens=made.logits[:, -1:].argmax(-1).clone(), place=last["place"] + 1)
        last["tokens"].tolist()

    return prefill, decode


def peft(work: Work, all_rows: tuple[int, ...]) -> None:
    """PEFT's mixed batch, in which each row names its LoRA adapter."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Skip("PEFT is not installed") from error
    dtype = "fp32" if work.tiny else "fp16"
    config = LoraConfig(r=PEFT_RANK, target_modules=PEFT_MODULES, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load(work, dtype), config, adapter_name="tenant0")
    for number in range(1, PEFT_TENANTS):
        model.add_adapter(f"tenant{number}", config)
    model.to(work.device).eval()
    for rows in all_rows:
        names = [f"tenant{row % PEFT_TENANTS}" for row in range(rows)]
        count = min(rows, PEFT_TENANTS)

        def call(names: list[str] = names, **inputs: Any) -> Any:
            return model(adapter_names=names, **inputs)

        steps = torch_steps(work, rows, model.config.vocab_size, call)
        put(work, "PEFT, LoRA", dtype, rows, count, *steps)


def goals(work: Work) -> None:
    """What was aimed at, in fp16 on the GPU; a rehearsal has no fp16 and goes through with fp32, without a verdict."""
    dtype = "fp32" if work.tiny else "fp16"
    found = {(row["what"], row["dtype"], row["rows"], row["tenants"]): row for row in work.figures["speed"]}

    def ms(what: str, rows: int, tenants: int = 0) -> float:
        row = found.get((what, dtype, rows, tenants))
        if row is None:
            raise Skip(f"{what}, {rows} rows, {tenants} tenants, was not measured")
        return float(row["decode_ms"])

    def goal(name: str, value: float, passed: bool) -> None:
        work.row("goals", goal=name, found=value)
        if not work.tiny:
            work.check(name, passed, f"{value:.3f}")

    most = max(rows for _, _, rows, tenants in found if tenants)
    for rows in sorted({rows for _, _, rows, tenants in found if tenants}):

        def cost(rows: int = rows) -> None:
            tenants = max(count for what, kind, n, count in found if (what, kind, n) == ("ours", dtype, rows))
            value = ms("ours", rows, tenants) / ms("ours", rows)
            goal(
                f"{rows} rows of {tenants} tenants cost at most {MAX_TENANT_COST} of none",
                value,
                value <= MAX_TENANT_COST,
            )

        work.attempt(f"cost of tenants at {rows} of {most} rows", cost)

    def over_eager() -> None:
        value = ms("PyTorch eager", 1) / ms("ours", 1)
        goal(f"at least {MIN_OVER_EAGER} times eager PyTorch at one row", value, value >= MIN_OVER_EAGER)

    def of_floor() -> None:
        value = floor_ms(work, dtype) / ms("ours", 1)
        goal(f"at least {MIN_OF_FLOOR} of the floor at one row", value, value >= MIN_OF_FLOOR)

    def over_compiled() -> None:
        rows = 2 if work.tiny else 8
        value = ms("torch.compile", rows) / ms("ours", rows)
        goal(f"ahead of torch.compile at {rows} rows", value, value > 1)

    for name, action in (("eager", over_eager), ("floor", of_floor), ("compiled", over_compiled)):
        work.attempt(name, action)


def floor_ms(work: Work, dtype: str) -> float:
    """Milliseconds in which the memory moves the backbone's weights once.

    Raises:
        Skip: part 1 measured no bandwidth.
    """
    record = (work.out or work.folder / "results" / "04").with_name("01_device.json")
    figures = json.loads(record.read_text(encoding="utf-8"))["figures"] if record.is_file() else {}
    if "copy_gb_s" not in figures:
        raise Skip("part 1 measured no bandwidth")
    weights = work.folder / "model" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as file:
        values = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118 (no dict)
    num_bytes = values * {"fp32": 4, "fp16": 2}[dtype]
    work.record(weight_bytes=num_bytes)
    return num_bytes / figures["copy_gb_s"] / 1e6
