"""Each own pass on graphs of a few nodes: what it ensures, where it does nothing, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from iapt_export.graphs.passes import ship_pipeline
from iapt_export.graphs.passes.add_rational_body import AddRationalBodyPass
from iapt_export.graphs.passes.check import CheckPass
from iapt_export.graphs.passes.fold_constants import MAX_ELEMENTS, FoldConstantsPass
from iapt_export.graphs.passes.fold_transposes import FoldTransposesPass
from iapt_export.graphs.passes.fuse_opset23 import FuseOpset23Pass
from iapt_export.graphs.passes.inline_rational import InlineRationalPass
from iapt_export.graphs.passes.name_interface import NameInterfacePass
from iapt_export.graphs.passes.name_nodes import SCOPES, NameNodesPass
from iapt_export.graphs.passes.widen_bfloat16 import WidenBfloat16Pass
from iapt_export.graphs.passes.write_sizes import WriteSizesPass
from tests.graphs import run_onnx


def parse(text: str, opset: int = 23, **weights: np.ndarray) -> ir.Model:
    """A model from onnx's text format, with initializers."""
    header = f'<ir_version: 10, opset_import: ["": {opset}, "ai.iapt": 1, "other": 1]>\n'
    model = onnx.parser.parse_model(header + text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(model)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    (made,) = run_onnx(ir.to_proto(model).SerializeToString(), feeds).values()
    return made


WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
X = np.arange(8, dtype=np.float32).reshape(2, 4)
LINEAR = "g (float[n, 4] x) => (float[n, 3] y)\n{ t = Transpose <perm = [1, 0]> (w)\n y = MatMul (x, t) }"


def test_transposed_weights_are_stored_transposed() -> None:
    model = parse(LINEAR, w=WEIGHT)
    result = FoldTransposesPass()(model)
    assert result.modified and operators(model) == ["MatMul"]
    (name,) = model.graph.initializers
    assert name == "w.transposed"
    assert np.array_equal(model.graph.initializers[name].const_value.numpy(), WEIGHT.T)
    assert np.array_equal(run(model, x=X), X @ WEIGHT.T)
    assert not FoldTransposesPass()(model).modified


def test_the_second_matrix_of_a_gemm_is_stored_as_it_is_read() -> None:
    model = parse("g (float[n, 4] x) => (float[n, 3] y)\n{ y = Gemm <transB = 1> (x, w, c) }", w=WEIGHT, c=X[0, :3])
    result = FoldTransposesPass()(model)
    assert result.modified and operators(model) == ["Gemm"]
    assert "transB" not in model.graph[0].attributes
    assert np.array_equal(model.graph.initializers["w.transposed"].const_value.numpy(), WEIGHT.T)
    assert np.allclose(run(model, x=X), X @ WEIGHT.T + X[0, :3], rtol=0, atol=1e-6)
    assert not FoldTransposesPass()(model).modified


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        # the weight is used as it is, too: a second copy would cost its memory
        (
            "g (float[n, 4] x) => (float[n, 3] y)\n"
            "{ t = Transpose <perm = [1, 0]> (w)\n z = MatMul (x, t)\n s = ReduceSum (w)\n y = Add (z, s) }",
            {"w": WEIGHT},
        ),
        # nothing is transposed
        (
            "g (float[n, 3] x) => (float[n, 4] y)\n{ t = Transpose <perm = [0, 1]> (w)\n y = MatMul (x, t) }",
            {"w": WEIGHT},
        ),
        # three dimensions
        (
            "g (float[n, 4] x) => (float[1, n, 3] y)\n{ t = Transpose <perm = [0, 2, 1]> (w)\n y = MatMul (x, t) }",
            {"w": WEIGHT[None]},
        ),
        # an input is no weight
        ("g (float[n, 4] x, float[3, 4] w) => (float[n, 3] y)\n{ t = Transpose (w)\n y = MatMul (x, t) }", {}),
    ],
    ids=["used twice", "identity", "three dimensions", "an input"],
)
def test_other_transposes_stay(text: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(text, **weights)
    before = ir.to_proto(model).SerializeToString()
    assert not FoldTransposesPass()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_a_transpose_without_perm_turns_a_matrix() -> None:
    model = parse(LINEAR.replace(" <perm = [1, 0]>", ""), w=WEIGHT)
    assert FoldTransposesPass()(model).modified
    assert np.array_equal(run(model, x=X), X @ WEIGHT.T)


def test_small_constants_are_folded_and_weights_are_not() -> None:
    text = "g (float[4] x) => (float[4] y)\n{ c = Add (a, b)\n y = Mul (x, c) }"
    model = parse(text, a=np.ones(4, np.float32), b=np.ones(4, np.float32))
    assert FoldConstantsPass()(model).modified
    assert "Add" not in operators(model)
    assert np.array_equal(run(model, x=X[0]), 2 * X[0])
    size = MAX_ELEMENTS + 1
    large = parse(text.replace("[4]", f"[{size}]"), a=np.ones(size, np.float32), b=np.ones(size, np.float32))
    FoldConstantsPass()(large)
    assert operators(large) == ["Add", "Mul"]


def test_spared_weights_are_not_folded_until_the_pass_runs_again() -> None:
    text = "g (float[4] x) => (float[4] y)\n{ c = Add (a, own.b)\n d = Add (a, a)\n e = Mul (c, d)\n y = Mul (x, e) }"
    model = parse(text.replace("own.b", "b"), a=np.ones(4, np.float32), b=np.ones(4, np.float32))
    model.graph.initializers["b"].name = "own.b"
    FoldConstantsPass(spared="own.")(model)
    assert operators(model) == ["Add", "Mul", "Mul"]  # what is computed of the weight stays, 2 a is folded
    assert model.graph.node(1).outputs[0].shape == ir.Shape([4])
    FoldConstantsPass(infer_shapes=False)(model)
    assert operators(model) == ["Mul"] and np.array_equal(run(model, x=X[0]), 4 * X[0])


def test_shapes_are_inferred_where_that_is_asked_for() -> None:
    text = "g (float[n, 4] x) => (float[n, 4] y)\n{ c = Relu (x)\n y = Neg (c) }"
    for infer in (True, False):
        model = parse(text)
        FoldConstantsPass(infer_shapes=infer)(model)
        assert (model.graph.node(0).outputs[0].shape is not None) == infer


def test_fusions_need_opset_23() -> None:
    text = "g (float[n, 4] x) => (float[n, 4] y)\n{ y = Relu (x) }"
    older = parse(text, opset=20)
    older_pass = FuseOpset23Pass(20)
    assert not older_pass(older).modified and older_pass.fused == {}
    newer_pass = FuseOpset23Pass(23)
    assert not newer_pass(parse(text)).modified
    assert newer_pass.fused and not any(newer_pass.fused.values()), "a zero tells that nothing matched"


def test_a_normalisation_with_an_fp32_scale_stays_what_onnx_accepts() -> None:
    """As Gemma has it in fp16: everything up to the scale in fp32, and back."""
    model = parse(
        "g (float16[n, 4] x) => (float16[n, 4] y)\n{ a = Cast <to = 1> (x)\n b = Pow (a, two)\n"
        "c = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> (b, last)\n d = Add (c, tiny)\n e = Sqrt (d)\n"
        "f = Reciprocal (e)\n h = Mul (a, f)\n i = Mul (h, scale)\n y = Cast <to = 10> (i) }",
        two=np.array(2, np.float32),
        last=np.array([-1]),
        tiny=np.array(1e-6, np.float32),
        scale=np.array([1, 2, 3, 4], np.float32),
    )
    FoldConstantsPass()(model)  # says the types of what is between
    half = X.astype(np.float16)
    wanted = run(model, x=half)
    step = FuseOpset23Pass(23)
    assert step(model).modified and step.fused["RMSNormalization"] == 1
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model) == ["Cast", "RMSNormalization", "Cast"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert np.array_equal(run(model, x=half), wanted)


FORMS = {(6, 4, "B")}
RATIONAL = (
    'g (float[n, 4] x, float[6] a, float[4] b) => (float[n, 4] y)\n{ y = ai.iapt.Rational <form = "B"> (x, a, b) }'
)


@pytest.mark.parametrize("form", ["A", "B"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_an_inlined_activation_is_the_function(form: str, dtype: str) -> None:
    text = RATIONAL.replace('"B"', f'"{form}"').replace("float[n, 4]", f"{dtype}[n, 4]")
    whole, model = parse(text), parse(text)
    AddRationalBodyPass(FORMS, 23)(whole)
    model.graph.node(0).metadata_props[SCOPES] = "['', 'backbone', 'backbone.layers.0', 'rational']"
    step = InlineRationalPass(FORMS, 23)
    assert step(model).modified and step.note == "1 rational activations are written as standard operators"
    assert not model.functions and "ai.iapt" not in model.opset_imports
    NameNodesPass()(model)
    assert {str(node.name).rpartition("/")[0] for node in model.graph} == {"layers.0.rational"}
    source = np.random.default_rng(0)
    feeds = {"x": source.normal(size=(3, 4)).astype(np.float16 if dtype == "float16" else np.float32)}
    feeds |= {name: source.normal(size=size).astype(np.float32) for name, size in (("a", 6), ("b", 4))}
    assert np.array_equal(run(model, **feeds), run(whole, **feeds))
    assert not step(model).modified


def test_an_activation_outside_of_modules_is_inlined_too() -> None:
    model = parse(RATIONAL)
    model.graph.node(0).metadata_props[SCOPES] = "['', 'rational']"
    InlineRationalPass(FORMS, 23)(model)
    NameNodesPass()(model)
    assert all(str(node.name).startswith("/") for node in model.graph)


BY_PARTS = (
    "g (float[n, t, 8] x, int64[1] n_now, int64[1] t_now) => (float[n, t, 2, 4] y)\n{"
    " s = Concat <axis = 0> (n_now, t_now, infer, four)\n y = Reshape <allowzero = 1> (x, s) }"
)


def test_a_size_that_is_known_is_written_down() -> None:
    model = parse(BY_PARTS, infer=np.array([-1]), four=np.array([4]))
    step = WriteSizesPass()
    assert step(model).modified and step.note == "1 sizes of reshapes and 0 values of constants are written down"
    sizes = model.graph.node(-1).inputs[1].producer()
    assert [part.producer().attributes["value"].as_tensor().numpy().tolist() for part in sizes.inputs[2:3]] == [[2]]
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    feeds = {"x": x, "n_now": np.array([2]), "t_now": np.array([3])}
    assert np.array_equal(run(model, **feeds), x.reshape(2, 3, 2, 4))
    assert not step(model).modified


@pytest.mark.parametrize(("infer", "shape"), [([-1], "n, t, heads, 4"), ([2], "n, t, 2, 4")])
def test_a_size_that_nobody_knows_stays(infer: list[int], shape: str) -> None:
    model = parse(BY_PARTS.replace("n, t, 2, 4", shape), infer=np.array(infer), four=np.array([4]))
    assert not WriteSizesPass()(model).modified


def test_a_constant_of_a_shape_says_what_it_holds() -> None:
    model = parse("g (int64[1] s) => (float[n] y)\n{ y = ConstantOfShape (s) }")
    wanted = run(model, s=np.array([3]))
    assert WriteSizesPass()(model).modified
    assert "value" in model.graph.node(0).attributes
    made = run(model, s=np.array([3]))
    assert made.dtype == wanted.dtype == np.float32 and np.array_equal(made, wanted)
    assert not WriteSizesPass()(model).modified


NARROW = (
    "g (float[n, 4] x) => (float[n, 4] y)\n<bfloat16[n, 4] b, bfloat16[n, 4] d, bfloat16[n, 4] m>\n"
    "{ b = Cast <to = 16> (x)\n d = DTYPE (b, b)\n m = Div (d, third)\n y = Cast <to = 1> (m) }"
)


@pytest.mark.parametrize(("operator", "computed"), [("Add", torch.add), ("Mul", torch.mul), ("Sub", torch.sub)])
def test_stray_bfloat16_is_computed_by_every_runtime_as_pytorch_does(
    operator: str, computed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    third = torch.tensor(0.3).bfloat16()
    model = parse(NARROW.replace("DTYPE", operator), third=third.float().numpy().astype(ml_dtypes.bfloat16))
    step = WidenBfloat16Pass(spec())
    assert step(model).modified and step.note == "2 operators of bfloat16 are computed in fp32 and rounded"
    narrow = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(run(model, x=x), (computed(narrow, narrow) / third).float().numpy())
    assert not step(model).modified


def test_a_graph_in_bfloat16_stays_so() -> None:
    narrow = GraphSpec("prefill.onnx", [TensorSpec("x", "fp32", ["n", 4])], [TensorSpec("y", "bf16", ["n", 4])])
    model = parse(NARROW.replace("DTYPE", "Add"), third=np.array(0.3, ml_dtypes.bfloat16))
    assert not WidenBfloat16Pass(narrow)(model).modified


def test_the_rational_body_comes_with_its_nodes_only() -> None:
    plain = parse("g (float[n] x) => (float[n] y)\n{ y = Relu (x) }")
    assert not AddRationalBodyPass(FORMS, 23)(plain).modified and not plain.functions
    model = parse(RATIONAL)
    for _ in range(2):
        assert AddRationalBodyPass(FORMS, 23)(model).modified
    assert [key[:2] for key in model.functions] == [("ai.iapt", "Rational")]
    assert model.opset_imports["ai.iapt"] == 1
    ones = np.ones(6, np.float32)
    assert np.isfinite(run(model, x=X, a=ones, b=ones[:4])).all()


def spec(inputs: int = 2, outputs: int = 1) -> GraphSpec:
    return GraphSpec(
        "prefill.onnx",
        [TensorSpec("input_ids", "int64", ["batch", "sequence"]), TensorSpec("bias", "fp32", ["batch", 1])][:inputs],
        [TensorSpec("logits", "fp32", ["batch", "sequence"])][:outputs],
    )


TRACED = (
    "g (int64[s0, s43] arg0, float[s0, 1] arg1) => (float[s0, s43] out)\n"
    "<float[s0, s43] f, float[s0, s43] h>\n"
    '{ f = Cast <to = 1> (arg0)\n h = Add (f, arg1)\n out = Mul (h, "backbone.w") }'
)


def traced() -> ir.Model:
    return parse(TRACED.replace('"backbone.w"', "w"), w=np.ones(1, np.float32))


def test_the_interface_names_everything() -> None:
    model = traced()
    model.graph.initializers["w"].name = "backbone.layers.0.w"
    model.graph.inputs[0].metadata_props["pkg.torch.x"] = "y"
    wide = model.graph.node(1).outputs[0]
    wide.shape = ir.Shape(["s0", "s43 + 4"])
    assert NameInterfacePass(spec())(model).modified
    assert [value.name for value in model.graph.inputs] == ["input_ids", "bias"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert [str(size) for size in model.graph.inputs[0].shape] == ["batch", "sequence"]
    assert [str(size) for size in wide.shape] == ["batch", "sequence + 4"]
    assert list(model.graph.initializers) == ["layers.0.w"]
    assert not model.graph.inputs[0].metadata_props


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (spec(inputs=1), "prefill.onnx: 2 inputs were traced, expected 1"),
        (spec(outputs=0), "prefill.onnx: 1 outputs were traced, expected 0"),
    ],
)
def test_another_number_of_inputs_or_outputs(wanted: GraphSpec, text: str) -> None:
    with pytest.raises(IaptError) as caught:
        NameInterfacePass(wanted)(traced())
    assert text in reason(caught.value)


def reason(error: BaseException) -> str:
    """onnx_ir may wrap what a pass raises."""
    return f"{error} {error.__cause__ or ''}"


def named() -> ir.Model:
    model = traced()
    NameInterfacePass(spec())(model)
    return model


def test_a_good_graph_passes_and_is_not_changed() -> None:
    model = named()
    before = ir.to_proto(model).SerializeToString()
    assert not CheckPass(spec(), 23)(model).modified
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("damage", "opset", "text"),
    [
        (lambda m: setattr(m.graph.node(1), "domain", "other"), 23, "has the operator other::Add of an unknown domain"),
        (lambda m: None, 20, "opset is 23, planned was 20"),
        (lambda m: setattr(m.graph.inputs[1], "name", "other"), 23, "bias became other of type FLOAT, expected fp32"),
        (
            lambda m: setattr(m.graph.outputs[0], "type", ir.TensorType(ir.DataType.FLOAT16)),
            23,
            "logits became logits of type FLOAT16, expected fp32",
        ),
        (lambda m: m.graph.node(0).metadata_props.update(path="/home"), 23, "still carries metadata"),
        (lambda m: setattr(m.graph.node(0), "doc_string", "text"), 23, "still carries metadata"),
        (lambda m: m.graph.inputs[0].metadata_props.update(a="b"), 23, "value input_ids still carries metadata"),
    ],
)
def test_what_the_last_check_refuses(damage: Callable[[ir.Model], object], opset: int, text: str) -> None:
    model = named()
    damage(model)
    with pytest.raises(IaptError) as caught:
        CheckPass(spec(), opset)(model)
    assert "prefill.onnx cannot be shipped: " in reason(caught.value) and text in reason(caught.value)


def test_the_last_check_lists_everything() -> None:
    model = named()
    model.graph.node(0).doc_string = "text"
    model.graph.inputs[1].name = "other"
    with pytest.raises(IaptError) as caught:
        CheckPass(spec(), 20)(model)
    assert reason(caught.value).count("; ") == 2


def test_the_pipeline_is_one_list_that_ends_with_the_check() -> None:
    pipeline = ship_pipeline(spec(), FORMS, 23)
    names = [type(step).__name__ for step in pipeline.passes]
    assert names[-1] == "CheckPass" and names.count("CheckPass") == 1
    assert names.index("FuseOpset23Pass") < names.index("NameInterfacePass") < names.index("AddRationalBodyPass")
    model = traced()
    for node in model.graph:
        node.metadata_props[SCOPES] = "['', 'backbone', 'node']"
    model = pipeline(model).model
    assert np.array_equal(
        run(model, input_ids=np.ones((2, 3), np.int64), bias=np.ones((2, 1), np.float32)), np.full((2, 3), 2.0)
    )
