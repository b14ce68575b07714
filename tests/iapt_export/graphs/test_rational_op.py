"""``ai.iapt::Rational``: node, function body, custom operator and trained activation are one function."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import iapt_export.graphs.ops.rational_op as op
from engines.onnxruntime.runner import _array_from_value
from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION, RATIONAL
from trainers.methods.rational import initial_coefficients, rational

DEGREES = [(1, 1), (1, 8), (2, 3), (5, 4), (6, 5), (8, 1), (8, 8)]
FORMS = ("A", "B")
KINDS = {
    "fp32": (TensorProto.FLOAT, np.float32, torch.float32),
    "fp16": (TensorProto.FLOAT16, np.float16, torch.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, torch.bfloat16),
}
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e-45, 1.0, -1.0, 9.3, -70.0, 65504.0, 1e30, -1e30, 3e38, np.inf, -np.inf, np.nan]


def model(m: int, n: int, form: str, dtype: str, opset: int = 23, shaped: bool = False) -> onnx.ModelProto:
    """One Rational node with its body, all shapes open, or those of three rows of R values."""
    kind = KINDS[dtype][0]
    node = helper.make_node(RATIONAL, ["x", "a", "b"], ["y"], domain=DOMAIN, form=form)
    sizes: dict[str, list[Any] | None] = (
        {"x": ["rows", "r"], "a": [m + 1], "b": [n]} if shaped else dict.fromkeys("xab")
    )
    kinds = {"x": kind, "a": TensorProto.FLOAT, "b": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kinds[name], sizes[name]) for name in "xab"]
    graph = helper.make_graph([node], "rational", inputs, [helper.make_tensor_value_info("y", kind, sizes["x"])])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    body = op.rational_function(m + 1, n, form, opset)
    return helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=10)


@functools.cache
def session(m: int, n: int, form: str, dtype: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model(m, n, form, dtype).SerializeToString(), options)


def run(x: np.ndarray, a: np.ndarray, b: np.ndarray, form: str, dtype: str = "fp32") -> np.ndarray:
    runner = session(a.shape[-1] - 1, b.shape[-1], form, dtype)
    if dtype != "bf16":
        return runner.run(None, {"x": x, "a": a, "b": b})[0]
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), TensorProto.BFLOAT16)
    feeds = {
        "x": value,
        "a": onnxruntime.OrtValue.ortvalue_from_numpy(a),
        "b": onnxruntime.OrtValue.ortvalue_from_numpy(b),
    }
    (made,) = runner.run_with_ort_values(["y"], feeds)
    return _array_from_value(made)


def exact(x: np.ndarray, a: np.ndarray, b: np.ndarray, form: str) -> np.ndarray:
    """By powers in fp64: another way to write the same function."""
    v, a, b = x.astype(np.float64), a.astype(np.float64), b.astype(np.float64)
    top = sum(a[..., j : j + 1] * v**j for j in range(a.shape[-1]))
    terms = [b[..., k : k + 1] * v ** (k + 1) for k in range(b.shape[-1])]
    return top / (1 + (sum(np.abs(term) for term in terms) if form == "A" else np.abs(sum(terms))))


def coefficients(m: int, n: int, rows: tuple[int, ...] = (), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    return source.normal(size=(*rows, m + 1)).astype(np.float32), source.normal(size=(*rows, n)).astype(np.float32)


def eager(x: np.ndarray, a: np.ndarray, b: np.ndarray, form: str, dtype: str = "fp32") -> np.ndarray:
    tensor = torch.from_numpy(x.astype(np.float32)).to(KINDS[dtype][2])
    made = rational(tensor, torch.from_numpy(a), torch.from_numpy(b), form)
    return made.float().numpy().astype(KINDS[dtype][1])


def assert_same(made: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the last bit or two of fp32, infinities and NaN at the same places."""
    assert made.dtype == wanted.dtype and made.shape == wanted.shape
    np.testing.assert_allclose(
        made.astype(np.float32), wanted.astype(np.float32), rtol=3e-7, atol=1e-37, equal_nan=True
    )


numbers = st.one_of(st.floats(width=32), st.sampled_from(SPECIAL), st.floats(-4, 4, width=32))


@settings(max_examples=150, deadline=None)
@given(
    x=arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 5)), elements=numbers),
    degrees=st.sampled_from(DEGREES),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    per_row=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_body_is_the_trained_activation(
    x: np.ndarray, degrees: tuple[int, int], form: str, dtype: str, per_row: bool, seed: int
) -> None:
    """Signs, zeros, denormals, huge values, infinities, NaN, empty tensors, one tenant's coefficients for each row."""
    a, b = coefficients(*degrees, (x.shape[0], 1) if per_row else (), seed)
    with np.errstate(all="ignore"):
        x = x.astype(KINDS[dtype][1])
        assert_same(run(x, a, b, form, dtype), eager(x, a, b, form, dtype))


@pytest.mark.parametrize(("degrees", "form"), list(itertools.product(DEGREES, FORMS)))
def test_the_body_is_the_formula(degrees: tuple[int, int], form: str) -> None:
    x = np.linspace(-6, 6, 241, dtype=np.float32).reshape(1, -1)
    a, b = coefficients(*degrees)
    wanted = exact(x, a, b, form)
    assert np.abs(run(x, a, b, form) - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("m", "n"), list(itertools.product(range(1, 9), range(1, 9))))
def test_every_pair_of_degrees_has_a_body(m: int, n: int) -> None:
    for form in FORMS:
        body = op.rational_function(m + 1, n, form, 20)
        assert (body.domain, body.name, list(body.attribute)) == (DOMAIN, RATIONAL, ["form"])
        assert (list(body.input), list(body.output)) == (["x", "numerator", "denominator"], ["y"])
        operators = [node.op_type for node in body.node]
        assert operators.count("Div") == 1 and (operators[0], operators[-1]) == ("Cast", "CastLike")
        # Horner: m products above, n below (its last one is the factor x that every term has)
        assert operators.count("Mul") == m + n and operators.count("Add") == m + (n - 1) + 1
        assert {node.domain for node in body.node} == {""}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_onnx_own_evaluator_agrees(form: str, dtype: str) -> None:
    x = np.array([SPECIAL, [-3.5, *SPECIAL[1:]]], np.float32)
    with np.errstate(all="ignore"):
        x = x.astype(KINDS[dtype][1])
        a, b = coefficients(5, 4, (2, 1))
        a, b = a[:, 0], b[:, 0]
        (made,) = ReferenceEvaluator(model(5, 4, form, dtype)).run(None, {"x": x, "a": a, "b": b})
        assert_same(np.asarray(made), eager(x, a, b, form, dtype))


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_the_node_is_valid(form: str, opset: int) -> None:
    op.register_schema()
    onnx.checker.check_model(model(5, 4, form, "fp16", opset, shaped=True), full_check=False)
    inferred = onnx.shape_inference.infer_shapes(model(5, 4, form, "fp16", opset, shaped=True), strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16


def test_fp16_does_not_overflow_on_the_way() -> None:
    """x^5 leaves fp16 at 9.2, yet the quotient is small: evaluation in fp32 keeps it."""
    a, b = (c.astype(np.float32) for c in initial_coefficients("gelu", 5, 4, "B"))
    x = np.array([[12.0, -12.0, 40.0, -40.0, 300.0]], np.float16)
    made = run(x, a, b, "B", "fp16")
    assert made.dtype == np.float16 and np.isfinite(made).all()
    assert np.abs(made - exact(x, a, b, "B")).max() <= 1e-3 * np.abs(made).max()


def test_the_denominator_never_reaches_zero() -> None:
    """Form B's inner sum crosses minus one, where a plain 1 + sum would divide by zero."""
    a, b = np.array([0.0, 1.0], np.float32), np.array([1.0], np.float32)
    made = run(np.array([[-1.0, -0.999, -1.001]], np.float32), a, b, "B")
    assert np.allclose(made, [[-0.5, -0.999 / 1.999, -1.001 / 2.001]])


@settings(max_examples=40, deadline=None)
@given(
    x=arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(0, 4)), elements=numbers),
    degrees=st.sampled_from(DEGREES),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_custom_operator_is_the_trained_activation(
    x: np.ndarray, degrees: tuple[int, int], form: str, dtype: torch.dtype
) -> None:
    a, b = (torch.from_numpy(c) for c in coefficients(*degrees))
    tensor = torch.from_numpy(x).to(dtype)
    made = torch.ops.iapt.rational(tensor, a, b, form)
    assert made.dtype == dtype and made.shape == tensor.shape
    assert torch.equal(made.nan_to_num(7.0), rational(tensor, a, b, form).nan_to_num(7.0))


@pytest.mark.parametrize("form", FORMS)
def test_the_custom_operator_keeps_torchs_rules(form: str) -> None:
    a, b = (torch.from_numpy(c) for c in coefficients(5, 4))
    torch.library.opcheck(
        op.rational_op, (torch.randn(2, 3), a, b, form), test_utils=("test_schema", "test_faketensor")
    )


def test_registering_twice_does_nothing() -> None:
    op.register_schema()
    op.register_schema()
    schema: Any = onnx.defs.get_schema(RATIONAL, DOMAIN_VERSION, DOMAIN)
    assert [parameter.name for parameter in schema.inputs] == ["x", "numerator", "denominator"]
    assert list(op.translation_table()) == [torch.ops.iapt.rational.default]


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_body_holds_a_float_tensor_that_folding_tools_leave_alone(form):
    """They turn `value_float` into a double, see findings/value-float-becomes-double.sh."""
    constants = [node for node in op.rational_function(6, 5, form, 23).node if node.op_type == "Constant"]
    held = {attribute.name: attribute for node in constants for attribute in node.attribute}
    assert "value_float" not in held and held["value"].t.data_type == onnx.TensorProto.FLOAT
