"""Planted faults with the place where each must be found: the list against which the validator itself is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.runner import NOWHERE
from engines.serving import in_place_stepper
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.tenants import TenantBank
from iapt_export.contract.manifest import READS_INSTRUCTION
from iapt_export.graphs.passes.inline_rational import RATIONAL_MODULE
from tests.validation import sabotage

Plant = Callable[[Path, pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """A mistake, and what looking inside must say about it."""

    name: str
    plant: Plant
    step: int
    layer: int | None
    source: str
    tensor: str
    """How the name of the first wrong tensor ends."""
    evidence: str = ""
    """A part of the sentence that explains it."""


def in_files(change: Callable[[Path], None]) -> Plant:
    return lambda bundle, _: change(bundle)


def edit(file: str, change: Callable[[onnx.GraphProto], None]) -> Plant:
    """Change a graph and write it back."""

    def plant(bundle: Path, _: pytest.MonkeyPatch) -> None:
        model = onnx.load(bundle / file, load_external_data=False)
        change(model.graph)
        (bundle / file).write_bytes(model.SerializeToString())

    return plant


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def before(graph: onnx.GraphProto, reader: str, place: int, *made: tuple[str, list[Any], dict[str, Any]]) -> None:
    """Let ``reader`` take its input ``place`` through more nodes; an operator's extra inputs are int64 constants."""
    target = node(graph, reader)
    value = target.input[place]
    index = list(graph.node).index(target)
    for step, (operator, constants, attributes) in enumerate(made):
        name = f"{value}.planted.{place}.{step}"
        names = []
        for number, constant in enumerate(constants):
            names.append(f"{name}.{number}")
            graph.initializer.append(numpy_helper.from_array(np.array(constant, np.int64), names[-1]))
        graph.node.insert(index, helper.make_node(operator, [value, *names], [name], **attributes))
        index, value = index + 1, name
    target.input[place] = value


def rolled_rotation(graph: onnx.GraphProto) -> None:
    """Rotate layer 1's keys by their neighbours' positions."""
    target = "model.layers.1.self_attn/RotaryEmbedding_2"
    for place in (1, 2):
        value = node(graph, target).input[place]
        index = list(graph.node).index(node(graph, target))
        made = f"{value}.rolled"
        for name, bounds in (("head", (0, 1)), ("tail", (1, 1 << 30))):
            ends = [f"{made}.{name}.{part}" for part in ("start", "end", "axis")]
            for end, number in zip(ends, (*bounds, 1), strict=True):
                graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), end))
            graph.node.insert(index, helper.make_node("Slice", [value, *ends], [f"{made}.{name}"]))
            index += 1
        graph.node.insert(index, helper.make_node("Concat", [f"{made}.tail", f"{made}.head"], [made], axis=1))
        node(graph, target).input[place] = made


def no_causal_mask(graph: onnx.GraphProto) -> None:
    before(graph, "model/LessOrEqual", 1, ("Add", [1000], {}))


def attention_scale(graph: onnx.GraphProto) -> None:
    target = node(graph, "model.layers.1.self_attn/Attention")
    kept = [attribute for attribute in target.attribute if attribute.name != "scale"]
    (old,) = [attribute.f for attribute in target.attribute if attribute.name == "scale"] or [8**-0.5]
    del target.attribute[:]
    target.attribute.extend([*kept, helper.make_attribute("scale", 2 * old)])


def norm_epsilon(graph: onnx.GraphProto) -> None:
    target = node(graph, "model.layers.1.post_attention_layernorm/RMSNormalization")
    next(attribute for attribute in target.attribute if attribute.name == "epsilon").f = 0.5


def half_precision(graph: onnx.GraphProto) -> None:
    casts = (("Cast", [], {"to": onnx.TensorProto.FLOAT16}), ("Cast", [], {"to": onnx.TensorProto.FLOAT}))
    before(graph, "model.layers.1.mlp.down_proj/MatMul", 0, *casts)


def sigmoid_alone(graph: onnx.GraphProto) -> None:
    target = node(graph, "model.layers.0.mlp.act_fn/Mul")
    gate = next(name for name in target.input if name in node(graph, "model.layers.0.mlp.act_fn/Sigmoid").output)
    target.op_type = "Identity"
    del target.input[:]
    target.input.append(gate)


def raw_input(graph: onnx.GraphProto) -> None:
    """The generators read hidden states as they are."""
    made = {node.output[0]: node for node in graph.node}
    read = [node.input[0] for node in graph.node if node.op_type == "Rational"]
    read += [node.input[1] for node in graph.node if node.name.endswith(f"{RATIONAL_MODULE}/Mul")]
    assert read
    for value in read:
        seen: set[str] = set()
        waiting = [value]
        while waiting:  # back to the normalisation nearest to the activation
            node = made.get(waiting.pop(0))
            if node is None or node.output[0] in seen:
                continue
            seen.add(node.output[0])
            if node.op_type == "RMSNormalization":
                node.op_type = "Identity"
                del node.input[1:], node.attribute[:]
                break
            waiting += node.input


def logits_of_the_token_before(graph: onnx.GraphProto) -> None:
    before(graph, "/Add", 0, ("Sub", [1], {}))


def keys_and_values_change_places(graph: onnx.GraphProto) -> None:
    key, value = (next(n for n in graph.node if f"present.1.{part}" in n.output) for part in ("key", "value"))
    key.input[1], value.input[1] = value.input[1], key.input[1]


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Change a weight in the file that prefill and decode share."""

    def plant(bundle: Path, _: pytest.MonkeyPatch) -> None:
        data = mapped(bundle, name)
        data[:] = change(np.array(data))
        data.flush()

    return plant


def mapped(bundle: Path, name: str) -> np.memmap:
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.startswith(name))
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    return np.memmap(bundle / "weights.data", np.float32, "r+", offset, tuple(tensor.dims))


def flipped_sign(array: np.ndarray) -> np.ndarray:
    bits = array.view(np.uint32)
    bits.ravel()[np.abs(array).argmax()] ^= 1 << 31
    return array


def of_layer_0(bundle: Path, _: pytest.MonkeyPatch) -> None:
    data = mapped(bundle, "model.layers.1.mlp.gate_proj")
    data[:] = mapped(bundle, "model.layers.0.mlp.gate_proj")
    data.flush()


def tenants_reversed(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are right, only ``tenant_index`` points at a neighbour's."""
    honest = TenantBank.indices

    def indices(self: TenantBank, tenants: Any) -> dict[str, np.ndarray]:
        return {name: np.where(array < 0, array, 2 - array) for name, array in honest(self, tenants).items()}

    monkeypatch.setattr(TenantBank, "indices", indices)


def fed(change: Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]) -> Plant:
    """Change what decode steps are fed; the change sees how many entries the cache has."""

    def plant(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = OnnxRuntimeRunner.infer
        steps = {"count": 0}

        def infer(self: OnnxRuntimeRunner, feeds: dict[str, np.ndarray], into: Any = NOWHERE) -> Any:
            if into:  # a cache that is written in place, see `stepping`
                return honest(self, feeds, into)
            if "position_ids" in feeds:
                steps["count"] += 1
                feeds = change(feeds, steps["count"])
            else:
                steps["count"] = 0  # a new batch
            return honest(self, feeds)

        monkeypatch.setattr(OnnxRuntimeRunner, "infer", infer)

    return plant


def positions_count_padding(feeds: dict[str, np.ndarray], _: int) -> dict[str, np.ndarray]:
    length = feeds["attention_mask"].shape[1]
    return {**feeds, "position_ids": np.full_like(feeds["position_ids"], length - 1)}


def stale_entry(feeds: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """From the third step on, row 0's newest value in layer 1 is the one before it."""
    if step < 3:
        return feeds
    values = feeds["past_key_values.1.value"].copy()
    values[0, :, -1] = values[0, :, -2]
    return {**feeds, "past_key_values.1.value": values}


def rows_change_places(feeds: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """At the second step the cache's rows stand in another order than the tokens."""
    past = {name: array[::-1].copy() for name, array in feeds.items() if name.startswith("past_key_values.0")}
    return {**feeds, **past} if step == 2 else feeds


def stepping(change: Callable[[InPlaceStepper, int], None]) -> Plant:
    """Change the cache that is written in place before a decode step; the change sees the step's number."""

    def plant(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        honest_read, honest_step = InPlaceStepper.read, InPlaceStepper.step
        steps = {"count": 0}

        def read(self: InPlaceStepper, rows: Any) -> np.ndarray:
            steps["count"] = 0
            return honest_read(self, rows)

        def step(self: InPlaceStepper, tokens: Any) -> np.ndarray:
            steps["count"] += 1
            change(self, steps["count"])
            return honest_step(self, tokens)

        monkeypatch.setattr(InPlaceStepper, "read", read)
        monkeypatch.setattr(InPlaceStepper, "step", step)

    return plant


def rows_swapped_in_place(stepper: InPlaceStepper, step: int) -> None:
    if step == 2:
        for buffer in stepper.buffers.values():
            buffer[: stepper.num_rows] = buffer[: stepper.num_rows][::-1].copy()


def stale_in_place(stepper: InPlaceStepper, step: int) -> None:
    if step >= 3:
        values, newest = stepper.buffers["past_key_values.1.value"], stepper.lengths[0] - 1
        values[0, :, newest] = values[0, :, newest - 1]


def serving_fed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    """Change what the graphs over a cache in place are fed."""

    def plant(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = in_place_stepper._run
        monkeypatch.setattr(in_place_stepper, "_run", lambda runner, feeds, into: honest(runner, change(feeds), into))

    return plant


def instruction_flag_lost(feeds: dict[str, Any]) -> dict[str, Any]:
    """Instructions are read as if they were generated tokens: nothing of the tenant goes in."""
    return feeds | {READS_INSTRUCTION: np.array(False)}


def place_off_by_one(feeds: dict[str, Any]) -> dict[str, Any]:
    """Decode steps rotate by the next position."""
    return feeds | {"position_ids": feeds["position_ids"] + (not feeds[READS_INSTRUCTION])}


def serving_scale(graph: onnx.GraphProto) -> None:
    target = node(graph, "model.layers.1.self_attn/GroupQueryAttention")
    next(attribute for attribute in target.attribute if attribute.name == "scale").f *= 2


FAULTS = (
    Fault("serve: cache rows swapped", stepping(rows_swapped_in_place), 2, 0, "cache", "0.key"),
    Fault("serve: stale cache entry", stepping(stale_in_place), 3, 1, "cache", "1.value"),
    Fault("serve: attention scale doubled", edit("serve.onnx", serving_scale), 0, 1, "scale", "o_proj.input", "2"),
    Fault("serve: no prompts", serving_fed(instruction_flag_lost), 0, 0, "prompt", "input"),
    Fault("serve: position off by one", serving_fed(place_off_by_one), 1, 0, "position", "present.0.key", "by +1"),
    Fault(
        "every row is the first tenant's", in_files(sabotage.everybody_is_the_first_tenant), 0, 0, "tenant", "pooled"
    ),
    Fault("tenants swapped in the session", tenants_reversed, 0, 0, "tenant", "pooled"),
    Fault(
        "generator graph: first tenant's", in_files(sabotage.generators_of_the_first_tenant), 0, 0, "tenant", "prompt"
    ),
    Fault("decode: position off by one", in_files(sabotage.position_off_by_one), 1, 0, "position", "query", "by +1"),
    Fault("decode: positions count padding", fed(positions_count_padding), 1, 0, "position", "query", "padding"),
    Fault("RoPE on the wrong rows", edit("prefill.onnx", rolled_rotation), 0, 1, "position", "present.1.key"),
    Fault("prefill: no padding mask", in_files(sabotage.no_mask_in_prefill), 0, 0, "mask", "pooled", "padding"),
    Fault("prefill: no causal mask", edit("prefill.onnx", no_causal_mask), 0, 0, "mask", "o_proj.input", "causal"),
    Fault("decode: no mask", in_files(sabotage.no_mask_in_decode), 1, 0, "mask", "o_proj.input", "padding"),
    Fault(
        "transposed weight", weight("model.layers.1.self_attn.o_proj", lambda w: w.T), 0, 1, "weight", "output", "tra"
    ),
    Fault("a number of a weight", in_files(sabotage.one_weight), 0, 1, "weight", "down_proj.output", "1 of 1536"),
    Fault("one flipped bit", weight("model.layers.1.mlp.up_proj", flipped_sign), 0, 1, "weight", "output", "1 of 1536"),
    Fault("weight of another layer", of_layer_0, 0, 1, "weight", "gate_proj.output", "layer 0's"),
    Fault(
        "weight 1 % too large",
        weight("model.layers.0.mlp.down_proj", lambda w: w * np.float32(1.01)),
        0,
        0,
        "weight",
        "output",
        "1.01",
    ),
    Fault("wrong activation form", in_files(sabotage.wrong_activation_form), 0, 0, "activation", "activated", "form A"),
    Fault(
        "generators read raw states",
        edit("prefill.onnx", raw_input),
        0,
        0,
        "normalisation",
        "pooled",
        "should be normalised",
    ),
    Fault(
        "generator graph: raw states",
        edit("generator.onnx", raw_input),
        0,
        0,
        "normalisation",
        "prompt",
        "should be normalised",
    ),
    Fault("attention scale doubled", edit("prefill.onnx", attention_scale), 0, 1, "scale", "o_proj.input", "2"),
    Fault("half precision inside", edit("prefill.onnx", half_precision), 0, 1, "cast", "down_proj.input", "fp16"),
    Fault("epsilon of a norm", edit("prefill.onnx", norm_epsilon), 0, 1, "operator", "post_attention_layernorm.output"),
    Fault("sigmoid in place of SiLU", edit("decode.onnx", sigmoid_alone), 1, 0, "operator", "act_fn.output"),
    Fault(
        "logits of the token before", edit("prefill.onnx", logits_of_the_token_before), 0, None, "operator", "output"
    ),
    Fault(
        "keys and values swapped", edit("decode.onnx", keys_and_values_change_places), 1, 1, "operator", "present.1.key"
    ),
    Fault("stale cache entry", fed(stale_entry), 3, 1, "cache", "1.value"),
    Fault("cache rows swapped", fed(rows_change_places), 2, 0, "cache", "0.key"),
)
