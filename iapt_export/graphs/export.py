"""Backbone and methods in, ONNX graphs out: trace, pass, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import ENGINE_SERVING, GraphSpec
from iapt_export.graphs.installed import Installed, rational_forms
from iapt_export.graphs.interface import OPSETS, ModelShape, graph_specs
from iapt_export.graphs.passes import serve_passes, ship_pipeline
from iapt_export.graphs.passes.quantise_weights import QuantiseWeightsPass
from iapt_export.graphs.passes.use_tensor_scatter import SCATTER_OPSET, UseTensorScatterPass
from iapt_export.graphs.save import save_graphs
from iapt_export.graphs.trace import trace_graph


@dataclass(frozen=True)
class Serving:
    """What graphs over a cache in place need to know besides."""

    num_positions: int | None = None
    """Most cache entries of a row in ``serve.onnx``, which holds its rotary table for as many; None leaves the rotary
    embedding as it was traced, for any number."""
    capacity: int | None = None
    """Cache entries of a row in ``serve_prefill`` and ``serve_decode``; None leaves these graphs out."""
    weight_bits: int | None = None
    """4 or 8 to store the backbone's weights in as many; for graphs of fp32. None leaves them in the graphs' type."""


def export_graphs(
    backbone: Any,
    installed: list[Installed],
    folder: Path,
    *,
    dtype: str,
    opset: int,
    names: tuple[str, ...] | None = None,
    serving: Serving = Serving(),
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
    specs = graph_specs(installed, ModelShape.from_config(backbone.config), dtype, serving.capacity)
    models = {}
    forms = rational_forms(installed)
    for name in names or specs:
        on_step(f"tracing {name}.onnx")
        model = trace_graph(name, backbone, installed, specs[name], opset)
        on_step(f"passes over {name}.onnx")
        # int4 keeps the matrices of keys and values in more bits than those of queries
        packed = serving.weight_bits != 4
        own = serve_passes(serving.num_positions, packed=packed) if name == "serve" else []
        own += [QuantiseWeightsPass(serving.weight_bits)] if serving.weight_bits else []
        own += [UseTensorScatterPass()] if name in ENGINE_SERVING else []
        version = SCATTER_OPSET if name in ENGINE_SERVING else opset
        passes = ship_pipeline(specs[name], forms, version, own)
        models[name] = passes(model).model
    on_step("writing graphs and weights")
    save_graphs(models, folder)
    return specs
