"""What the compiled kernel of ``ai.iapt::Rational`` saves, alone and in a bundle's prefill.

    make cpp
    python benchmarks/rational_op.py .cache/demo-bundle

Three ways of running the same graph take turns, so that a noisy machine is noisy for all of them: the kernel, the
function body with ONNX Runtime's own fusions, and the body without them. What the kernel saves against each body is
taken turn by turn, so that a slow minute cancels: the median of the turns' ratios with its 95 % interval, which
includes zero where nothing is shown. Processor time counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from engines.native import KERNEL, add_kernels
from engines.serving.tenants import TenantBank
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest, TensorSpec
from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION, RATIONAL
from iapt_export.graphs.ops.rational_op import rational_function
from trainers.methods.rational import initial_coefficients

FORMS = ("kernel", "body", "body unfused")
ELEMENTS = (1024, 65536, 4194304)
BATCHES = ["1x16", "1x64", "4x64"]
"""Rows and instruction tokens of the prefills that are timed."""


def main() -> None:
    """Time the operator and the prefill; print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle with an IAPT tenant and the target onnxruntime")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batches", nargs="+", default=BATCHES, help="ROWSxTOKENS of the prefills (default: %(default)s)"
    )
    arguments = parser.parse_args()
    found = {
        "threads": arguments.threads,
        "operator_us": {
            str(count): time_operator(count, arguments.repeat, arguments.threads, 1e6) for count in ELEMENTS
        },
        "prefill_ms": time_prefill(arguments.bundle, arguments.batches, arguments.repeat, arguments.threads),
    }
    print(json.dumps(found, indent=2))


def open_session(source: bytes | str, form: str, threads: int) -> Any:
    """An ONNX Runtime session that runs Rational in one of `FORMS`.

    Raises:
        IaptError: the kernel is not built.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if form == "body unfused":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if form == "kernel":
        used = add_kernels(options)
        if used != KERNEL:
            raise IaptError(f"the kernel is not used but the {used}; run 'make cpp' first")
    return onnxruntime.InferenceSession(source, options)


def time_operator(count: int, repeat: int, threads: int, unit: float) -> dict[str, Any]:
    """The operator alone on ``count`` values of fp32, degrees (5, 4), form B."""
    a, b = (array.astype(np.float32) for array in initial_coefficients("gelu", 5, 4, "B"))
    node = helper.make_node(RATIONAL, ["x", "a", "b"], ["y"], domain=DOMAIN, form="B")
    sizes: dict[str, list[Any]] = {"x": ["rows", 256], "a": [6], "b": [4]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes["x"])
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    body = rational_function(6, 4, "B", 23)
    graph = helper.make_graph([node], "rational", inputs, [output])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=10)
    sessions = {form: open_session(model.SerializeToString(), form, threads) for form in FORMS}
    x = np.random.default_rng(0).normal(size=(count // 256, 256)).astype(np.float32)
    calls = {form: partial(session.run, None, {"x": x, "a": a, "b": b}) for form, session in sessions.items()}
    return take_turns(calls, repeat, unit)


def time_prefill(bundle: Path, batches: Sequence[str], repeat: int, threads: int) -> dict[str, dict[str, Any]]:
    """The bundle's prefill graph, rows of its first tenant."""
    manifest = BundleManifest.load(bundle)
    target = manifest.target("onnxruntime")
    graph = target.graphs["prefill"]
    weights = TenantBank(bundle, manifest, target).stacks
    sessions = {form: open_session(str(bundle / graph.path), form, threads) for form in FORMS}
    found = {}
    for batch in batches:
        rows, length = map(int, batch.split("x"))
        feeds = {
            tensor.name: weights.get(tensor.name, tokens(tensor, rows, length, manifest.backbone.vocab_size))
            for tensor in graph.inputs
        }
        calls = {form: partial(session.run, None, feeds) for form, session in sessions.items()}
        found[batch] = take_turns(calls, repeat, 1e3)
    return found


def tokens(tensor: TensorSpec, rows: int, length: int, vocabulary: int) -> np.ndarray:
    """Instructions of arbitrary tokens, without padding, of the first tenant."""
    if tensor.name == "input_ids":
        return np.random.default_rng(0).integers(10, vocabulary, (rows, length))
    return np.ones((rows, length), np.int64) if tensor.name == "attention_mask" else np.zeros(rows, np.int64)


def take_turns(calls: Mapping[str, Callable[[], Any]], repeat: int, unit: float) -> dict[str, Any]:
    """Time every call ``repeat`` times, in turns that each begin with another call.

    Args:
        calls: one call per form, the kernel among them.
        repeat: number of turns.
        unit: 1e3 for milliseconds.

    Returns:
        each form's median time in ``unit`` and, under ``saved_percent``, what the kernel saves against each other form:
        the median over the turns and the bounds of its 95 % interval, by order statistics.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeat + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - started)
    timed = {name: np.array(seconds[1:]) for name, seconds in times.items()}  # the first turn warms up
    found: dict[str, Any] = {name: round(float(np.median(seconds)) * unit, 3) for name, seconds in timed.items()}
    found["saved_percent"] = {
        name: median_with_bounds(100 * (1 - timed["kernel"] / timed[name])) for name in names if name != "kernel"
    }
    return found


def median_with_bounds(values: np.ndarray) -> list[float]:
    """Lower bound, median and upper bound of the median's 95 % interval (order statistics, normal approximation)."""
    half = 0.98 * len(values) ** 0.5
    ranks = np.clip([len(values) / 2 - half, (len(values) - 1) / 2, len(values) / 2 + half - 1], 0, len(values) - 1)
    return [round(float(value), 2) for value in np.interp(ranks, np.arange(len(values)), np.sort(values))]


if __name__ == "__main__":
    main()
