"""ONNX Runtime on the GPU: the same tokens as on the CPU, the whole validation, and decode steps as a CUDA graph.

Portable graphs first, then a cache in the GPU's memory that is written in place.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from iapt_export.contract.graphs import PAST, PRESENT
from tests.gpu.part import Skip, Work, first_line, median_ms

TITLE = "ONNX Runtime on CUDA"
LIMIT_S = 240
WAITS_FOR = "00_bundles"
TYPES = ("fp32", "fp16")
ROWS, TOKENS, NEW_TOKENS = 8, 48, 24


def run(work: Work) -> None:
    """In fp32 tokens must be the CPU's; in fp16 how many are is a figure."""
    from engines.onnxruntime.devices import require_device
    from iapt_export.contract.errors import NotRunnableError

    try:
        require_device(work.device)
    except NotRunnableError as error:
        raise Skip(str(error)) from error
    part = importlib.import_module("tests.gpu.parts.00_bundles")
    names = [f"iapt-{dtype}" for dtype in (TYPES[:1] if work.tiny else TYPES)]
    bundles = {
        name: bundle for name in names if (bundle := work.attempt(name, lambda name=name: part.bundle(work, name)))
    }
    if not bundles:
        raise Skip("no bundle is there; run part 0 too")
    wanted = work.attempt("tokens on the CPU", lambda: tokens(next(iter(bundles.values())), "cpu", work))
    for name, bundle in bundles.items():
        for in_place in (False, True):
            what = f"{name}, {'in place' if in_place else 'portable graphs'}"
            work.attempt(what, lambda b=bundle, p=in_place, w=what: same_tokens(work, b, p, w, wanted))
        for graph in ("prefill", "decode", "serve", "serve_prefill", "serve_decode"):
            work.attempt(f"{name}: {graph} without the CPU", lambda b=bundle, g=graph: placement(work, b, g))
    for name, bundle in bundles.items():
        work.attempt(f"{name}: validation", lambda b=bundle: validation(work, b))
    for name, bundle in bundles.items():
        work.attempt(f"{name}: CUDA graph", lambda b=bundle: cuda_graph(work, b))


def tokens(bundle: Path, device: str, work: Work, in_place: bool | None = None) -> list[list[int]]:
    """Greedy answers of rows of mixed tenants and lengths, which join and leave one batch."""
    from engines.serving.session import Request, Session

    count, most = (4, 6) if work.tiny else (2 * ROWS, NEW_TOKENS)
    source = np.random.default_rng(0)
    with Session.open(bundle, device=device, in_place=in_place, verify=False, allow_unproven=True) as session:
        names, words = session.tenants, session.manifest.backbone.vocab_size
        requests = [
            Request(
                names[number % len(names)],
                tokens=tuple(source.integers(0, words, 8 + number % (10 if work.tiny else TOKENS)).tolist()),
                max_new_tokens=most - number % 3,
                ignore_eos=True,
            )
            for number in range(count)
        ]
        return [answer.tokens for answer in session.generate(requests)]


def same_tokens(work: Work, bundle: Path, in_place: bool, what: str, wanted: list[list[int]] | None) -> None:
    """Answers on the device against those on the CPU in fp32."""
    made = tokens(bundle, work.device, work, in_place)
    assert wanted is not None, "the CPU gave no answers"
    equal = sum(one == other for one, other in zip(made, wanted, strict=True))
    work.row("tokens", what=what, answers=len(made), identical=equal)
    if "fp32" in what:
        work.check(f"{what}: tokens are the CPU's", made == wanted, f"{equal} of {len(made)} answers")


def placement(work: Work, bundle: Path, graph: str) -> None:
    """Whether every node has a kernel on the device: ONNX Runtime refuses the session where one has not."""
    import onnxruntime

    from engines.native import add_kernels
    from engines.onnxruntime.devices import OPTIONS, PROVIDERS
    from iapt_export.contract.manifest import BundleManifest

    spec = BundleManifest.load(bundle).target().graphs.get(graph)
    if spec is None:
        raise Skip("the bundle has no such graph")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if work.device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    add_kernels(options, work.device)
    provider = (PROVIDERS[work.device], OPTIONS[work.device])
    try:
        onnxruntime.InferenceSession(str(bundle / spec.path), options, providers=[provider])
        said = "all nodes"
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        said = first_line(error)
    work.row("placement", bundle=bundle.name, graph=graph, on_the_device=said)


def validation(work: Work, bundle: Path) -> None:
    """The comparison of ``iapt-export validate --device``, and the worst of each stage."""
    from iapt_export.contract.manifest import BundleManifest
    from trainers.decoder.backbone import load_backbone
    from validation.judging.compare import Settings
    from validation.validate import validate_bundle

    manifest = BundleManifest.load(bundle)
    backbone = load_backbone(str(work.folder / "model"))
    settings = Settings(device=work.device, depth="quick", new_tokens=16, peft_check=False)
    report = validate_bundle(bundle, manifest, backbone, settings, lambda text: print(text, flush=True))
    for target in report.targets:
        worst: dict[str, dict[str, float]] = {}
        for check in target.checks:
            for metric in check.limits:
                found = check.measured.get(metric, float("nan"))
                rows = worst.setdefault(check.stage, {})
                pick = min if metric in ("agreement", "identical", "refused") else max
                rows[metric] = pick(rows.get(metric, found), found)
        for stage, figures in worst.items():
            work.row("parity", bundle=bundle.name, target=target.name, stage=stage, **figures)
        failed = "; ".join(f"{check.stage}, {check.case}" for check in target.checks if not check.passed)
        work.check(f"{bundle.name}, {target.name}: validation", target.status == "pass", failed or target.status)


def cuda_graph(work: Work, bundle: Path) -> None:
    """`serve_decode` captured once and replayed: the same logits, and how much faster a step is.

    A captured graph reads and writes the addresses of its capture, so every input and output has a buffer of its own.
    """
    from iapt_export.contract.manifest import BundleManifest

    spec = BundleManifest.load(bundle).target().graphs.get("serve_decode")
    if spec is None:
        raise Skip("the bundle has no serve_decode")
    for rows in (1,) if work.tiny else (1, 8):
        feeds = decode_feeds(bundle, spec, rows)
        plain, captured = (Replay(work, bundle / spec.path, spec, feeds, capture=on) for on in (False, True))
        first = [each.step(feeds) for each in (plain, captured)]
        later = {**feeds, "input_ids": feeds["input_ids"] + 1}
        second = [each.step(later) for each in (plain, captured)]
        for name, pair in (("captured", first), ("replayed with other tokens", second)):
            error = float(np.abs(pair[0].astype(np.float64) - pair[1]).max() / np.abs(pair[0]).max())
            work.check(f"{bundle.name}, {rows} rows: {name} logits", error < 1e-5, f"off by {error:.2g} of the largest")
        work.check("other tokens give other logits", not np.array_equal(first[1], second[1]))
        times = [median_ms(each.run, work.device, 20) for each in (plain, captured)]
        work.row("cuda_graph", bundle=bundle.name, rows=rows, plain_ms=times[0], graph_ms=times[1])


def decode_feeds(bundle: Path, spec: Any, rows: int) -> dict[str, np.ndarray]:
    """Inputs of a step: tenants in turn, a cache of small random numbers, the same place in each row."""
    from engines.runner import numpy_type
    from engines.serving.tenants import TenantBank
    from iapt_export.contract.manifest import BundleManifest

    manifest = BundleManifest.load(bundle)
    bank = TenantBank(bundle, manifest, manifest.target())
    tenants = [list(bank.tenants.values())[row % len(bank.tenants)] for row in range(rows)]
    place = manifest.ranges.past.max // 2
    known = {
        "input_ids": np.full((rows, 1), 7, np.int64),
        "position_ids": np.full((rows, 1), place, np.int64),
        "seqlens_k": np.full(rows, place, np.int32),
        **bank.indices(tenants),
        **bank.stacks,
    }
    source = np.random.default_rng(0)
    feeds = {}
    for tensor in spec.inputs:
        shape = [rows if size == "batch" else size for size in tensor.shape]
        kind = numpy_type(tensor.dtype)
        feeds[tensor.name] = known.get(tensor.name)
        if feeds[tensor.name] is None:
            feeds[tensor.name] = (0.1 * source.standard_normal(shape)).astype(kind)
    return feeds


class Replay:
    """A session whose inputs and outputs stand in buffers on the device, written anew before each step."""

    def __init__(self, work: Work, path: Path, spec: Any, feeds: dict[str, np.ndarray], *, capture: bool) -> None:
        import onnxruntime

        from engines.onnxruntime.devices import OPTIONS, PROVIDERS

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        given = {**OPTIONS[work.device], **({"enable_cuda_graph": "1"} if capture and work.device == "cuda" else {})}
        self.session = onnxruntime.InferenceSession(str(path), options, providers=[(PROVIDERS[work.device], given)])
        self.binding = self.session.io_binding()
        self.values = {
            tensor.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(feeds[tensor.name]), work.device, 0
            )
            for tensor in spec.inputs
        }
        for name, value in self.values.items():
            self.binding.bind_ortvalue_input(name, value)
        (logits,) = (tensor for tensor in spec.outputs if tensor.name == "logits")
        rows = len(feeds["input_ids"])
        empty = np.zeros((rows, 1, int(logits.shape[2])), feeds[f"{PAST}0.key"].dtype)
        self.logits = onnxruntime.OrtValue.ortvalue_from_numpy(empty, work.device, 0)
        for tensor in spec.outputs:
            past = tensor.name.replace(PRESENT, PAST)
            self.binding.bind_ortvalue_output(tensor.name, self.logits if tensor is logits else self.values[past])

    def step(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Logits of one step over these inputs."""
        for name, value in self.values.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self.run()
        return self.logits.numpy().copy()

    def run(self) -> None:
        """The step alone."""
        self.session.run_with_iobinding(self.binding)
