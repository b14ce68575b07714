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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from engines.native import KERNEL, add_kernels
from engines.serving.tenants import TenantBank
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION, RATIONAL
from iapt_export.graphs.ops.rational_op import rational_function
from trainers.methods.rational import initial_coefficients

FORMS = ("kernel", "body", "body unfused")
ELEMENTS = (1024, 65536, 4194304)


def main() -> None:
    """Time the operator and the prefill; print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle with an IAPT tenant and the target onnxruntime")
    parser.add_argument("--repeat", type=int, default=30, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", nargs="+", default=["1x16", "1x64", "4x64"], help="ROWSxTOKENS of the prefills")
    arguments = parser.parse_args()
    source = np.random.default_rng(0)
    a, b = (array.astype(np.float32) for array in initial_coefficients("gelu", 5, 4, "B"))
    inputs = {n: {"x": source.normal(size=(n // 256, 256)).astype(np.float32), "a": a, "b": b} for n in ELEMENTS}
    manifest = BundleManifest.load(arguments.bundle)
    graph = str(arguments.bundle / manifest.target("onnxruntime").graphs["prefill"].path)
    sizes = {batch: map(int, batch.split("x")) for batch in arguments.batches}
    batches = {batch: prefill_inputs(arguments.bundle, manifest, *size) for batch, size in sizes.items()}
    found = {
        "threads": arguments.threads,
        "operator_ms": take_turns(operator_model(), inputs, arguments.repeat, arguments.threads),
        "prefill_ms": take_turns(graph, batches, arguments.repeat, arguments.threads),
    }
    print(json.dumps(found, indent=2))


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


def prefill_inputs(bundle: Path, manifest: BundleManifest, rows: int, length: int) -> dict[str, np.ndarray]:
    """What prefill reads: arbitrary tokens without padding, of the first tenant."""
    target = manifest.target("onnxruntime")
    feeds: dict[str, np.ndarray] = dict(TenantBank(bundle, manifest, target).stacks)
    for tensor in target.graphs["prefill"].inputs:
        feeds.setdefault(tensor.name, np.zeros(rows, np.int64))  # indices of tenants
    vocabulary = manifest.backbone.vocab_size
    feeds["input_ids"] = np.random.default_rng(0).integers(10, vocabulary, (rows, length))
    feeds["attention_mask"] = np.ones((rows, length), np.int64)
    return {tensor.name: feeds[tensor.name] for tensor in target.graphs["prefill"].inputs}


def open_session(source: bytes | str, form: str, threads: int) -> Any:
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


def take_turns(source: bytes | str, inputs: Mapping[Any, Any], repeat: int, threads: int) -> dict[str, dict[str, Any]]:
    """Time a graph in each form ``repeat`` times, in turns that each begin with another form.

    Returns:
        For each of the inputs every form's median time in ms and, under ``saved_percent``, what the kernel saves
        against each other form: see `median_with_bounds`.
    """
    sessions = [open_session(source, form, threads) for form in FORMS]
    found: dict[str, dict[str, Any]] = {}
    for name, feeds in inputs.items():
        times = np.zeros((repeat + 1, len(FORMS)))
        for turn in range(repeat + 1):
            for place in range(len(FORMS)):
                form = (turn + place) % len(FORMS)
                started = time.process_time()
                sessions[form].run(None, feeds)
                times[turn, form] = 1e3 * (time.process_time() - started)
        times = times[1:]  # the first turn warms up
        saved = {form: median_with_bounds(100 * (1 - times[:, 0] / times[:, FORMS.index(form)])) for form in FORMS[1:]}
        medians = dict(zip(FORMS, np.round(np.median(times, axis=0), 4).tolist(), strict=True))
        found[str(name)] = {**medians, "saved_percent": saved}
    return found


def median_with_bounds(values: np.ndarray) -> list[float]:
    """Lower bound, median and upper bound of the median's 95 % interval (order statistics, normal approximation)."""
    half = 0.98 * len(values) ** 0.5
    ranks = np.clip([len(values) / 2 - half, (len(values) - 1) / 2, len(values) / 2 + half - 1], 0, len(values) - 1)
    return [round(float(value), 2) for value in np.interp(ranks, np.arange(len(values)), np.sort(values))]


if __name__ == "__main__":
    main()
