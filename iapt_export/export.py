"""Backbone and generator contract in, ONNX graphs out: trace, pass, save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iapt_export.errors import IaptError
from iapt_export.interface import ModelShape, graph_specs
from iapt_export.manifest import GRAPHS, GraphSpec
from iapt_export.passes import ship_pipeline
from iapt_export.plan import OPSETS
from iapt_export.save import save_graphs
from iapt_export.trace import trace_graph
from trainers.config import IAPTConfig


def export_graphs(
    backbone: Any,
    config: IAPTConfig,
    folder: Path,
    *,
    dtype: str,
    opset: int,
    names: tuple[str, ...] = GRAPHS,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, GraphSpec]:
    """Write the graphs (``prefill.onnx``, ``decode.onnx``, ``generator.onnx``) and their shared ``weights.data``.

    Args:
        backbone: the transformers model, loaded in ``dtype``.
        config: the generators' settings, which all tenants share.
        folder: an existing, empty folder.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        opset: 20 or 23.
        names: which graphs; engines need no generator of their own.
        on_step: called with a word on each step, for progress.

    Returns:
        The graphs' interfaces.

    Raises:
        IaptError: unknown opset, or a backbone that cannot be traced or shipped.
    """
    if opset not in OPSETS:
        raise IaptError(f"opset {opset} is not supported; use one of {', '.join(map(str, OPSETS))}")
    specs = graph_specs(config, ModelShape.from_config(backbone.config), dtype)
    models = {}
    for name in names:
        on_step(f"tracing {name}.onnx")
        model = trace_graph(name, backbone, config, specs[name], opset)
        on_step(f"passes over {name}.onnx")
        models[name] = ship_pipeline(specs[name], config, opset)(model).model
    on_step("writing graphs and weights")
    save_graphs(models, folder)
    return specs
