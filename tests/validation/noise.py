"""Measure the honest noise that the table of tolerances is made of: ``python -m tests.validation.noise --help``.

fp32, int8 and int4 are ONNX Runtime against PyTorch in fp32: whole validations of bundles, and each stage at each step
of the bundles' example prompts. For int8 and int4 the latter runs without rounding of activations, against PyTorch with
the same rounded weights: there fp32's limits hold. fp16 and bf16 are PyTorch in that type against PyTorch in fp32 on
the CPU: a stand-in for runtimes that this machine cannot run, with the weights rounded as theirs are and each
operator's result rounded once; kernels that add up in the low type are noisier.

fp8 and nvfp4 are the graphs of TensorRT's engines in ONNX Runtime, without rounding of activations, against PyTorch in
fp32: whole validations alone.

A record has a stage's median and worst of each figure.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from engines.serving.loading import cache_kinds
from engines.serving.session import Session
from engines.serving.text import TextCodec
from iapt_export.contract.graphs import step_graphs
from iapt_export.contract.low_bits import DEQUANTISED, QUANTISED
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.interface import COEFFICIENTS
from trainers.decoder.backbone import load_backbone
from trainers.decoder.method import rows_of
from validation.judging.compare import Settings, compare_target, measure_truth
from validation.judging.metrics import kl, relative, worst_vector
from validation.locating.scene import own_entries
from validation.sides.cases import prompts_from_bundle
from validation.sides.engine_graphs import graph_runners
from validation.sides.recording import leaf_modules, record_row
from validation.sides.reference import Reference, numpy
from validation.sides.rounding import unrounded_session, with_rounded_weights
from validation.sides.stepping import Row, graph_of, run_steps, session_with
from validation.sides.taps import TappedGraph, TappedRunner
from validation.sides.truth import padded, record_truth
from validation.validate import environment

Arrays = dict[str, np.ndarray]
Samples = Iterable[tuple[str, dict[str, float]]]
"""A stage and its figures, over and over."""
FLOATS = tuple(dtype for dtype in DEQUANTISED if dtype not in QUANTISED)
"""Types of weights that TensorRT alone has; for the others its limits are those of ONNX Runtime, which rounds more."""
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
METRICS = ("relative", "kl", "agreement")


def main(words: list[str] | None = None) -> None:
    """Measure one type and write its records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="whose target has the type")
    parser.add_argument("--dtype", choices=("fp32", *TYPES, *QUANTISED, *FLOATS), required=True)
    parser.add_argument("--model", help="where the bundles' backbone is now")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="whole validations of each bundle")
    parser.add_argument("--depth", choices=("quick", "standard", "full"), default="full", help="of the validations")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tolerances"))
    args = parser.parse_args(words)
    cases, steps = ("", "-unrounded") if args.dtype in (*QUANTISED, *FLOATS) else ("-cases", "")
    judged: list[Any] = []
    sampled: list[Any] = []
    for bundle in args.bundles:
        manifest = BundleManifest.load(bundle)
        reference = Reference(bundle, manifest, load_backbone(args.model or manifest.backbone.name_or_path))
        if args.dtype not in TYPES:
            for seed in range(args.seeds):
                judged += judge_bundle(bundle, manifest, reference, seed, args.depth)
        if args.dtype not in FLOATS:
            sampled += sample_bundle(bundle, manifest, reference, args)
    if judged:
        write_record(args, cases, judged)
    if sampled:
        write_record(args, steps, sampled)


def write_record(args: argparse.Namespace, suffix: str, samples: Samples) -> None:
    """Write what samples come to."""
    record = {
        "dtype": args.dtype,
        "made_by": f"PyTorch in {args.dtype}, a stand-in" if args.dtype in TYPES else "onnxruntime",
        "bundles": sorted(f"{bundle.resolve().parent.name}/{bundle.name}" for bundle in args.bundles),
        "seeds": args.seeds,
        "environment": environment("cpu"),
        "stages": summarised(samples),
    }
    path = args.output / f"{args.dtype}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def summarised(samples: Samples) -> dict[str, dict[str, Any]]:
    """Each stage's number of samples, and the median and worst of each figure; of an agreement its mean and worst."""
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for stage, found in samples:
        for name in found.keys() & METRICS:
            figures[stage][name].append(float(found[name]))
    stages: dict[str, dict[str, Any]] = {}
    for stage, metrics in figures.items():
        stages[stage] = {"samples": max(map(len, metrics.values()))}
        for name, values in metrics.items():
            middle = {"mean": fmean(values)} if name == "agreement" else {"median": median(values)}
            middle["worst"] = min(values) if name == "agreement" else max(values)
            stages[stage][name] = {key: float(f"{value:.6g}") for key, value in middle.items()}
    return stages


def judge_bundle(bundle: Path, manifest: BundleManifest, reference: Reference, seed: int, depth: str) -> Samples:
    """What a whole validation with this seed holds against the table."""
    settings = Settings(seed=seed, depth=depth)
    truths = measure_truth(bundle, manifest, reference, settings, lambda text: None)
    target = manifest.target()
    for in_place in cache_kinds(target):
        if target.dtype in FLOATS:
            opened = session_with(bundle, manifest, target, graph_runners(bundle, target), in_place)
        else:
            opened = Session.open(bundle, verify=False, allow_unproven=True, in_place=in_place)
        with opened as session:
            result = compare_target(session, reference, truths, settings, lambda text: print(text, flush=True))
        for check in result.checks:
            yield check.stage, {name: check.measured[name] for name in check.limits}


def sample_bundle(bundle: Path, manifest: BundleManifest, reference: Reference, args: argparse.Namespace) -> Samples:
    """The figures of each stage at each step of the bundle's example prompts."""
    session = Session.open(bundle, verify=False, allow_unproven=True, in_place=args.dtype in QUANTISED)
    if args.dtype in QUANTISED:
        reference, session = with_rounded_weights(reference, QUANTISED[args.dtype]), unrounded_session(session)
    prompts = prompts_from_bundle(bundle, manifest, TextCodec(bundle), 0, args.steps, args.prompts)
    truths = record_truth(reference, prompts, new_tokens=args.steps, num_kept=0)
    other = lowered(reference, args.dtype) if args.dtype in TYPES else None
    for number, truth in enumerate(truths, start=1):
        row = Row(truth.prompt.tenant, truth.prompt.tokens, tuple(truth.tokens[:-1]))
        print(f"{args.dtype}: prompt {number} of {len(truths)}, {len(row.tokens)} tokens", flush=True)
        if other is not None:
            yield "generator", generator_sample(reference, other, row)
            runs: Iterator[Arrays] = (arrays for _, arrays in record_row(other, row, len(row.forced)))
        else:
            runs = from_session(session, reference, row)
        for (step, wanted), made in zip(record_row(reference, row, args.steps - 1), runs, strict=True):
            yield from sample(reference, row.tenant, made, wanted, step)


def lowered(reference: Reference, dtype: str) -> Reference:
    """The reference with backbone and adapters in a lower type; the activation's coefficients stay fp32."""
    other = copy.copy(reference)
    other.model = load_backbone(reference.model.config._name_or_path, dtype=dtype).model
    other.methods = copy.deepcopy(reference.methods)
    for method in other.methods.values():
        for name, parameter in method.named_parameters():
            if name not in COEFFICIENTS:
                parameter.data = parameter.data.to(TYPES[dtype])
    return other


def from_session(session: Session, reference: Reference, row: Row) -> Iterator[Arrays]:
    """What ONNX Runtime's graphs compute under PyTorch's names, the row beside a longer one of the same tenant."""
    bundle, target, in_place = session.bundle, session.target, session.stepper.in_place
    runners: dict[str, Any] = {}
    for name in step_graphs(target.graphs, in_place=in_place):
        path = bundle / target.graphs[name].path
        graph = TappedGraph(path)
        runners[name] = TappedRunner(path, target.graphs[name], graph, graph.taps(leaf_modules(reference.model)))
    longer = Row(row.tenant, (*row.tokens, *row.tokens[-7:]), row.forced)
    with session_with(bundle, session.manifest, target, {**session.stepper.runners, **runners}, in_place) as tapped:
        for step in run_steps(tapped, [row, longer], len(row.forced) + 1):
            seen = {**runners[graph_of(runners, step.number, in_place)].seen, **step.present()}
            yield {name: own_entries(array[0], step, 0) for name, array in seen.items()} | {"logits": step.logits[0]}


@torch.no_grad()
def sample(reference: Reference, tenant: str, made: Arrays, wanted: Arrays, step: int) -> Samples:
    """The figures of one row at one step; modules that the tenant's method changes are not held against their own."""
    part, (logits, right) = "decode" if step else "prefill", (made["logits"], wanted["logits"])
    shared = [name for name in wanted if name in made and made[name].shape == wanted[name].shape]
    cache = [relative(made[name], wanted[name]) for name in shared if name.startswith("present.")]
    hidden = [worst_vector(made[name], wanted[name])[0] for name in shared if "." in name and "present." not in name]
    modules, changed = [], tuple(f".{name}" for name in rows_of(reference.methods[tenant]).linear_names)
    for path in leaf_modules(reference.model):
        fed, output = made.get(f"{path}.input"), made.get(f"{path}.output")
        if fed is None or output is None or path.endswith(("lm_head", "rotary_emb", *changed)):
            continue
        alone = numpy(reference.model.get_submodule(path)(torch.from_numpy(fed)[None])[0])
        modules.append(worst_vector(output, alone)[0])
    yield f"{part} logits", {"relative": relative(logits, right), "kl": kl(logits, right)}
    yield "top-1 agreement", {"agreement": float(logits.argmax() == right.argmax())}
    yield f"{part} cache", {"relative": max(cache)}
    yield "hidden states", {"relative": max(hidden)}
    yield "module", {"relative": max(modules)}


@torch.no_grad()
def generator_sample(reference: Reference, other: Reference, row: Row) -> dict[str, float]:
    """The prompts that generators in the lower type make of the same hidden states."""
    ids, mask = padded([row.tokens], 0)
    prompts, hidden = reference.prompts_and_hidden(row.tenant, ids, mask)
    method = other.methods[row.tenant]
    dtype = next(parameter.dtype for name, parameter in method.named_parameters() if name not in COEFFICIENTS)
    errors = []
    for layer in range(prompts.shape[1]):
        empty = torch.zeros(1, method.num_slots, hidden.shape[-1], dtype=dtype)
        made = method.slots(method.weights(), layer, empty, hidden[:, layer].to(dtype), mask)
        errors.append(relative(numpy(made), numpy(prompts[:, layer])))
    return {"relative": max(errors)}


if __name__ == "__main__":
    main()
