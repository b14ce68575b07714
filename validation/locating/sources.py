"""Why a tensor is wrong: cache, weight, cast, tenant, position, mask, activation, normalisation or scale.

Each answer is an experiment and not a guess: a mistake is made on purpose in PyTorch, and where it gives the target's
tensor, it is named; weights are compared number by number. What no experiment explains is called ``operator``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx

from iapt_export.graphs.passes.fold_transposes import TRANSPOSED
from iapt_export.graphs.passes.pack_projections import JOIN
from iapt_export.graphs.passes.quantise_weights import BLOCKS, ROWS, SCALES
from trainers.decoder.insertion import layers_path
from trainers.decoder.quantise import Blocks
from trainers.decoder.streamed import read_weight
from validation.judging.metrics import worst_vector
from validation.locating.scene import Scene, Suspect, hypothetical
from validation.sides.recording import OTHER_INPUT, Hypothesis
from validation.sides.reference import BACKBONE, numpy
from validation.sides.stepping import graph_of
from validation.sides.taps import ATTENTION_OPERATORS, TappedGraph, layer_of

LOW_TYPES = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}


def source_of(scene: Scene, suspect: Suspect, places: list[int], seen: dict[str, np.ndarray]) -> tuple[str, str]:
    """Name what made a tensor wrong.

    Args:
        scene: the failing batch.
        suspect: its first wrong tensor.
        places: the graph's nodes that make it of tensors that are right.
        seen: the step's taps.

    Returns:
        A word (``weight``, ``mask``, ...) and a sentence of evidence.
    """
    graph = scene.graphs[graph_of(scene.graphs, suspect.step, scene.in_place)]
    if suspect.tap.place < 0 or suspect.part == "older entries":
        return "cache", _cache_evidence(scene, suspect)
    if evidence := _low_precision(scene, suspect, graph, places):
        return "cast", evidence
    path, _, end = suspect.tap.name.rpartition(".")
    wrong_alone = suspect.own_error is not None and suspect.own_error > scene.limits["module"]
    if end == "output" and (wrong_alone or suspect.own_error is None):
        if evidence := _weight_evidence(scene, graph, path):
            return "weight", evidence
        if wrong_alone:
            return "operator", f"{path} computes something else than PyTorch's module from the same input and weights"
    if evidence := _packed_evidence(scene, graph, places):
        return "weight", evidence
    attending = {graph.module(place) for place in places if graph.nodes[place].op_type in ATTENTION_OPERATORS}
    for hypothesis in _hypotheses(scene, suspect, attending):
        if _explains(scene, suspect, hypothesis):
            return hypothesis.kind, hypothesis.says
    return _by_place(suspect, graph, places)


def _hypotheses(scene: Scene, suspect: Suspect, modules: set[str]) -> Iterator[Hypothesis]:
    """Mistakes worth trying, likelier ones first."""
    row = suspect.row
    row_tenant, pad, slots = scene.rows[row].tenant, scene.padding(row), scene.slots(row)
    for tenant in scene.reference.methods:
        if tenant != row_tenant and scene.reference.methods[tenant].num_slots == slots:
            says = f"row {row} computes tenant {tenant or BACKBONE}'s in place of {row_tenant or BACKBONE}'s"
            yield Hypothesis(says, "tenant", tenant=tenant)
    for form in ("A", "B"):
        yield Hypothesis(f"the rational activation is evaluated in form {form}", "activation", form=form)
    yield Hypothesis(OTHER_INPUT, "normalisation", normalised_otherwise=True)
    for shift in (1, -1, 2, -2, slots, -slots):
        if shift:
            yield Hypothesis(f"positions are off by {shift:+d}", "position", shift=shift)
    if pad:
        yield Hypothesis("positions count the row's padding", "position", padding=pad, positions_count_padding=True)
        yield Hypothesis("the row's padding is attended to", "mask", padding=pad, padding_is_read=True)
    if not suspect.step:
        if pad:
            yield Hypothesis("the row's padding is read as text", "mask", padding=pad, padding_is_text=True)
        yield Hypothesis("tokens attend to later ones: the causal mask is missing", "mask", future_is_read=True)
        if pad:
            yield Hypothesis(
                "no mask at all: padding and later tokens are attended to",
                "mask",
                padding=pad,
                padding_is_read=True,
                future_is_read=True,
            )
    width = scene.reference.manifest.backbone.head_dim
    for module in modules:
        for factor in (2.0, 0.5, width**0.5, width**-0.5):
            yield Hypothesis(f"attention scores are {factor:.4g} times too large", "scale", scale=factor, module=module)


def _explains(scene: Scene, suspect: Suspect, hypothesis: Hypothesis) -> bool:
    """Whether the mistake makes PyTorch compute the target's tensor."""
    actual, mistaken = suspect.made[suspect.row], hypothetical(scene, suspect, hypothesis)
    if mistaken is None or mistaken.shape != actual.shape:
        return False
    error = worst_vector(actual, mistaken)[0]
    return error <= suspect.limit and error < suspect.error / 10


def _cache_evidence(scene: Scene, suspect: Suspect) -> str:
    actual, wanted = suspect.made[suspect.row], suspect.wanted[suspect.row]
    distance = np.abs(actual - wanted).max(axis=(0, 2)) / max(float(np.abs(wanted).max()), 1e-30)
    entries = np.flatnonzero(distance > suspect.limit).tolist()
    text = f"row {suspect.row}: {len(entries)} of {len(distance)} entries, first {entries[0] if entries else 0}, "
    text += "are not what the step before left"
    for other, array in enumerate(suspect.made):
        is_there = other != suspect.row and entries and max(entries) < array.shape[1]
        if is_there and np.allclose(actual[:, entries], suspect.wanted[other][:, entries], rtol=0, atol=1e-6):
            return f"{text}; they are row {other}'s"
    return text + ("; they are zero" if entries and not actual[:, entries].any() else "")


def _low_precision(scene: Scene, suspect: Suspect, graph: TappedGraph, places: list[int]) -> str:
    """Evidence that an fp32 tensor was rounded to a narrower type; empty where there is none."""
    if scene.dtype != "fp32":
        return ""
    for place in places:
        node = graph.nodes[place]
        low = next((LOW_TYPES[a.i] for a in node.attribute if a.name == "to" and a.i in LOW_TYPES), "")
        if low:
            return f"{node.name or node.output[0]} casts to {low} in an fp32 graph"
    actual = suspect.made[suspect.row]
    with np.errstate(over="ignore"):
        rounded = actual.astype(np.float16).astype(np.float32)
    return "every number has no more than fp16's 11 significant bits" if np.array_equal(actual, rounded) else ""


def _weight_evidence(scene: Scene, graph: TappedGraph, path: str) -> str:
    """What is wrong with a module's weights in the graph; empty where they are PyTorch's."""
    module = scene.reference.model.get_submodule(path)
    used = [name for place in graph.of_module(path) for name in graph.nodes[place].input if name in graph.weights]
    weights = {name: stored_weight(graph, name) for name in used if not name.endswith(SCALES)}
    for name, _ in module.named_parameters(recurse=False):
        right = numpy(read_weight(scene.reference.model, f"{path}.{name}"))
        shipped = next((other for other in weights if other.startswith(f"{path}.{name}")), None)
        # equal tensors are stored once, under the name of the first
        shipped = shipped or next((other for other, array in weights.items() if array.size == right.size), None)
        if shipped is None:
            continue
        stored = weights[shipped]
        right = right.T if shipped.removesuffix(BLOCKS).endswith(TRANSPOSED) else right
        if not np.array_equal(stored, right):
            return f"{path}.{name}: {_difference(stored, right, _elsewhere(scene, path, name))}"
    return ""


def _packed_evidence(scene: Scene, graph: TappedGraph, places: list[int]) -> str:
    """What is wrong with weights that stand side by side in one matrix; empty where they are PyTorch's."""
    used = {name for place in places for name in graph.nodes[place].input if name in graph.weights}
    for name in sorted(name for name in used if JOIN in name and not name.endswith(SCALES)):
        packed, start = stored_weight(graph, name), 0
        for part in name.removesuffix(BLOCKS).split(JOIN):
            module_path, _, kind = part.removesuffix(TRANSPOSED).rpartition(".")
            right = numpy(read_weight(scene.reference.model, f"{module_path}.{kind}"))
            right = right.T if part.endswith(TRANSPOSED) else right
            stored = packed[..., start : start + right.shape[-1]]
            start += right.shape[-1]
            if not np.array_equal(stored, right):
                return f"{module_path}.{kind}: {_difference(stored, right, _elsewhere(scene, module_path, kind))}"
    return ""


def stored_weight(graph: TappedGraph, name: str) -> np.ndarray:
    """A weight in fp32 by the name of its initializer; of a quantised one, what its values and scales stand for."""
    array = graph.initializer(name)
    base = name.removesuffix(BLOCKS).removesuffix(ROWS)
    if base == name:
        return array.astype(np.float32)
    scales = graph.initializer(base + SCALES)  # [N, G]
    values = array.reshape(*scales.shape, -1)
    fields = {field.name: field.i for field in graph.nodes[graph.readers[name][0]].attribute}
    num_inputs = fields.get("K", scales.shape[1] * fields["block_size"])
    matrix = Blocks(fields["bits"], values, scales, num_inputs).restored()  # [K, N]
    return matrix.T if base + ROWS in graph.weights else matrix


def _difference(stored: np.ndarray, right: np.ndarray, elsewhere: Iterable[tuple[int, np.ndarray]]) -> str:
    """In words, how a weight differs from the right one; ``elsewhere`` holds other layers' weights of that name."""
    if stored.shape != right.shape:
        return f"its shape is {list(stored.shape)}, expected {list(right.shape)}"
    differ = stored != right
    count = int(differ.sum())
    if count <= max(8, stored.size // 1000):
        place = tuple(int(index) for index in np.argwhere(differ)[0])
        values = f"{stored[place]:.6g} for {right[place]:.6g}"
        return f"{count} of {stored.size} numbers differ, first at {list(place)}: {values}"
    if np.array_equal(stored.ravel(), right.T.ravel()):
        return "it is transposed"
    used = np.abs(right) > 1e-12
    ratio = stored[used] / right[used]
    if ratio.size and np.allclose(ratio, np.median(ratio), rtol=1e-4):
        return f"it is {np.median(ratio):.6g} times the right one"
    for layer, array in elsewhere:
        if np.array_equal(stored.ravel(), array.ravel()) or np.array_equal(stored.ravel(), array.T.ravel()):
            return f"it is layer {layer}'s"
    return f"{count} of {stored.size} numbers differ, by up to {np.abs(stored - right).max():.3g}"


def _elsewhere(scene: Scene, path: str, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """The same weight of the other layers, one at a time."""
    prefix = layers_path(scene.reference.model)
    this = layer_of(f"{path}.", prefix)
    layers = range(scene.reference.manifest.backbone.num_layers if this is not None else 0)
    paths = {layer: path.replace(f"{prefix}.{this}.", f"{prefix}.{layer}.") for layer in layers if layer != this}
    for layer, other in paths.items():
        yield layer, numpy(read_weight(scene.reference.model, f"{other}.{name}"))


def _by_place(suspect: Suspect, graph: TappedGraph, places: list[int]) -> tuple[str, str]:
    """The answer where no experiment gave one: what the operators in between are for."""
    kinds = {graph.nodes[place].op_type for place in places}
    name = suspect.tap.name
    if name.endswith((".query", ".key")) and ("RotaryEmbedding" in kinds or "Mul" in kinds):
        return "position", "projections are right and their rotated form is not: rotary positions"
    if kinds & {"Attention", "Softmax"} and "layers" in name and not name.endswith((".pooled", ".activated")):
        return "mask", "queries, keys and values are right and what attention makes of them is not: mask or scale"
    if name.endswith(".activated"):
        return "activation", "what the rational activation reads is right and what it makes is not"
    if suspect.part == "prompt slots":
        return "prompt", "the tokens' hidden states are right and the layer's prompt is not"
    return "operator", "none of the known mistakes gives this tensor; see the operators"
