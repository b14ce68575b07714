"""Tracing: backbones that cannot be followed are refused in words, and nothing of the exporter's chatter is shown."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch

from iapt_export.contract.errors import IaptError
from iapt_export.graphs.trace import EXAMPLE_SIZES, deepest_cause, trace_graph
from tests.families import tiny_family
from tests.graphs import installed, specs_for
from tests.tiny import tiny_llama
from trainers.decoder.insertion import sizes_of


def trace(model: Any, name: str = "decode") -> Any:
    methods = installed()
    return trace_graph(name, model, methods, specs_for(model, methods)[name], 23)


def test_a_forward_pass_that_depends_on_values_is_refused() -> None:
    model = tiny_llama(num_hidden_layers=1)
    before = model.config._attn_implementation

    def branch(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 2 if output.sum().item() > 0 else output

    model.model.norm.register_forward_hook(branch)
    with pytest.raises(IaptError) as caught:
        trace(model)
    text = str(caught.value)
    assert text.startswith("LlamaForCausalLM could not be traced into decode.onnx: ") and "\n" not in text
    assert "Could not guard on data-dependent expression" in text
    assert text.endswith("; only decoders whose forward pass torch.export can follow are supported, see docs/models.md")
    assert caught.value.__cause__ is not None
    assert model.config._attn_implementation == before


def test_an_operator_that_onnx_lacks_is_named_without_colours() -> None:
    model = tiny_llama(num_hidden_layers=1)
    model.model.norm.register_forward_hook(lambda _module, _args, output: torch.special.bessel_j0(output))
    with pytest.raises(IaptError) as caught:
        trace(model)
    text = str(caught.value)
    assert "\x1b" in str(caught.value.__cause__), "the exporter's own text, three causes above"
    assert "\x1b" not in text and "\n" not in text
    assert "could not be traced into decode.onnx: No ONNX function found for <OpOverload(op='prims.bessel_j0'" in text


def raised(*errors: Exception) -> Exception:
    """The first error, caused by the second, and so on."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        ([RuntimeError("\x1b[1;31mpages\x1b[0m"), RuntimeError("\n\x1b[96mThe cause\x1b[0m.\nmore\n")], "The cause"),
        ([RuntimeError("a text"), KeyError("layer")], "KeyError: 'layer'"),
        ([RuntimeError("a text"), AssertionError()], "a text"),
        ([RuntimeError()], "RuntimeError"),
    ],
    ids=["colours", "another kind", "a cause without text", "no text"],
)
def test_the_deepest_cause_is_shown(errors: list[Exception], text: str) -> None:
    assert deepest_cause(raised(*errors)) == text


def test_an_error_without_text_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(IaptError, match=r"could not be traced into decode\.onnx: RuntimeError"):
        trace(tiny_llama(num_hidden_layers=1))


def test_defects_of_ours_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(TypeError, match="a defect"):
        trace(tiny_llama(num_hidden_layers=1))


def test_one_key_head_that_pytorch_broadcasts() -> None:
    """Falcon's; the exporter's translation takes fewer key heads only where it is told of groups."""
    model = tiny_family("falcon-7b-like", layers=1)
    methods = installed(sizes=sizes_of(model))
    graph = trace_graph("decode", model, methods, specs_for(model, methods)["decode"], 23).graph
    attentions = [node for node in graph if node.op_type == "Attention"]
    assert len(attentions) == 1
    assert [value.shape[1] for value in attentions[0].inputs[:3]] == [4, 1, 1]


@pytest.mark.thorough
def test_a_model_that_keeps_tensors_of_its_forward_pass_is_traced_twice() -> None:
    """Longrope's factors, which PyTorch's exporter leaves in the model without values."""
    model = tiny_family("llama-longrope", layers=1)
    methods = installed(sizes=sizes_of(model))
    spec = specs_for(model, methods)["decode"]
    first, second = ([node.op_type for node in trace_graph("decode", model, methods, spec, 23).graph] for _ in range(2))
    assert first == second
    ids = torch.tensor([[5, 9, 30]])
    assert torch.isfinite(model(ids).logits).all(), "it still computes"


def test_tracing_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace(tiny_llama(num_hidden_layers=1))
    assert capfd.readouterr() == ("", "")
    assert not caught


def test_example_sizes_cannot_be_taken_for_one_another() -> None:
    """Equal sizes would be tied together by the tracer, and ones be broadcast."""
    sizes = list(EXAMPLE_SIZES.values())
    assert len(set(sizes)) == len(sizes) and 1 not in sizes
    assert EXAMPLE_SIZES["total"] == EXAMPLE_SIZES["past"] + 1
