"""Measure the honest noise that the table of tolerances is made of: ``python benchmarks/tolerances.py --help``.

fp32 is ONNX Runtime against PyTorch, on a bundle. fp16 and bf16 are PyTorch in that type against PyTorch in fp32 on the
CPU: a stand-in for runtimes that this machine cannot run, with the weights rounded as theirs are and each operator's
result rounded once; kernels that add up in the low type are noisier. Every sample is kept.

int8 and int4 are ONNX Runtime again, on bundles of these types, twice. What is judged against PyTorch in fp32 leaves
the worst percent out (`validation.judging.tolerances.OUTLIERS`), so the figures are those of whole validations, with as
many seeds as asked for. And, in a record of its own, without rounding of activations against PyTorch with the same
rounded weights: there fp32's limits hold.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.serving.loading import cache_kinds
from engines.serving.session import Session
from engines.serving.text import TextCodec
from iapt_export.contract.graphs import step_graphs
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.interface import COEFFICIENTS
from iapt_export.graphs.quantise import QUANTISED
from trainers.decoder.backbone import load_backbone
from trainers.decoder.method import rows_of
from validation.judging.compare import Settings, compare_target, measure_truth
from validation.judging.metrics import cosine, kl, quantiles, relative, worst_vector
from validation.locating.scene import own_entries
from validation.sides.cases import prompts_from_bundle
from validation.sides.recording import leaf_modules, record_row
from validation.sides.reference import Reference, numpy
from validation.sides.rounding import unrounded_session, with_rounded_weights
from validation.sides.stepping import Row, graph_of, is_in_place, run_steps, session_with
from validation.sides.taps import TappedGraph, TappedRunner
from validation.sides.truth import padded, record_truth
from validation.validate import environment

Arrays = dict[str, np.ndarray]
KEYS = ("bundle", "row", "step", "seed", "case")
"""What tells samples apart."""
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    """Measure one type and write its samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="+", help="one bundle; several of the type for int8 and int4")
    parser.add_argument("--dtype", choices=("fp32", *TYPES, *QUANTISED), required=True)
    parser.add_argument("--model", help="where the bundle's backbone is now")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="whole validations of each bundle, int8 and int4 only")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tolerances"))
    args = parser.parse_args()
    if len(args.bundle) > 1 and args.dtype not in QUANTISED:
        parser.error("several bundles are for int8 and int4")
    is_quantised = args.dtype in QUANTISED
    samples: dict[str, list[dict[str, Any]]] = {}
    judged: dict[str, list[dict[str, Any]]] = {}
    manifests = {bundle: BundleManifest.load(bundle) for bundle in args.bundle}
    for bundle, manifest in manifests.items():
        reference = Reference(bundle, manifest, load_backbone(args.model or manifest.backbone.name_or_path))
        name = f"{bundle.resolve().parent.name}/{bundle.name}"
        print(f"{args.dtype}: {name}", flush=True)
        for seed in range(args.seeds if is_quantised else 0):
            for stage, found in judge_bundle(bundle, manifest, reference, seed).items():
                judged.setdefault(stage, []).extend({"bundle": name, **one} for one in found)
        session = Session.open(bundle, verify=False, in_place=is_quantised)
        if is_quantised:
            reference, session = with_rounded_weights(reference, QUANTISED[args.dtype]), unrounded_session(session)
        for stage, found in sample_bundle(session, reference, args).items():
            samples.setdefault(stage, []).extend({"bundle": name, **one} for one in found)
    if judged:
        write_record(args, args.dtype, judged)
    write_record(args, f"{args.dtype}-unrounded" if is_quantised else args.dtype, samples)


def write_record(args: argparse.Namespace, name: str, samples: dict[str, list[dict[str, Any]]]) -> None:
    """Write samples with what they sum up to, and print the latter."""
    record = {
        "dtype": args.dtype,
        "made by": f"PyTorch in {args.dtype}, a stand-in" if args.dtype in TYPES else "onnxruntime",
        "backbone": "SmolLM2-135M-Instruct",
        "environment": environment("cpu"),
        "summary": {stage: worst(found) for stage, found in samples.items()},
        "samples": samples,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["summary"], indent=1), path, sep="\n")


def sample_bundle(session: Session, reference: Reference, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The figures of each stage at each step of the bundle's example prompts."""
    bundle, manifest = session.bundle, session.manifest
    prompts = prompts_from_bundle(bundle, manifest, TextCodec(bundle), 0, args.steps, args.prompts)
    truths = record_truth(reference, prompts, new_tokens=args.steps, num_kept=0)
    rows = [Row(truth.prompt.tenant, truth.prompt.tokens, tuple(truth.tokens[:-1])) for truth in truths]
    other = reference if args.dtype not in TYPES else lowered(reference, TYPES[args.dtype])
    samples: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        print(f"{args.dtype}: prompt {number + 1} of {len(rows)}, {len(row.tokens)} tokens", flush=True)
        runs = from_session(session, reference, row) if other is reference else from_torch(other, row)
        for (step, wanted), made in zip(record_row(reference, row, args.steps - 1), runs, strict=True):
            for stage, figures in sample(reference, row.tenant, made, wanted, step).items():
                samples.setdefault(stage, []).append({"row": number, "step": step, **figures})
        if other is not reference:
            samples.setdefault("generator", []).append({"row": number, **generator_sample(reference, other, row)})
    return samples


def judge_bundle(
    bundle: Path, manifest: BundleManifest, reference: Reference, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """What a whole validation with this seed holds against the table, by stage."""
    settings = Settings(seed=seed, depth="full")
    truths = measure_truth(bundle, manifest, reference, settings, lambda text: None)
    found: dict[str, list[dict[str, Any]]] = {}
    for in_place in cache_kinds(manifest.target(), "cpu"):
        with Session.open(bundle, verify=False, in_place=in_place) as session:
            result = compare_target(session, reference, truths, settings, lambda text: print(text, flush=True))
        for check in result.checks:
            figures = {name: check.measured[name] for name in check.limits}
            found.setdefault(check.stage, []).append({"seed": seed, "case": check.case, **figures})
    return {stage: rows for stage, rows in found.items() if stage not in ("refusal", "greedy tokens")}


def lowered(reference: Reference, dtype: torch.dtype) -> Reference:
    """The reference with backbone and adapters in a lower type; the activation's coefficients stay fp32."""
    other = copy.copy(reference)
    other.model = load_backbone(
        reference.model.config._name_or_path, dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    ).model
    other.methods = copy.deepcopy(reference.methods)
    for method in other.methods.values():
        for name, parameter in method.named_parameters():
            if name not in COEFFICIENTS:
                parameter.data = parameter.data.to(dtype)
    return other


def from_torch(other: Reference, row: Row) -> Iterator[Arrays]:
    """What PyTorch's modules compute, step by step."""
    for _, arrays in record_row(other, row, len(row.forced)):
        yield arrays


def from_session(session: Session, reference: Reference, row: Row) -> Iterator[Arrays]:
    """What ONNX Runtime's graphs compute under the same names, the row beside a longer one of the same tenant."""
    bundle, manifest, target, in_place = session.bundle, session.manifest, session.target, is_in_place(session)
    graphs = {
        name: TappedGraph(bundle / target.graphs[name].path) for name in step_graphs(target.graphs, in_place=in_place)
    }
    runners: Any = {
        name: TappedRunner(
            bundle / target.graphs[name].path,
            target.graphs[name],
            graph,
            graph.taps(leaf_modules(reference.model)),
        )
        for name, graph in graphs.items()
    }
    longer = Row(row.tenant, (*row.tokens, *row.tokens[-7:]), row.forced)
    with session_with(bundle, manifest, target, {**session.stepper.runners, **runners}, in_place) as tapped:
        for step in run_steps(tapped, [row, longer], len(row.forced) + 1):
            seen = {**runners[graph_of(graphs, step.number, in_place)].seen, **step.present()}
            arrays = {name: own_entries(array[0], step, 0) for name, array in seen.items()}
            yield arrays | {"logits": step.logits[0]}


@torch.no_grad()
def sample(reference: Reference, tenant: str, made: Arrays, wanted: Arrays, step: int) -> dict[str, dict[str, float]]:
    """The figures of one row at one step; modules that the tenant's method changes are not held against their own."""
    logits = {
        "relative": relative(made["logits"], wanted["logits"]),
        "kl": kl(made["logits"], wanted["logits"]),
        "cosine": cosine(made["logits"], wanted["logits"]),
        "agreed": float(made["logits"].argmax() == wanted["logits"].argmax()),
        **quantiles(made["logits"], wanted["logits"]),
    }
    shared = [name for name in wanted if name in made and made[name].shape == wanted[name].shape]
    cache = [relative(made[name], wanted[name]) for name in shared if name.startswith("present.")]
    hidden = [worst_vector(made[name], wanted[name])[0] for name in shared if "." in name and "present." not in name]
    modules, changed = [], tuple(f".{name}" for name in rows_of(reference.methods[tenant]).linear_names)
    for path in leaf_modules(reference.model):
        fed, output = made.get(f"{path}.input"), made.get(f"{path}.output")
        if fed is None or output is None or path.endswith(("lm_head", "rotary_emb", *changed)):
            continue
        right = numpy(reference.model.get_submodule(path)(torch.from_numpy(fed)[None])[0])
        modules.append(worst_vector(output, right)[0])
    part = "decode" if step else "prefill"
    return {
        f"{part} logits": logits,
        f"{part} cache": {"relative": max(cache)},
        "hidden states": {"relative": max(hidden)},
        "module": {"relative": max(modules)},
    }


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


def worst(found: list[dict[str, Any]]) -> dict[str, float]:
    """The median, the 99th percentile and the worst of each figure, and how many samples there are."""
    figures: dict[str, float] = {"samples": len(found)}
    for name in found[0]:
        if name not in KEYS:
            values = np.array([one[name] for one in found])
            is_floor = name in ("cosine", "agreed", "agreement")
            figures |= {
                f"{name} median": float(np.median(values)),
                f"{name} p99": float(np.quantile(values, 0.01 if is_floor else 0.99)),
                f"{name} worst": float(values.min() if is_floor else values.max()),
            }
            if name == "agreed":
                figures["agreed share"] = float(values.mean())
    return figures


if __name__ == "__main__":
    main()
