"""``libiapt_ops.so`` computes what NumPy computes, to the last bit, and runs instead of the function body."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engines.doctor import diagnose
from engines.native import BODY, KERNEL, OPS_VARIABLE, add_kernels, ops_library
from engines.onnxruntime.runner import OnnxRuntimeRunner, _array_from_value
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from tests.iapt_export.graphs.test_rational_op import DEGREES, FORMS, KINDS, SPECIAL, coefficients, model, numbers
from tests.native.built import OPS, needs_ops
from validation.validate import environment

pytestmark = needs_ops


def reference(x: np.ndarray, a: np.ndarray, b: np.ndarray, form: str) -> np.ndarray:
    """The operator's definition in NumPy, fp32 by Horner's rule."""
    v = x.astype(np.float32)
    top = horner(v, a)
    tail = np.abs(v) * horner(np.abs(v), np.abs(b)) if form == "A" else np.abs(v * horner(v, b))
    return (top / (np.float32(1) + tail)).astype(x.dtype)


def horner(v: np.ndarray, c: np.ndarray) -> np.ndarray:
    value = c[..., -1:] + np.zeros_like(v)
    for index in range(c.shape[-1] - 2, -1, -1):
        value = value * v + c[..., index : index + 1]
    return value


@functools.cache
def session(m: int, n: int, form: str, dtype: str, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(OPS))
    return onnxruntime.InferenceSession(model(m, n, form, dtype).SerializeToString(), options)


def run(x: np.ndarray, a: np.ndarray, b: np.ndarray, form: str, dtype: str = "fp32", threads: int = 1) -> np.ndarray:
    runner = session(a.shape[-1] - 1, b.shape[-1], form, dtype, threads)
    if dtype != "bf16":
        return runner.run(None, {"x": x, "a": a, "b": b})[0]
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), onnx.TensorProto.BFLOAT16)
    rest = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in (("a", a), ("b", b))}
    (made,) = runner.run_with_ort_values(["y"], {"x": value, **rest})
    return _array_from_value(made)


def assert_equal(made: np.ndarray, wanted: np.ndarray) -> None:
    """Bit for bit, signs of zero included; NaN for NaN."""
    assert made.dtype == wanted.dtype and made.shape == wanted.shape
    made, wanted = made.astype(np.float32), wanted.astype(np.float32)
    assert np.array_equal(made, wanted, equal_nan=True)
    finite = ~np.isnan(wanted)
    assert np.array_equal(np.signbit(made[finite]), np.signbit(wanted[finite]))


@settings(max_examples=200, deadline=None)
@given(
    x=arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 70)), elements=numbers),
    degrees=st.sampled_from(DEGREES),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    per_row=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_kernel_is_the_formula(
    x: np.ndarray, degrees: tuple[int, int], form: str, dtype: str, per_row: bool, seed: int
) -> None:
    """Signs, zeros, denormals, huge values, infinities, NaN, empty tensors, one tenant's coefficients for each row."""
    a, b = coefficients(*degrees, (x.shape[0], 1) if per_row else (), seed)
    with np.errstate(all="ignore"):
        x = x.astype(KINDS[dtype][1])
        assert_equal(run(x, a, b, form, dtype), reference(x, a, b, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", range(1, 9))
def test_every_pair_of_degrees_has_a_kernel(m: int, form: str) -> None:
    x = np.array([[*SPECIAL, *np.linspace(-6, 6, 33, dtype=np.float32)]], np.float32)
    with np.errstate(all="ignore"):
        for n in range(1, 9):
            a, b = coefficients(m, n)
            assert_equal(run(x, a, b, form), reference(x, a, b, form))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_16_bit_number_is_read_and_written_as_numpy_does(dtype: str) -> None:
    """R(x) = x shows the conversions alone."""
    x = np.arange(65536, dtype=np.uint16).view(KINDS[dtype][1]).reshape(1, -1)
    identity = np.array([0.0, 1.0], np.float32), np.array([0.0], np.float32)
    with np.errstate(all="ignore"):
        assert_equal(run(x, *identity, "A", dtype), reference(x, *identity, "A"))
        # halves between two neighbours are ties, and numbers beyond the largest become infinite
        a, b = np.array([0.0, 1.5], np.float32), np.array([0.0], np.float32)
        assert_equal(run(x, a, b, "B", dtype), reference(x, a, b, "B"))


def test_rows_that_a_wide_tensor_shares_between_threads() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 9001)).astype(np.float32)
    a, b = coefficients(5, 4, (3, 1))
    assert_equal(run(x, a, b, "B", threads=2), reference(x, a, b, "B"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (4, 5)])
def test_coefficients_broadcast_over_any_axis(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).normal(size=(4, 5, 33)).astype(np.float32)
    a, b = coefficients(5, 4, shape)
    assert_equal(run(x, a, b, "A"), reference(x, a, b, "A"))
    assert_equal(run(x, a[:1, :1], b, "A"), reference(x, a[:1, :1], b, "A"))


@pytest.mark.parametrize(
    ("x", "a", "b", "text"),
    [
        ((2, 3), (10,), (1,), "numerator has 10 coefficients, expected 1 to 9"),
        ((2, 3), (2,), (9,), "denominator has 9 coefficients, expected 1 to 8"),
        ((2, 3), (3, 2), (1,), "numerator has size 3 where x has 2; expected the same, or 1"),
        ((2, 3), (1, 1, 2), (1,), "numerator has 3 dimensions, expected 1 to 2"),
        ((1,) * 9, (2,), (1,), "x has 9 dimensions, expected 1 to 8"),
    ],
)
def test_wrong_shapes_are_refused(x: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], text: str) -> None:
    arrays_ = {"x": np.ones(x, np.float32), "a": np.ones(a, np.float32), "b": np.ones(b, np.float32)}
    with pytest.raises(Exception, match=text):
        session(1, 1, "B", "fp32").run(None, arrays_)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(Exception, match="form is 'C', expected A or B"):
        session_of_form("C")


def session_of_form(form: str) -> Any:
    made = model(1, 1, "B", "fp32")
    made.graph.node[0].attribute[0].s = form.encode()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(OPS))
    return onnxruntime.InferenceSession(made.SerializeToString(), options)


def test_the_runner_uses_the_kernel_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rational.onnx"
    onnx.save(model(5, 4, "B", "fp32", shaped=True), path)
    inputs = [TensorSpec("x", "fp32", ["rows", "r"]), TensorSpec("a", "fp32", [6]), TensorSpec("b", "fp32", [4])]
    spec = GraphSpec("rational.onnx", inputs, [TensorSpec("y", "fp32", ["rows", "r"])])
    a, b = coefficients(5, 4)
    feeds = {"x": np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4), "a": a, "b": b}
    made = {}
    for form, variable in ((KERNEL, str(OPS)), (BODY, "none")):
        monkeypatch.setenv(OPS_VARIABLE, variable)
        with OnnxRuntimeRunner(path, spec) as runner:
            assert runner.rational == form
            made[form] = runner.infer(feeds)["y"]
    assert_equal(made[KERNEL], made[BODY])


def test_doctor_and_report_say_which_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, form in ((str(OPS), KERNEL), ("none", BODY)):
        monkeypatch.setenv(OPS_VARIABLE, variable)
        assert environment("cpu")["ai.iapt::Rational"] == form
        (runtime,) = (finding for finding in diagnose() if finding.name == "onnxruntime")
        assert f"ai.iapt::Rational as {form}" in runtime.detail


def test_a_library_that_does_not_load_leaves_the_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libiapt_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv(OPS_VARIABLE, str(broken))
    assert add_kernels(onnxruntime.SessionOptions()).startswith(f"{BODY} (libiapt_ops.so does not load: ")
    monkeypatch.setenv(OPS_VARIABLE, str(tmp_path / "elsewhere.so"))
    assert add_kernels(onnxruntime.SessionOptions()).startswith(f"{BODY} (elsewhere.so does not load: ")
    monkeypatch.delenv(OPS_VARIABLE)
    assert ops_library() == OPS


def test_bfloat16_stays_numpys_type() -> None:
    made = run(np.ones((1, 2), ml_dtypes.bfloat16), *coefficients(1, 1), "A", "bf16")
    assert made.dtype == ml_dtypes.bfloat16
