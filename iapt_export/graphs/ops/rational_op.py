"""``ai.iapt::Rational``: the learned activation as one ONNX operator in two forms.

The node ``y = Rational(x, numerator, denominator)`` with attribute ``form`` ("A" or "B") lets a
runtime with a native kernel use it; the model-local function of the same name, made of standard
operators, serves every other one. Both evaluate in fp32 by Horner's rule (see `trainers.methods.rational`).

    x            [...]        any float type; y has its shape and type
    numerator    [..., m+1]   fp32, ascending powers; each [..., j:j+1] slice broadcasts against x
    denominator  [..., n]     fp32, powers 1 to n, broadcast alike
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.parser
import torch
from onnxscript import values
from torch import Tensor

from iapt_export.graphs.ops import DOMAIN, DOMAIN_VERSION, RATIONAL
from trainers.methods.rational import rational as _eager


@torch.library.custom_op("iapt::rational", mutates_args=())
def rational_op(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """`trainers.methods.rational.rational` as an opaque operator, so that tracing keeps it as one node."""
    return _eager(x, numerator, denominator, form).clone()


@rational_op.register_fake
def _(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    return torch.empty_like(x)


def register_schema() -> None:
    """Tell onnx the operator's signature; the exporter's translation and onnx's checker look it up."""
    if onnx.defs.has(RATIONAL, DOMAIN):
        return
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    parameter = onnx.defs.OpSchema.FormalParameter
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            RATIONAL,
            DOMAIN,
            DOMAIN_VERSION,
            doc="Learnable rational activation, evaluated in fp32.",
            inputs=[
                parameter("x", "T"),
                parameter("numerator", "tensor(float)"),
                parameter("denominator", "tensor(float)"),
            ],
            outputs=[parameter("y", "T")],
            type_constraints=[("T", floats, "")],
            attributes=[onnx.defs.OpSchema.Attribute("form", onnx.defs.OpSchema.AttrType.STRING, "A or B")],
        )
    )


def translation_table() -> dict[Any, Any]:
    """What ``torch.onnx.export(custom_translation_table=...)`` needs to emit the node."""
    register_schema()
    opset = values.Opset(DOMAIN, DOMAIN_VERSION)

    def emit(x: Any, numerator: Any, denominator: Any, form: str) -> Any:
        return opset.Rational(x, numerator, denominator, form=form)

    return {torch.ops.iapt.rational.default: emit}


def rational_function(num_numerator: int, num_denominator: int, form: str, opset: int) -> onnx.FunctionProto:
    """The operator's body in standard ONNX operators, for one degrees pair and form.

    Args:
        num_numerator: m + 1 coefficients.
        num_denominator: n coefficients.
        form: ``"A"`` or ``"B"``.
        opset: version of the standard operators.

    Returns:
        The function; its ``form`` attribute is declared so that nodes carrying it match.
    """
    a = [f"a{j}" for j in range(num_numerator)]
    b = [f"b{k + 1}" for k in range(num_denominator)]
    lines = ["v = Cast <to = 1> (x)"]
    lines += _split("numerator", a) + _split("denominator", b)
    lines += _horner("v", a, "top")
    if form == "A":
        lines += ["s = Abs (v)"] + [f"{name}_abs = Abs ({name})" for name in b]
        lines += _horner("s", [f"{name}_abs" for name in b], "inner")
        lines += ["tail = Mul (s, inner)"]
    else:
        lines += [*_horner("v", b, "inner"), "signed = Mul (v, inner)", "tail = Abs (signed)"]
    # a tensor, because tools that fold constants (polygraphy, onnxslim) turn `value_float` into a double
    lines += ["one = Constant <value = float {1.0}> ()", "bottom = Add (one, tail)"]
    lines += ["ratio = Div (top, bottom)", "y = CastLike (ratio, x)"]
    body = "\n  ".join(lines)
    return onnx.parser.parse_function(
        f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n'
        f"{RATIONAL} <form> (x, numerator, denominator) => (y)\n{{\n  {body}\n}}"
    )


def _split(source: str, names: list[str]) -> list[str]:
    if len(names) == 1:
        return [f"{names[0]} = Identity ({source})"]
    return [f"{', '.join(names)} = Split <axis = -1, num_outputs = {len(names)}> ({source})"]


def _horner(variable: str, coefficients: list[str], result: str) -> list[str]:
    """Lines that leave ``sum_j coefficients[j] variable^j`` in ``result``."""
    value, lines = coefficients[-1], []
    for step, name in enumerate(reversed(coefficients[:-1])):
        lines.append(f"{result}_m{step} = Mul ({value}, {variable})")
        value = f"{result}_s{step}"
        lines.append(f"{value} = Add ({result}_m{step}, {name})")
    return [*lines, f"{result} = Identity ({value})"]
