"""Backbone and methods in, ONNX graphs out: trace, pass, save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import GraphSpec
from iapt_export.graphs.installed import Installed, rational_forms
from iapt_export.graphs.interface import OPSETS, ModelShape
from iapt_export.graphs.passes import ship_pipeline
from iapt_export.graphs.passes.quantise_weights import QuantiseWeightsPass
from iapt_export.graphs.save import save_graphs
from iapt_export.graphs.table import TABLE, graph_specs
from iapt_export.graphs.table import Serving as Serving
from iapt_export.graphs.trace import trace_graph


def export_graphs(
    backbone: Any,
    installed: list[Installed],
    folder: Path,
    *,
    dtype: str,
    opset: int,
    names: tuple[str, ...] | None = None,
    serving: Serving | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, GraphSpec]:
    """Write the graphs (``prefill.onnx``, ``decode.onnx``, ...) and their shared ``weights.data``.

    Args:
        backbone: the transformers model, loaded in ``dtype``.
        installed: the bundle's methods.
        folder: an existing, empty folder.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        opset: 20 or 23.
        names: which graphs; None writes all that the methods need.
        serving: what the graphs over a cache in place need to know besides.
        on_step: called with a word on each step, for progress.

    Returns:
        The graphs' interfaces.

    Raises:
        IaptError: unknown opset, or a backbone that cannot be traced or shipped.
    """
    if opset not in OPSETS:
        raise IaptError(f"opset {opset} is not supported; use one of {', '.join(map(str, OPSETS))}")
    serving = serving or Serving()
    specs = graph_specs(installed, ModelShape.from_config(backbone.config), dtype, serving.capacity)
    models = {}
    forms = rational_forms(installed)
    for name in names or specs:
        on_step(f"tracing {name}.onnx")
        model = trace_graph(name, backbone, installed, specs[name], opset)
        on_step(f"passes over {name}.onnx")
        own = TABLE[name].passes(serving)
        own += [QuantiseWeightsPass(serving.weight_bits)] if serving.weight_bits else []
        passes = ship_pipeline(specs[name], forms, TABLE[name].opset or opset, own)
        models[name] = passes(model).model
    on_step("writing graphs and weights")
    save_graphs(models, folder)
    return specs
