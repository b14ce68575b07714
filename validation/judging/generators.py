"""Hold the graph of IAPT's generators against the trained generators, and find out where it is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engines.runner import Arrays
from engines.serving.session import Session
from iapt_export.contract.graphs import GENERATOR
from trainers.decoder.insertion import layers_path
from trainers.decoder.method import Method
from validation.judging.metrics import cosine, max_abs, relative
from validation.judging.result import Bisection, Finding
from validation.judging.stages import Errors
from validation.judging.tolerances import tolerance
from validation.sides.recording import OTHER_INPUT, altered
from validation.sides.reference import Reference, numpy
from validation.sides.truth import Truth, padded


@dataclass
class _Run:
    """What the generator graph read and made, and what it should have."""

    rows: list[Truth]
    hidden: np.ndarray
    """``[B, L, T, D]``, padded on the left."""
    made: np.ndarray
    """``[B, L, P, D]``."""
    expected: np.ndarray


def compare_generator(session: Session, reference: Reference, rows: list[Truth], errors: Errors) -> None:
    """Feed the generator graph what the reference's generators read, rows of different tenants in one batch."""
    length = max(len(row.prompt.tokens) for row in rows)
    backbone = session.manifest.backbone
    hidden = np.zeros((len(rows), backbone.num_layers, length, backbone.hidden_size), np.float32)
    wanted = []
    mask = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        ids, ones = padded([row.prompt.tokens], 0)
        prompts, states = reference.prompts_and_hidden(row.prompt.tenant, ids, ones)
        hidden[index, :, length - ids.shape[1] :] = numpy(states[0])
        mask[index, length - ids.shape[1] :] = 1
        wanted.append(numpy(prompts[0]))
    bank = session.stepper.bank
    feeds: Arrays = {**bank.stacks, **bank.indices([bank.get(row.prompt.tenant) for row in rows])}
    dtype = next(array.dtype for name, array in feeds.items() if name.endswith(".down_weight"))
    feeds |= {"hidden_states": hidden.astype(dtype), "attention_mask": mask}
    with session.stepper.runners[GENERATOR] as runner:
        actual = runner.infer({t.name: feeds[t.name] for t in runner.spec.inputs})["prompts"].astype(np.float32)
    expected: np.ndarray = np.zeros_like(actual)
    for index, array in enumerate(wanted):  # shorter prompts stand at the end, before the instruction
        expected[index, :, -array.shape[1] :] = array
    by_layer = [relative(actual[:, layer], expected[:, layer]) for layer in range(actual.shape[1])]
    errors.layers("prompt", by_layer)
    worst = int(np.argmax(by_layer))
    measured = {"relative": by_layer[worst], "max_abs": max_abs(actual, expected), "cosine": cosine(actual, expected)}
    case = f"batch {len(rows)}, one row a tenant"
    errors.feed(row.prompt.tenant for row in rows)
    errors.judge("generator", case, session.target.dtype, measured, f"worst in layer {worst}")
    if not errors.checks[-1].passed:
        errors.bisection = _bisection(reference, case, _Run(rows, hidden, actual, expected), session.target.dtype)


def _bisection(reference: Reference, case: str, run: _Run, dtype: str) -> Bisection:
    """The first layer whose prompts differ, and which mistake of PyTorch gives them."""
    limit = tolerance("generator", dtype)
    assert limit is not None
    prefix = layers_path(reference.model)
    errors: list[tuple[str, int | None, float]] = []
    finding = None
    for layer in range(run.made.shape[1]):
        by_row = [relative(run.made[row, layer], run.expected[row, layer]) for row in range(len(run.rows))]
        row = int(np.argmax(by_row))
        errors.append((f"{prefix}.{layer}.prompt", layer, by_row[row]))
        if finding is None and by_row[row] > limit.limit:
            source, evidence = _source(reference, run, row, layer, limit.limit)
            finding = Finding(
                step=0,
                graph=GENERATOR,
                tensor=f"{prefix}.{layer}.prompt",
                layer=layer,
                part="prompt slots",
                operators=[],
                module=f"{prefix}.{layer}",
                row=row,
                tenant=run.rows[row].prompt.tenant,
                source=source,
                evidence=evidence,
                error=by_row[row],
                limit=limit.limit,
            )
    return Bisection(case, finding, errors, 1)


def _source(reference: Reference, run: _Run, row: int, layer: int, limit: float) -> tuple[str, str]:
    """Which other tenant or form makes the graph's prompts of the same hidden states."""
    truth = run.rows[row]
    row_method = reference.methods[truth.prompt.tenant]
    states = torch.from_numpy(run.hidden[row, layer, -len(truth.prompt.tokens) :])[None]
    tried: list[tuple[str, str, Method]] = [
        ("tenant", f"row {row} computes tenant {name}'s in place of {truth.prompt.tenant}'s", method)
        for name, method in reference.methods.items()
        if method is not row_method and type(method) is type(row_method)
    ]
    tried += [
        ("activation", f"the rational activation is evaluated in form {form}", altered(row_method, form))
        for form in "AB"
    ]
    tried.append(("normalisation", OTHER_INPUT, altered(row_method, normalised_otherwise=True)))
    for kind, says, method in tried:
        if method.num_slots != row_method.num_slots:
            continue
        with torch.no_grad():
            empty = states.new_zeros(1, method.num_slots, states.shape[-1])
            prompts = method.slots(method.weights(), layer, empty, states, states.new_ones(1, states.shape[1]))
        if relative(run.made[row, layer, -method.num_slots :], numpy(prompts[0])) <= limit:
            return kind, says
    return "prompt", "no other tenant, form of the activation or normalisation gives this prompt"
