"""How fast a session answers: time to the first token, between tokens, throughput, memory."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from engines.serving.session import Request, Session
from iapt_export.contract.errors import IaptError

Figures = dict[str, Any]


def measure(
    session: Session,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Let ``rows`` requests of the tenants in turn (without any, of the backbone) start together, several times.

    Args:
        session: active, with nothing under way.
        rows: requests in a round.
        prompt_tokens: tokens of each instruction, drawn at random.
        new_tokens: tokens of each answer; end tokens are passed over.
        repeat: rounds that count, after one that does not.
        on_step: called with a word on each round, for progress.

    Returns:
        Milliseconds: ``ttft_p50``, ``ttft_max``, ``itl_p50``, ``itl_p99`` over all rounds; tokens per second:
        ``tokens_per_s`` (whole rounds) and ``decode_tokens_per_s`` (after the last first token), medians over rounds,
        each round's beside them; and the settings.

    Raises:
        IaptError: a request does not fit into the bundle.
    """
    if rows > session.stepper.max_rows:
        raise IaptError(
            f"{rows} rows cannot run at once: the bundle takes {session.stepper.max_rows}; build with a larger --batch"
        )
    random = np.random.default_rng(0)
    vocabulary = session.manifest.backbone.vocab_size
    names = session.tenants or [""]  # the backbone alone
    tenants = [names[row % len(names)] for row in range(rows)]
    requests = [
        Request(
            tenant,
            tokens=tuple(random.integers(0, vocabulary, prompt_tokens).tolist()),
            max_new_tokens=new_tokens,
            ignore_eos=True,
        )
        for tenant in tenants
    ]
    rounds = []
    for number in range(repeat + 1):
        on_step(f"{rows} rows: round {number} of {repeat}" if number else f"{rows} rows: warming up")
        start = time.monotonic()
        made = [session.submit(request, place) for place, request in enumerate(requests)]
        for generation in made:
            generation.result()
        if number:  # at the session: a reader that is late takes several tokens at once
            rounds.append(np.array([generation.times.tokens for generation in made]) - start)
    first = np.concatenate([times[:, 0] for times in rounds])
    between = np.concatenate([np.diff(times, axis=1).ravel() for times in rounds])
    whole = [times.size / times.max() for times in rounds]
    decode = [_decode_rate(times) for times in rounds] if new_tokens > 1 else []
    return {
        "rows": rows,
        "tenants": len({name for name in tenants if name}),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": repeat,
        "ttft_p50_ms": 1e3 * float(np.median(first)),
        "ttft_max_ms": 1e3 * float(first.max()),
        "itl_p50_ms": 1e3 * float(np.median(between)) if between.size else None,
        "itl_p99_ms": 1e3 * float(np.quantile(between, 0.99)) if between.size else None,
        "tokens_per_s": statistics.median(whole),
        "decode_tokens_per_s": statistics.median(decode) if decode else None,
        "rounds_tokens_per_s": whole,
        "rounds_decode_tokens_per_s": decode,
        "itl_quantiles_ms": (1e3 * np.quantile(between, np.linspace(0, 1, 101))).tolist() if between.size else [],
    }


def _decode_rate(times: np.ndarray) -> float:
    """Tokens per second from when every row has its first token, ``times [rows, tokens]`` in seconds."""
    start = times[:, 0].max()
    return float((times > start).sum() / (times.max() - start))


def report(session: Session, figures: list[Figures], device: str = "cpu") -> dict[str, Any]:
    """The figures with everything they depend on.

    Args:
        session: what was measured.
        figures: of `measure`.
        device: where ONNX Runtime ran.
    """
    packages = ("iapt-export", "onnxruntime", "onnxruntime-gpu", "numpy")
    return {
        "bundle": session.bundle.name,
        "backbone": session.manifest.backbone.name_or_path,
        "target": session.target.name,
        "dtype": session.target.dtype,
        "cache": type(session.stepper).__name__.removesuffix("Stepper"),
        "installed_tenants": len(session.tenants),
        "drafts": session.stepper.drafts,
        "drafted_tokens": (state := session.state()).drafted_tokens,
        "accepted_tokens": state.accepted_tokens,
        "peak_memory_mb": peak_memory_mb(),
        "processor": platform.processor() or platform.machine(),
        "device": device if session.target.name == "onnxruntime" else "cuda",
        "versions": {name: version for name in packages if (version := _version(name))},
        "figures": figures,
    }


def peak_memory_mb() -> float | None:
    """The most memory that this process has held, in MiB; None where the system keeps no count (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def table(found: dict[str, Any]) -> Any:
    """The report for a terminal."""
    from rich.table import Table

    title = f"{found['bundle']}: {found['target']} {found['dtype']}, {found['installed_tenants']} tenants installed"
    peak = found["peak_memory_mb"]
    grid = Table(title=title, caption="peak memory not known here" if peak is None else f"peak memory {peak:.0f} MB")
    for name in ("rows", "first token ms", "worst", "next token ms", "p99", "tokens/s", "decode tokens/s"):
        grid.add_column(name, justify="right")
    keys = ("ttft_p50_ms", "ttft_max_ms", "itl_p50_ms", "itl_p99_ms", "tokens_per_s", "decode_tokens_per_s")
    for line in found["figures"]:
        grid.add_row(str(line["rows"]), *("-" if line[key] is None else f"{line[key]:.1f}" for key in keys))
    return grid


def check_plot(path: Path) -> None:
    """Refuse a picture that `plot` could not draw, before the time that measuring takes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        IaptError: it writes no files of that name's kind.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise IaptError(f"{path} cannot be drawn: its name must end in one of {', '.join(known)}")


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw how long rows wait for their next token, a line for each number of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for line in found["figures"]:
        waits = line["itl_quantiles_ms"]
        axes.plot(waits, range(len(waits)), label="1 row" if line["rows"] == 1 else f"{line['rows']} rows")
    for share in (50, 99):
        axes.axhline(share, color="grey", linewidth=0.8, linestyle=":")
        axes.text(1.01, share, f"p{share}", transform=axes.get_yaxis_transform(), va="center", fontsize="small")
    axes.set_xlabel("time to the next token (ms)")
    axes.set_ylabel("tokens that came within it (%)")
    axes.set_xlim(left=0)
    axes.set_title(f"{found['bundle']}, {found['target']} {found['dtype']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
