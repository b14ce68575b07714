"""What the compiled kernel of ``ai.iapt::Rational`` saves: ``make cpp``, then ``python -m tests.native.time_rational``.

The kernel, the function body with ONNX Runtime's own fusions, and the body without them take turns, so that a noisy
machine is noisy for all. What the kernel saves is taken turn by turn: the median of the ratios with its 95 % interval,
which includes zero where nothing is shown. Processor time counts.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from engines.native import KERNEL, add_kernels
from iapt_export.contract.errors import IaptError
from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION, RATIONAL
from iapt_export.graphs.ops.rational_op import rational_function
from trainers.methods.rational import initial_coefficients

FORMS = ("kernel", "body", "body unfused")
ELEMENTS = (1024, 65536, 4194304)


def main() -> None:
    """Time the operator; print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    found = {f"{count} values": take_turns(count, arguments.repeat, arguments.threads) for count in ELEMENTS}
    print(json.dumps({"threads": arguments.threads, **found}, indent=2))


def operator_model() -> bytes:
    """The operator alone on fp32 ``[rows, 256]``, degrees (5, 4), form B."""
    sizes: dict[str, list[Any]] = {"x": ["rows", 256], "a": [6], "b": [4], "y": ["rows", 256]}
    values = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name, size in sizes.items()}
    output = values.pop("y")
    node = helper.make_node(RATIONAL, list(values), ["y"], domain=DOMAIN, form="B")
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    graph = helper.make_graph([node], "rational", list(values.values()), [output])
    body = rational_function(6, 4, "B", 23)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=10)
    return model.SerializeToString()


def open_session(source: bytes, form: str, threads: int) -> Any:
    """An ONNX Runtime session that runs Rational in one of `FORMS`.

    Raises:
        IaptError: the kernel is not built.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if form == "body unfused":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if form == "kernel" and (used := add_kernels(options)) != KERNEL:
        raise IaptError(f"the kernel is not used but the {used}; run 'make cpp' first")
    return onnxruntime.InferenceSession(source, options)


def take_turns(count: int, repeat: int, threads: int) -> dict[str, Any]:
    """Time the operator on ``count`` values in each form ``repeat`` times, in turns that each begin with another form.

    Returns:
        Every form's median time in ms and, under ``saved_percent``, what the kernel saves against each other form: see
        `median_with_bounds`.
    """
    a, b = (array.astype(np.float32) for array in initial_coefficients("gelu", 5, 4, "B"))
    feeds = {"x": np.random.default_rng(0).normal(size=(count // 256, 256)).astype(np.float32), "a": a, "b": b}
    sessions = [open_session(operator_model(), form, threads) for form in FORMS]
    times = np.zeros((repeat + 1, len(FORMS)))
    for turn in range(repeat + 1):
        for place in range(len(FORMS)):
            form = (turn + place) % len(FORMS)
            started = time.process_time()
            sessions[form].run(None, feeds)
            times[turn, form] = 1e3 * (time.process_time() - started)
    times = times[1:]  # the first turn warms up
    saved = {name: median_with_bounds(100 * (1 - times[:, 0] / times[:, n])) for n, name in enumerate(FORMS) if n}
    return {**dict(zip(FORMS, np.median(times, axis=0).round(4).tolist(), strict=True)), "saved_percent": saved}


def median_with_bounds(values: np.ndarray) -> list[float]:
    """Lower bound, median and upper bound of the median's 95 % interval (order statistics, normal approximation)."""
    half = 0.98 * len(values) ** 0.5
    ranks = np.clip([len(values) / 2 - half, (len(values) - 1) / 2, len(values) / 2 + half - 1], 0, len(values) - 1)
    return [round(float(value), 2) for value in np.interp(ranks, np.arange(len(values)), np.sort(values))]


if __name__ == "__main__":
    main()
