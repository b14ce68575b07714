"""The device: copy bandwidth, matrix rate, and how far PyTorch's answers on it are from the CPU's in fp32.

The last replaces the stand-ins of `validation.judging.tolerances`, which are PyTorch in the type on the CPU.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from tests.gpu.part import Skip, Work, median_ms, synchronize

TITLE = "Device and PyTorch on it"
LIMIT_S = 150
TYPES = ("fp32", "fp16", "bf16")
PROMPTS, TOKENS, STEPS = 8, 96, 16
STAGES = {
    "fp32": {"logits": 1e-3, "agreement": 0.99},
    "fp16": {"logits": 3e-2, "agreement": 0.97},
    "bf16": {"logits": 2e-1, "agreement": 0.9},
}
"""What the table of tolerances allows today; fp32 is other kernels in another order, so it has room."""


def run(work: Work) -> None:
    """Each figure is worth having without the next."""
    import torch

    if work.device == "cuda" and not torch.cuda.is_available():
        raise Skip("PyTorch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    if work.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        work.record(
            device=about.name, multiprocessors=about.multi_processor_count, memory_gib=about.total_memory / 2**30
        )
    work.attempt("copy bandwidth", lambda: copies(work))
    for dtype in TYPES:
        work.attempt(f"matrix rate {dtype}", lambda dtype=dtype: products(work, dtype))
    work.attempt("PyTorch's answers", lambda: answers(work))


def copies(work: Work) -> None:
    """GB/s of a copy within the device's memory, bytes read and written."""
    import torch

    count = 1 << (20 if work.tiny else 31)
    source = torch.ones(count, dtype=torch.uint8, device=work.device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), work.device, 10)
    work.record(copy_gb_s=2 * count / ms / 1e6)


def products(work: Work, dtype: str) -> None:
    """TFLOP/s of a square product of random matrices."""
    import torch

    size = 256 if work.tiny else 8192
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    a, b = (torch.randn(size, size, device=work.device).to(kind) for _ in range(2))
    ms = median_ms(lambda: a @ b, work.device, 10)
    work.row("matrix_rate", dtype=dtype, size=size, ms=ms, tflop_s=2 * size**3 / ms / 1e9)


def answers(work: Work) -> None:
    """Errors of logits and cache at each stage, in each type, against the CPU in fp32, over the same tokens."""
    import torch

    from trainers.decoder.backbone import load_backbone

    importlib.import_module("tests.gpu.parts.00_bundles").make_backbone(work)
    steps = 3 if work.tiny else STEPS
    model = load_backbone(str(work.folder / "model")).model
    source = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (PROMPTS, 12 if work.tiny else TOKENS), generator=source)
    wanted, chosen = decoded(model, prompts, steps, None)
    for dtype in TYPES:
        lower = load_backbone(str(work.folder / "model"), dtype=dtype).model.to(work.device)
        found, _ = decoded(lower, prompts.to(work.device), steps, chosen)
        del lower
        compare(work, dtype, found, wanted)


def decoded(model: Any, prompts: Any, steps: int, chosen: list[Any] | None) -> tuple[list[dict[str, Any]], list[Any]]:
    """Logits and cache of reading and of each step, in fp32 on the host; feeds ``chosen``, else greedy tokens.

    Returns:
        For each step ``logits [B, V]`` and ``cache``, keys and values of all layers; and the tokens ``[B, 1]`` fed.
    """
    import torch

    tokens, cache, made, fed = prompts, None, [], []
    with torch.inference_mode():
        for step in range(steps):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1].float().cpu()
            layers = [layer for each in cache.layers for layer in (each.keys, each.values)]
            made.append({"logits": logits.numpy(), "cache": [layer.float().cpu().numpy() for layer in layers]})
            tokens = (logits.argmax(-1, keepdim=True) if chosen is None else chosen[step]).to(prompts.device)
            fed.append(tokens.cpu())
    return made, fed


def compare(work: Work, dtype: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Rows of the table of errors, and the limits that stand now."""
    from validation.judging.metrics import kl, relative

    for stage, numbers in (("prefill", range(1)), ("decode", range(1, len(wanted)))):
        pairs = [(found[n]["logits"][row], wanted[n]["logits"][row]) for n in numbers for row in range(PROMPTS)]
        logits = [relative(*pair) for pair in pairs]
        agree = float(np.mean([made.argmax() == right.argmax() for made, right in pairs]))
        cache = max(
            relative(*pair) for n in numbers for pair in zip(found[n]["cache"], wanted[n]["cache"], strict=True)
        )
        divergence = [kl(*pair) for pair in pairs]
        work.row(
            "errors",
            dtype=dtype,
            stage=stage,
            logits_median=float(np.median(logits)),
            logits_worst=max(logits),
            kl_worst=max(divergence),
            cache_worst=cache,
            top1=agree,
        )
        limits = STAGES[dtype]
        work.check(f"{dtype} {stage} logits within today's limit {limits['logits']}", max(logits) <= limits["logits"])
        if not work.tiny:  # of a tiny model's few tokens one may be a tie
            work.check(
                f"{dtype} {stage} best token agrees in {limits['agreement']} of rows", agree >= limits["agreement"]
            )
    synchronize(work.device)
