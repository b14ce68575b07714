"""Every graph of a bundle in one row: its twin, its interface, its opset and its own passes.

`iapt_export.contract.graphs` says what each is for, to those who run it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from iapt_export.contract.graphs import ENCODER, GENERATOR, VERIFY
from iapt_export.contract.low_bits import Rounding
from iapt_export.contract.manifest import GraphSpec
from iapt_export.contract.sizes import BackboneSizes
from iapt_export.graphs import interface, twins
from iapt_export.graphs.installed import Installed
from iapt_export.graphs.passes import serve_passes
from iapt_export.graphs.passes.one_by_one import OneByOnePass
from iapt_export.graphs.passes.quantise_cache import QuantiseCachePass
from iapt_export.graphs.passes.use_tensor_scatter import SCATTER_OPSET, UseTensorScatterPass
from trainers.decoder.rounded import Importance


@dataclass(frozen=True)
class Serving:
    """What graphs over a cache in place need to know besides."""

    num_positions: int | None = None
    """Most cache entries of a row in ``serve.onnx``, which holds its rotary table for as many; None leaves the rotary
    embedding as it was traced, for any number."""
    capacity: int | None = None
    """Cache entries of a row in ``serve_prefill`` and ``serve_decode``; None leaves these graphs out."""
    rounding: Rounding | None = None
    """How the backbone's weights are stored; None leaves them in the graphs' type."""
    drafts: int = 0
    """Drafted tokens of a row that ``verify`` takes; 0 leaves this graph out."""
    importance: Importance | None = None
    """What weights are rounded to 4 bits by, and the scales of a cache in 8; written beside the graphs, for who
    compares them."""


@dataclass(frozen=True)
class Graph:
    """How a graph is made."""

    twin: type[twins.Twin]
    interface: Callable[[interface.Sizing], interface.Tensors | None]
    """Its inputs and outputs; None where a bundle has no such graph."""
    opset: int | None = None
    """Version of the standard operators, where it is not the build's."""
    passes: Callable[[Serving], list[ir.passes.PassBase]] = lambda _: []
    """Passes of this graph alone."""


def _serve_passes(serving: Serving) -> list[ir.passes.PassBase]:
    # matrices of keys and values often have fewer outputs than inputs, and then more bits than those of queries
    rounding = serving.rounding
    passes = serve_passes(serving.num_positions, packed=rounding is None or rounding.narrow == rounding.bits)
    if rounding and rounding.cache_type:
        passes.append(QuantiseCachePass(serving.importance or {}))
    return passes


def _verify_passes(serving: Serving) -> list[ir.passes.PassBase]:
    return [*_serve_passes(serving), OneByOnePass(serving.drafts + 1)]


def _scatter(_: Serving) -> list[ir.passes.PassBase]:
    return [UseTensorScatterPass()]


TABLE: dict[str, Graph] = {
    "prefill": Graph(twins.PrefillTwin, interface.prefill),
    "decode": Graph(twins.DecodeTwin, interface.decode),
    "serve": Graph(twins.ServeTwin, interface.serve, passes=_serve_passes),
    VERIFY: Graph(twins.VerifyTwin, interface.verify, passes=_verify_passes),
    "serve_prefill": Graph(twins.ServePrefillTwin, interface.serve_prefill, SCATTER_OPSET, _scatter),
    "serve_decode": Graph(twins.ServeDecodeTwin, interface.serve_decode, SCATTER_OPSET, _scatter),
    ENCODER: Graph(twins.EncoderTwin, interface.encoder),
    GENERATOR: Graph(twins.GeneratorTwin, interface.generator),
}


def graph_specs(
    installed: list[Installed],
    shape: BackboneSizes,
    dtype: str,
    capacity: int | None = None,
    drafts: int = 0,
    rounded_cache: str = "",
) -> dict[str, GraphSpec]:
    """Interfaces of a bundle's graphs; names follow the ecosystem (``past_key_values.N.key``, ``present.N.key``).

    Args:
        installed: the bundle's methods.
        shape: the backbone's sizes.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        capacity: cache entries of a row in the graphs for TensorRT, which wants a fixed number; None leaves them out.
        drafts: drafted tokens of a row that ``verify`` takes; 0 leaves it out.
        rounded_cache: type of the cache where it is not ``dtype``; for ``serve`` and ``verify`` alone.

    Returns:
        ``prefill``, ``decode`` and ``serve``, ``verify``, ``serve_prefill`` and ``serve_decode`` if asked for,
        ``encoder`` where a method computes its prompts beforehand, ``generator`` where a method generates prompts at
        every layer.
    """
    sizing = interface.Sizing(installed, shape, dtype, capacity, drafts, rounded_cache)
    tensors = {name: graph.interface(sizing) for name, graph in TABLE.items()}
    return {name: GraphSpec(f"{name}.onnx", *both) for name, both in tensors.items() if both}
