"""Find the first tensor of a target that differs from PyTorch's, and say where it is made and what went wrong.

The target runs a copy of its graphs that gives out what modules read and make (`validation.sides.taps`); PyTorch runs
each row alone and records the same (`validation.sides.recording`). Tensors are compared in the order in which the graph
makes them, step by step. A module is also held against PyTorch's on the target's own input, so that noise which built
up over layers is told apart from the place where something is wrong. `validation.locating.sources` then asks why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engines.serving.session import Session
from iapt_export.contract.graphs import PAST, PRESENT, step_graphs
from trainers.decoder.insertion import layers_path
from trainers.decoder.method import rows_of
from validation.judging.metrics import worst_vector
from validation.judging.result import Bisection, Finding
from validation.judging.tolerances import tolerance
from validation.locating.scene import Arrays, Scene, Suspect, own_entries
from validation.locating.sources import source_of
from validation.sides.recording import leaf_modules, record_row
from validation.sides.reference import BACKBONE, Reference, numpy
from validation.sides.stepping import Row, graph_of, run_steps, session_with
from validation.sides.taps import Tap, TappedGraph, TappedRunner, layer_of

OnStep = Callable[[str], None]
JUMP, JUMP_FLOOR = 20.0, 1e-6
"""Where no tensor is beyond its limit, one whose error is so many times the largest before it is looked into."""


def bisect_target(
    session: Session,
    reference: Reference,
    rows: Sequence[Row],
    *,
    case: str = "",
    is_wrong: bool = True,
    device: str = "cpu",
    on_step: OnStep = lambda _: None,
) -> Bisection:
    """Find the first wrong tensor of an ONNX Runtime target.

    Args:
        session: on the target, with the kind of cache that failed; it may be closed.
        reference: the PyTorch side.
        rows: the batch that failed; steps go on as far as the shortest row's forced tokens reach.
        case: its name.
        is_wrong: a check failed, so that a tensor within the limits is named too when errors jump there.
        device: ``cpu`` or ``cuda``.
        on_step: called with a word on each step, for progress.
    """
    bundle, target, in_place = session.bundle, session.target, session.stepper.in_place
    leaves = leaf_modules(reference.model)
    graphs = {
        name: TappedGraph(bundle / target.graphs[name].path) for name in step_graphs(target.graphs, in_place=in_place)
    }
    known = set(leaves)
    if not any(graph.module(place) in known for graph in graphs.values() for place in range(len(graph.nodes))):
        return Bisection(case, note="the graphs' nodes do not name their modules; build the bundle again to bisect it")
    taps = {name: graph.taps(leaves) for name, graph in graphs.items()}
    runners = {
        name: TappedRunner(bundle / target.graphs[name].path, target.graphs[name], graph, taps[name], device)
        for name, graph in graphs.items()
    }
    limits = {stage: row.limit for stage in ("hidden states", "module") if (row := tolerance(stage, target.dtype))}
    scene = Scene(reference, rows, target.dtype, graphs, taps, leaves, in_place, limits=limits)
    num_steps = min(len(row.forced) for row in rows) + 1
    errors: list[tuple[str, int | None, float]] = []
    jump: Finding | None = None
    with session_with(bundle, reference.manifest, target, {**session.stepper.runners, **runners}, in_place) as tapped:
        recordings = [record_row(reference, row, num_steps - 1) for row in rows]
        before: list[Arrays] = []
        for step in run_steps(tapped, rows, num_steps):
            on_step(f"{target.name}: bisecting {case}, step {step.number}")
            wanted = [next(recording)[1] for recording in recordings]
            scene.step = step
            seen = {**runners[graph_of(graphs, step.number, in_place)].seen, **step.present()}
            suspects, errors = _compare_step(scene, seen, wanted, before)
            if suspects and (suspects[0].is_beyond or (is_wrong and jump is None)):
                origin = _origin(scene, suspects) if is_wrong else suspects[0]
                on_step(f"{target.name}: {origin.tap.name} differs at step {step.number}, asking why")
                jump = _finding(scene, origin, seen)
                if suspects[0].is_beyond:
                    return Bisection(case, jump, errors, step.number + 1)
            before = wanted
    if jump is not None:
        return Bisection(case, jump, errors, num_steps, "no tensor is beyond its limit; this is where errors jump")
    if not is_wrong:
        return Bisection(
            case, None, errors, num_steps, "nothing differs in these steps: every tensor is within its limit"
        )
    note = "every tensor agrees while the graphs give them out; see docs/validation.md for what that can mean"
    return Bisection(case, None, errors, num_steps, note)


def _compare_step(
    scene: Scene, seen: Arrays, wanted: list[Arrays], before: list[Arrays]
) -> tuple[list[Suspect], list[tuple[str, int | None, float]]]:
    """The first tensor at which a step's errors jump, the first beyond its limit, and the error of every tensor."""
    assert scene.step is not None
    number = scene.step.number
    for row, arrays in enumerate(before):  # what the step reads of the cache is what the step before left
        cache = {name: array for name, array in arrays.items() if name.startswith(PRESENT)}
        wanted[row] |= {name.replace(PRESENT, PAST, 1): array for name, array in cache.items()}
    inputs = [Tap(name, name, -1) for name in seen if name.startswith(PAST)]
    first: dict[bool, Suspect] = {}
    errors: list[tuple[str, int | None, float]] = []
    prefix = layers_path(scene.reference.model)
    done: set[str] = set()
    for tap in [*inputs, *scene.taps[graph_of(scene.graphs, number, scene.in_place)]]:
        if tap.value in done or any(tap.name not in row for row in wanted):
            continue
        actual = [own_entries(seen[tap.name][row], scene.step, row) for row in range(len(scene.rows))]
        expected = [row[tap.name] for row in wanted]
        if [array.shape for array in actual] != [array.shape for array in expected]:
            continue  # the graph lays it out in another way
        done.add(tap.value)
        by_row = [worst_vector(*pair) for pair in zip(actual, expected, strict=True)]
        worst = int(np.argmax([error for error, _ in by_row]))
        error, where = by_row[worst]
        so_far = max((known for *_, known in errors), default=0.0)
        errors.append((tap.name, layer_of(tap.name, prefix), error))
        if True in first:
            continue
        module_error, limit = _own_error(scene, tap, seen, worst), scene.limits["hidden states"]
        is_beyond = error > limit or (module_error is not None and module_error > scene.limits["module"])
        if is_beyond or (False not in first and error > JUMP * max(so_far, JUMP_FLOOR)):
            part = _part(scene, tap.name, worst, where, expected[worst].shape)
            allowed = limit if is_beyond else JUMP * max(so_far, JUMP_FLOOR)
            first[is_beyond] = Suspect(
                number, tap, worst, part, error, allowed, module_error, actual, expected, is_beyond
            )
    return [first[kind] for kind in (True, False) if kind in first], errors


def _origin(scene: Scene, suspects: list[Suspect]) -> Suspect:
    """Where it begins: at a jump before the first tensor beyond its limit, unless the latter's own module is wrong."""
    beyond, earlier = suspects[0], suspects[-1]
    wrong_alone = beyond.own_error is not None and beyond.own_error > scene.limits["module"]
    return beyond if wrong_alone else earlier


@torch.no_grad()
def _own_error(scene: Scene, tap: Tap, seen: Arrays, row: int) -> float | None:
    """Error of a module's output against PyTorch's module on the same input; None where that cannot be asked."""
    path, _, end = tap.name.rpartition(".")
    method = scene.reference.methods[scene.rows[row].tenant]
    changed = rows_of(method).linear_names
    if end != "output" or f"{path}.input" not in seen or any(path.endswith(f".{name}") for name in changed):
        return None
    assert scene.step is not None
    fed = own_entries(seen[f"{path}.input"][row], scene.step, row)
    actual = own_entries(seen[tap.name][row], scene.step, row)
    try:
        wanted = numpy(scene.reference.model.get_submodule(path)(torch.from_numpy(fed)[None])[0])
    except TypeError:  # experts take what their router chose, besides
        return None
    return worst_vector(actual, wanted)[0] if actual.shape == wanted.shape else None


def _part(scene: Scene, name: str, row: int, where: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Which entries of a row the worst vector belongs to."""
    if name.endswith((".pooled", ".activated")):
        return "prompt slots"
    if len(shape) < 2 or not where:
        return "logits"
    entry, entries = where[-1], shape[-2]
    assert scene.step is not None
    if scene.step.number:
        return "newest entry" if entry == entries - 1 else "older entries"
    whole = entries == scene.slots(row) + len(scene.rows[row].tokens)
    return "prompt slots" if whole and entry < scene.slots(row) else "tokens"


def _finding(scene: Scene, suspect: Suspect, seen: Arrays) -> Finding:
    graph_name = graph_of(scene.graphs, suspect.step, scene.in_place)
    graph = scene.graphs[graph_name]
    known = {tap.value for tap in scene.taps[graph_name] if tap.place < suspect.tap.place}
    places = graph.operators_between(suspect.tap, known)
    source, evidence = source_of(scene, suspect, places, seen)
    modules = [graph.module(place) for place in places]
    path, _, end = suspect.tap.name.rpartition(".")
    return Finding(
        step=suspect.step,
        graph=graph_name,
        tensor=suspect.tap.name,
        layer=layer_of(suspect.tap.name, layers_path(scene.reference.model)),
        part=suspect.part,
        operators=[graph.nodes[place].name for place in places][-8:],
        module=path if end == "output" else next((name for name in reversed(modules) if name), ""),
        row=suspect.row,
        tenant=scene.rows[suspect.row].tenant or BACKBONE,
        source=source,
        evidence=evidence,
        error=suspect.error,
        limit=suspect.limit,
        own_error=suspect.own_error,
    )
