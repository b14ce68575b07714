"""The graph passes that make a traced model fit to ship, in the one list in which they run.

Each pass states what it requires and ensures in its docstring, and checks what can be checked (``requires``,
``ensures``); ``note`` says what it did. Library passes come from onnx_ir and onnxscript, the rest from the files here.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    mul_by_1_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
)

from iapt_export.contract.manifest import GraphSpec
from iapt_export.graphs.passes.add_rational_body import AddRationalBodyPass
from iapt_export.graphs.passes.check import CheckPass
from iapt_export.graphs.passes.flatten_heads import FlattenHeadsPass
from iapt_export.graphs.passes.fold_constants import FoldConstantsPass
from iapt_export.graphs.passes.fold_transposes import FoldTransposesPass
from iapt_export.graphs.passes.fuse_opset23 import FuseOpset23Pass
from iapt_export.graphs.passes.inline_rational import InlineRationalPass
from iapt_export.graphs.passes.name_interface import NameInterfacePass
from iapt_export.graphs.passes.name_nodes import NameNodesPass
from iapt_export.graphs.passes.pack_projections import PackProjectionsPass
from iapt_export.graphs.passes.rotary_in_attention import RotaryInAttentionPass
from iapt_export.graphs.passes.sink_into_if import SinkIntoIfPass
from iapt_export.graphs.passes.widen_bfloat16 import WidenBfloat16Pass
from iapt_export.graphs.passes.write_sizes import WriteSizesPass


def first_passes(
    rational_forms: set[tuple[int, int, str]], opset: int, *, spared: str, portable: bool
) -> ir.passes.Sequential:
    """The passes that run before the layers are laid out, where a graph is a tenth as long: shapes take their time.

    Args:
        rational_forms: see `ship_pipeline`.
        opset: version of the standard operators.
        spared: how the names of weights begin, see `FoldConstantsPass`.
        portable: see `ship_pipeline`.
    """
    return ir.passes.Sequential(
        *([InlineRationalPass(rational_forms, opset)] if portable else []),
        InlinePass(),
        FoldConstantsPass(spared=spared),
        RemoveUnusedNodesPass(),
    )


def ship_pipeline(
    spec: GraphSpec,
    rational_forms: set[tuple[int, int, str]],
    opset: int,
    own: Sequence[ir.passes.PassBase] = (),
    *,
    portable: bool = False,
) -> ir.passes.Sequential:
    """The passes for one graph, behind `first_passes`.

    Args:
        spec: the interface that the graph must end up with.
        rational_forms: (numerator coefficients, denominator coefficients, form) of the activations, one at most.
        opset: version of the standard operators.
        own: passes of this graph alone, see `serve_passes`.
        portable: the graph is for any runtime, also those that read no functions and infer few shapes.
    """
    return ir.passes.Sequential(
        FoldTransposesPass(),
        FoldConstantsPass(infer_shapes=False),
        WidenBfloat16Pass(spec),
        RewritePass([mul_by_1_rule, no_op_cast_rule, no_op_expand_rule, no_op_transpose_rule]),
        IdentityEliminationPass(),
        FuseOpset23Pass(opset),
        *([WriteSizesPass()] if portable else []),
        RemoveUnusedNodesPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),
        *own,
        SinkIntoIfPass(),
        NameInterfacePass(spec),
        NameNodesPass(),
        ClearMetadataAndDocStringPass(),
        AddRationalBodyPass(rational_forms, opset),
        RemoveUnusedOpsetsPass(),
        CheckPass(spec, opset),
    )


def serve_passes(num_positions: int | None, *, packed: bool) -> list[ir.passes.PassBase]:
    """What is done to ``serve.onnx`` alone, around ONNX Runtime's own attention.

    Args:
        num_positions: most cache entries of a row; None leaves rotary embeddings where they are.
        packed: compute an attention's queries, keys and values in one product where they allow it.
    """
    passes: list[ir.passes.PassBase] = [FlattenHeadsPass(), RemoveUnusedNodesPass()]
    if num_positions is not None:
        passes += [RotaryInAttentionPass(num_positions), RemoveUnusedNodesPass()]
    if packed:
        passes += [PackProjectionsPass(), RemoveUnusedNodesPass()]
    return passes
