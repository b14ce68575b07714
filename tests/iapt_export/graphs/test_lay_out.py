"""Graphs laid out from few traced layers are those of the whole trace, node by node."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import onnx_ir as ir
import pytest

from iapt_export.graphs import trace
from iapt_export.graphs.export import run_passes
from iapt_export.graphs.installed import Installed, rational_forms
from iapt_export.graphs.layer_kinds import first_layers, layer_kinds, layers_to_trace
from iapt_export.graphs.passes import ship_pipeline
from iapt_export.graphs.table import TABLE, Serving
from tests.families import FAMILIES, REFUSED, tiny_family
from tests.graphs import specs_for
from tests.tiny import tiny_llama
from trainers.decoder.insertion import decoder_layers, sizes_of
from trainers.methods.configs import IAPTConfig, LoRAConfig, PrefixTuningConfig
from trainers.methods.forms import new_method


def installed_in(model: Any, *configs: Any) -> list[Installed]:
    sizes = sizes_of(model)
    return [
        Installed(f"method_{index}", new_method(config, sizes).eval().requires_grad_(False))
        for index, config in enumerate(configs)
    ]


def described(model: ir.Model) -> dict[str, Any]:
    """A graph by its nodes' names: operator, attributes and where each input comes from; weights by their bytes."""

    def source(value: ir.Value | None) -> Any:
        if value is None:
            return None
        if node := value.producer():
            if node.op_type == "Shape" and (of := node.inputs[0]) is not None and of.is_graph_input():
                return "size", of.shape[node.attributes.get_int("start", 0)]  # the same of any input
            return node.name, value.index()
        if value.const_value is not None:
            return hashlib.sha256(value.const_value.tobytes()).hexdigest(), tuple(value.const_value.shape.numpy())
        return value.name

    def attribute(item: ir.Attr) -> Any:
        if item.type == ir.AttributeType.GRAPH:
            return [source(value) for value in item.as_graph().outputs]
        if item.type == ir.AttributeType.TENSOR:
            return item.as_tensor().tobytes()
        return item.value

    nodes: dict[str, Any] = {
        str(node.name): (
            *node.op_identifier(),
            [source(value) for value in node.inputs],
            {name: attribute(item) for name, item in sorted(node.attributes.items())},
            [(value.dtype, str(value.shape)) for value in node.outputs],
        )
        for node in model.graph.all_nodes()
        if node.op_type != "Shape"
    }
    return nodes | {
        "inputs": [(value.name, str(value.shape), value.dtype) for value in model.graph.inputs],
        "outputs": [(value.name, str(value.shape), source(value)) for value in model.graph.outputs],
        "order": [node.name for node in model.graph.all_nodes()],
    }


def shipped(name: str, model: Any, methods: list[Installed]) -> dict[str, Any]:
    """A graph after its passes."""
    spec = specs_for(model, methods, capacity=64 if name.startswith("serve_") else None)[name]
    traced = trace.trace_graph(name, model, methods, spec, 23)
    passes = ship_pipeline(spec, rational_forms(methods), TABLE[name].opset or 23, TABLE[name].passes(Serving(256)))
    return described(run_passes(name, passes, traced)[0])


def laid_out(name: str, model: Any, methods: list[Installed], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same, and it must not have been traced whole after all."""
    calls = []
    with monkeypatch.context() as patch:
        once = trace._traced
        patch.setattr(trace, "_traced", lambda *arguments: calls.append(name) or once(*arguments))
        made = shipped(name, model, methods)
    assert calls == [name], "layers of one kind were not traced alike"
    return made


def traced_whole(name: str, model: Any, methods: list[Installed], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same from a trace of every layer."""
    with monkeypatch.context() as patch:
        patch.setattr(trace, "layers_to_trace", len)
        return shipped(name, model, methods)


def test_layers_of_one_kind_are_traced_until_two_were_seen_behind_the_first() -> None:
    assert layers_to_trace(["a"] * 30) == 3
    assert layers_to_trace(["a"] * 3) == 3
    assert layers_to_trace(["s", "s", "s", "s", "s", "f"] * 3) == 12  # as Gemma 3 has them
    assert layers_to_trace(["dense", *["expert"] * 9]) == 3
    assert layers_to_trace([*["a"] * 9, "last"]) == 10  # nothing to copy the last from
    assert layers_to_trace(list(range(8))) == 8


def test_kinds_are_what_layers_do_and_not_their_weights_or_numbers() -> None:
    plain = tiny_llama(num_hidden_layers=4)
    assert len(set(layer_kinds(plain, installed_in(plain, IAPTConfig(bottleneck=4))))) == 1
    grouped = installed_in(plain, IAPTConfig(bottleneck=4, sharing="groups", num_groups=2))
    kinds = layer_kinds(plain, grouped)
    assert kinds[0] == kinds[1] != kinds[2] == kinds[3]
    plain.model.layers[2].self_attn.scaling *= 2
    kinds = layer_kinds(plain, [])
    assert kinds[0] == kinds[1] == kinds[3] != kinds[2]
    gemma = tiny_family("gemma3_text")
    assert len(set(layer_kinds(gemma, []))) == 2  # a sliding and a full one


def test_a_backbone_is_whole_again_afterwards() -> None:
    model = tiny_llama(num_hidden_layers=4)
    layers = list(decoder_layers(model))
    with first_layers(model, 3):
        assert len(decoder_layers(model)) == model.config.num_hidden_layers == 3
    assert list(decoder_layers(model)) == layers and model.config.num_hidden_layers == 4


def test_a_laid_out_graph_is_that_of_the_whole_trace(monkeypatch: pytest.MonkeyPatch, fresh_traces: None) -> None:
    model = tiny_llama(num_hidden_layers=4)
    methods = installed_in(model, LoRAConfig(rank=2))
    made = laid_out("decode", model, methods, monkeypatch)
    assert made == traced_whole("decode", model, methods, monkeypatch)
    assert "model.layers.3.mlp.down_proj/MatMul" in made  # three layers were traced


@pytest.mark.thorough
def test_layers_that_turn_out_to_differ_are_all_traced(fresh_traces: None, caplog: pytest.LogCaptureFixture) -> None:
    """A difference that no attribute shows: the third traced layer computes something else."""
    model = tiny_llama(num_hidden_layers=4)
    before = model.model.layers[2].mlp.down_proj.forward
    model.model.layers[2].mlp.down_proj.forward = lambda hidden: before(hidden) * 2
    with caplog.at_level("INFO", logger="iapt_export"):
        changed = shipped("decode", model, [])
    assert "all 4 layers are traced: layers 1 and 2 have different numbers of nodes" in caplog.text
    twice = [name for name in changed if name.endswith("mlp.down_proj/Mul")]
    assert twice == ["model.layers.2.mlp.down_proj/Mul"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "serve", "serve_prefill", "serve_decode", "generator"])
def test_every_graph(name: str, monkeypatch: pytest.MonkeyPatch, fresh_traces: None) -> None:
    model = tiny_llama(num_hidden_layers=5)
    methods = installed_in(model, IAPTConfig(bottleneck=4), LoRAConfig(rank=2), PrefixTuningConfig(prompt_length=3))
    assert laid_out(name, model, methods, monkeypatch) == traced_whole(name, model, methods, monkeypatch)


WHOLE = {
    "diffllama": "each layer computes with a number of its own",
    "falcon-7b-like": "its trace names a constant of each layer by a running number",
    "falcon-40b-like": "the same",
}
"""Families of which every layer is traced, which takes longer and gives the same."""


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, (verdict, *_) in FAMILIES.items() if verdict != REFUSED])
def test_every_family(family: str, monkeypatch: pytest.MonkeyPatch, fresh_traces: None) -> None:
    """With as many layers as show each kind twice, and two more."""
    model = tiny_family(family, layers=7)
    made = (shipped if family in WHOLE else functools.partial(laid_out, monkeypatch=monkeypatch))("decode", model, [])
    assert (layers_to_trace(layer_kinds(model, [])) <= 5) == (family != "diffllama")
    assert made == traced_whole("decode", model, [], monkeypatch)
