"""A third opinion: ONNX's own reference evaluator runs the shipped graphs, and the activation is held against exact
rational arithmetic. Neither shares code with PyTorch or ONNX Runtime."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from iapt_export.contract.manifest import BundleManifest, GraphSpec
from iapt_export.graphs.ops.rational_op import rational_function
from tests.bundles import TinyBuild
from tests.graphs import worst
from trainers.decoder.backbone import load_backbone
from trainers.methods.rational import PUBLISHED
from validation.sides.reference import Reference
from validation.sides.stepping import Row, run_steps, session_with
from validation.sides.truth import padded

ROWS = [Row("gamma", (5, 9, 30, 7, 250, 12), (7, 11)), Row("alpha", (3, 40), (2, 6))]


class EvaluatorRunner:
    """A graph on ``onnx.reference``: slow, plain NumPy, and nobody's kernel."""

    def __init__(self, path: Path, spec: GraphSpec) -> None:
        self.spec = spec
        self.evaluator: Any = ReferenceEvaluator(str(path))

    def activate(self) -> None:
        """Nothing to load."""

    def deactivate(self) -> None:
        """Nothing to give back."""

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = {name: feeds[name] for name in self.evaluator.input_names}
        return dict(zip(self.evaluator.output_names, self.evaluator.run(None, known), strict=True))


@pytest.fixture(scope="module")
def steps(tiny_build: TinyBuild) -> dict[str, list[tuple[np.ndarray, list[Any]]]]:
    """Logits and caches of each step, by the reference evaluator and by ONNX Runtime."""
    manifest = BundleManifest.load(tiny_build.bundle)
    target = manifest.target()
    plain: Any = {
        name: EvaluatorRunner(tiny_build.bundle / target.graphs[name].path, target.graphs[name])
        for name in ("prefill", "decode")
    }
    found = {}
    for name, runners in (("evaluator", plain), ("onnxruntime", {})):
        with session_with(tiny_build.bundle, manifest, target, runners, in_place=False) as session:
            found[name] = [(step.logits, step.caches()) for step in run_steps(session, ROWS, 3)]
    return found


def test_prefill_and_decode_agree_with_onnx_runtime(steps: dict[str, list[tuple[np.ndarray, list[Any]]]]) -> None:
    for (made, caches), (wanted, others) in zip(steps["evaluator"], steps["onnxruntime"], strict=True):
        assert worst(made, wanted) < 2e-5
        for cache, other in zip(caches, others, strict=True):
            for pair, expected in zip(cache, other, strict=True):
                assert all(worst(a, b) < 2e-5 for a, b in zip(pair, expected, strict=True))


def test_prefill_agrees_with_pytorch(
    tiny_build: TinyBuild, steps: dict[str, list[tuple[np.ndarray, list[Any]]]]
) -> None:
    reference = Reference(
        tiny_build.bundle, BundleManifest.load(tiny_build.bundle), load_backbone(str(tiny_build.model))
    )
    for row, logits in zip(ROWS, steps["evaluator"][0][0], strict=True):
        wanted, _ = reference.prefill(row.tenant, *padded([row.tokens], 1))
        assert worst(logits, wanted[0].numpy()) < 2e-5


def test_the_evaluator_notices_a_changed_graph(tiny_bundle: Path, tiny_build: TinyBuild) -> None:
    from tests.validation.sabotage import everybody_is_the_first_tenant

    everybody_is_the_first_tenant(tiny_bundle)
    logits = []
    for bundle in (tiny_bundle, tiny_build.bundle):
        manifest = BundleManifest.load(bundle)
        runners: Any = {"prefill": EvaluatorRunner(bundle / "prefill.onnx", manifest.target().graphs["prefill"])}
        with session_with(bundle, manifest, manifest.target(), runners, in_place=False) as session:
            logits.append(next(iter(run_steps(session, ROWS, 1))).logits)
    assert worst(logits[0][0], logits[1][0]) > 1e-2 and worst(logits[0][1], logits[1][1]) == 0.0


def exact(x: float, numerator: list[float], denominator: list[float], form: str) -> Fraction:
    """The activation without any rounding, straight from its definition."""
    value = Fraction(x)
    top = sum((Fraction(a) * value**power for power, a in enumerate(numerator)), Fraction(0))
    terms = [Fraction(b) * value**power for power, b in enumerate(denominator, start=1)]
    tail = sum(map(abs, terms), Fraction(0)) if form == "A" else abs(sum(terms, Fraction(0)))
    return top / (1 + tail)


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_activation_agrees_with_exact_arithmetic(form: str) -> None:
    numerator, denominator = (np.array(values, np.float32) for values in PUBLISHED[form, "gelu"])
    x = np.concatenate([np.linspace(-8, 8, 201), [0.0, 1e-20, -1e-20, 30.0, -30.0]]).astype(np.float32)
    function = rational_function(6, 4, form, 23)
    node = onnx.helper.make_node("Rational", ["x", "a", "b"], ["y"], domain="ai.iapt", form=form)
    shapes = {"x": [len(x)], "a": [6], "b": [4]}
    inputs = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_tensor_value_info("y", 1, None)])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("ai.iapt", 1)]
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets)
    (made,) = ReferenceEvaluator(model).run(None, {"x": x, "a": numerator, "b": denominator})
    wanted = [exact(float(value), numerator.tolist(), denominator.tolist(), form) for value in x]
    errors = [
        abs(float(Fraction(float(y)) - right)) / max(1.0, abs(float(right)))
        for y, right in zip(made, wanted, strict=True)
    ]
    assert max(errors) < 1e-6
    other = [exact(float(value), numerator.tolist(), denominator.tolist(), "AB".replace(form, "")) for value in x]
    assert max(abs(float(a - b)) for a, b in zip(wanted, other, strict=True)) > 1e-2, "the forms must differ here"
