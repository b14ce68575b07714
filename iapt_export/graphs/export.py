"""Backbone and methods in, ONNX graphs out: trace, pass, save."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import PAST, PORTABLE
from iapt_export.contract.manifest import GraphSpec
from iapt_export.contract.types import OPSETS
from iapt_export.graphs.installed import Installed, rational_forms
from iapt_export.graphs.interface import as_traced
from iapt_export.graphs.passes import ship_pipeline
from iapt_export.graphs.passes.dequantise_weights import DequantiseWeightsPass
from iapt_export.graphs.passes.quantise_weights import QuantiseWeightsPass
from iapt_export.graphs.save import save_graphs
from iapt_export.graphs.table import TABLE, graph_specs
from iapt_export.graphs.table import Serving as Serving
from iapt_export.graphs.trace import trace_graph
from trainers.decoder.importance import save_importance
from trainers.decoder.insertion import sizes_of
from trainers.decoder.rounded import rounded_weights

LOGGER = logging.getLogger("iapt_export")
PASSES_FILE = "passes.json"
"""Beside the graphs: graph to pass to what it did, or why it did nothing."""


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
    """Write the graphs (``prefill.onnx``, ``decode.onnx``, ...), their shared ``weights.data``, and ``passes.json``.

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
    cache = serving.rounding.cache_type if serving.rounding else ""
    specs = graph_specs(installed, sizes_of(backbone), dtype, serving.capacity, serving.drafts, cache)
    rounded = rounded_weights(backbone, serving.rounding) if serving.rounding else {}
    models: dict[str, ir.Model] = {}
    notes: dict[str, dict[str, str]] = {}
    forms = rational_forms(installed)
    for name in names or specs:
        on_step(f"tracing {name}.onnx")
        model = trace_graph(name, backbone, installed, as_traced(specs[name], dtype), opset)
        on_step(f"passes over {name}.onnx")
        graph_passes = TABLE[name].passes(serving)
        if serving.rounding:
            how = serving.rounding
            in_blocks = QuantiseWeightsPass(rounded, how.block, serving.importance)
            graph_passes.append(DequantiseWeightsPass(rounded, how) if how.is_scaled else in_blocks)
        passes = ship_pipeline(specs[name], forms, TABLE[name].opset or opset, graph_passes, portable=name in PORTABLE)
        models[name], notes[name] = run_passes(name, passes, model)
    on_step("writing graphs and weights")
    save_graphs(models, folder)
    (folder / PASSES_FILE).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    if serving.importance:
        used = {name for name, bits in rounded.items() if bits == 4}
        used |= {name for name in serving.importance if cache and name.startswith(PAST)}
        save_importance(serving.importance, used, folder)
    return specs


def run_passes(name: str, passes: ir.passes.Sequential, model: ir.Model) -> tuple[ir.Model, dict[str, str]]:
    """Run one pass after the other, and log what each says.

    One by one and not all in a call, which would wrap an `IaptError` in an error of its own.

    Returns:
        The last pass's model; pass to what it did, or why it did nothing, of the passes that say it.
    """
    notes = {}
    for step in passes.passes:
        result = step(model)
        model, title = result.model, type(step).__name__.removesuffix("Pass")
        if note := str(getattr(step, "note", "")):
            notes[title] = note
        LOGGER.info("%s.onnx: %s: %s", name, title, note or ("changed" if result.modified else "nothing to do"))
    return model, notes
