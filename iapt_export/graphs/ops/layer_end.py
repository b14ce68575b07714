"""``ai.iapt.trace::LayerEnd(hidden)``: marks where a decoder layer ends, between tracing and `..lay_out`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import onnx
import torch
from onnxscript import values
from torch import Tensor, nn

from iapt_export.graphs.ops.serving_ops import MARKER_DOMAIN

LAYER_END = "LayerEnd"


@torch.library.custom_op("iapt::layer_end", mutates_args=())
def layer_end(hidden: Tensor, layer: int) -> Tensor:
    """``hidden`` as it is, said to be what ``layer`` made."""
    return hidden.clone()


@layer_end.register_fake
def _(hidden: Tensor, layer: int) -> Tensor:
    return torch.empty_like(hidden)


@contextmanager
def layers_marked(layers: nn.ModuleList) -> Iterator[None]:
    """Mark what each layer gives out while the context is open."""

    def hook_for(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (torch.ops.iapt.layer_end(output[0], index), *output[1:])
            return torch.ops.iapt.layer_end(output, index)

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(hook_for(index)).remove)
        yield


def translation_table() -> dict[Any, Any]:
    """What ``torch.onnx.export(custom_translation_table=...)`` needs for this operator."""
    if not onnx.defs.has(LAYER_END, MARKER_DOMAIN):
        schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
        types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
        onnx.defs.register_schema(
            schema(
                LAYER_END,
                MARKER_DOMAIN,
                1,
                doc="Marks what a decoder layer gives out.",
                inputs=[parameter("hidden", "T")],
                outputs=[parameter("same", "T")],
                type_constraints=[("T", types, "")],
                attributes=[schema.Attribute("layer", schema.AttrType.INT, "index of the layer")],
            )
        )
    marker = values.Opset(MARKER_DOMAIN, 1)

    def end(hidden: Any, layer: int) -> Any:
        return marker.LayerEnd(hidden, layer=layer)

    return {torch.ops.iapt.layer_end.default: end}
