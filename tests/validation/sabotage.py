"""Ways in which a bundle can be subtly wrong; each changes one thing and leaves everything else whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from iapt_export.graphs.ops.rational_op import rational_function
from iapt_export.graphs.passes.inline_rational import RATIONAL_MODULE


def between(bundle: Path, file: str, value: str, operator: str, constant: int) -> None:
    """Put ``operator(value, constant)`` between an int64 input and everything that reads it."""
    model = onnx.load(bundle / file, load_external_data=False)
    wrong = f"{value}.wrong"
    readers = [node for node in model.graph.node if value in node.input]
    assert readers, f"nothing in {file} reads {value}"
    for node in readers:
        names = [wrong if name == value else name for name in node.input]
        del node.input[:]
        node.input.extend(names)
    model.graph.initializer.append(numpy_helper.from_array(np.array(constant, np.int64), f"{value}.constant"))
    model.graph.node.insert(0, helper.make_node(operator, [value, f"{value}.constant"], [wrong]))
    (bundle / file).write_bytes(model.SerializeToString())


def one_weight(bundle: Path) -> None:
    """Change a single number of the last layer's MLP."""
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.startswith("model.layers.1.mlp.down_proj"))
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    data = np.memmap(bundle / "weights.data", np.float32, "r+", offset, (1,))
    data += 1.0
    data.flush()


def everybody_is_the_first_tenant(bundle: Path) -> None:
    between(bundle, "prefill.onnx", "iapt.tenant_index", "Mul", 0)


def generators_of_the_first_tenant(bundle: Path) -> None:
    between(bundle, "generator.onnx", "iapt.tenant_index", "Mul", 0)


def position_off_by_one(bundle: Path) -> None:
    between(bundle, "decode.onnx", "position_ids", "Add", 1)


def no_mask_in_prefill(bundle: Path) -> None:
    between(bundle, "prefill.onnx", "attention_mask", "Max", 1)


def no_mask_in_decode(bundle: Path) -> None:
    between(bundle, "decode.onnx", "attention_mask", "Max", 1)


def wrong_activation_form(bundle: Path) -> None:
    for file in ("prefill.onnx", "generator.onnx"):
        model = onnx.load(bundle / file, load_external_data=False)
        if file == "prefill.onnx":
            as_nodes(model)
        del model.functions[:]
        model.functions.append(rational_function(6, 4, "A", 23))
        for node in model.graph.node:  # a compiled kernel does not read the body
            if node.op_type == "Rational":
                next(attribute for attribute in node.attribute if attribute.name == "form").s = b"A"
        (bundle / file).write_bytes(model.SerializeToString())


def as_nodes(model: onnx.ModelProto) -> None:
    """Make nodes again of rational activations that are written in standard operators."""
    modules: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if (path := node.name.rpartition("/")[0]).endswith(RATIONAL_MODULE):
            modules.setdefault(path, []).append(node)
    for path, nodes in modules.items():
        coefficients = [node.input[0] for node in nodes if node.op_type == "Split"]
        variable = next(node.input[1] for node in nodes if node.op_type == "Mul")
        name = f"{path.removesuffix(RATIONAL_MODULE)}/Rational"
        whole = helper.make_node(
            "Rational", [variable, *coefficients], nodes[-1].output, name, domain="ai.iapt", form="B"
        )
        model.graph.node.insert(list(model.graph.node).index(nodes[-1]), whole)
        for node in nodes:
            model.graph.node.remove(node)
    model.opset_import.append(helper.make_opsetid("ai.iapt", 1))


SABOTAGES: dict[Callable[[Path], None], tuple[set[str], set[str]]] = {
    one_weight: ({"prefill logits", "decode logits", "greedy tokens"}, {"generator"}),
    everybody_is_the_first_tenant: ({"prefill logits", "prefill cache", "decode logits"}, {"generator"}),
    generators_of_the_first_tenant: ({"generator"}, {"prefill logits", "decode logits", "greedy tokens"}),
    position_off_by_one: ({"decode logits", "decode cache"}, {"generator", "prefill logits", "prefill cache"}),
    no_mask_in_prefill: ({"prefill logits", "prefill cache", "decode logits"}, {"generator"}),
    no_mask_in_decode: ({"decode logits"}, {"generator", "prefill logits", "prefill cache"}),
    wrong_activation_form: ({"generator", "prefill logits", "prefill cache"}, set()),
}
"""Sabotage to the stages that must fail, and those that must still hold."""
