"""Quantised weights, and nothing else that differs: both sides of an exact comparison of int8 and int4.

Where the cache is in 8 bits too, it is fp32 there.

For TensorRT see `validation.sides.engine_graphs`; what follows is about ONNX Runtime's operators.

What a quantised target answers differs from PyTorch's fp32 by much, and by chance. But the same graphs with products
that do not round their inputs (`validation.sides.taps.TappedGraph`), against PyTorch with weights that went through the
same quantiser, differ by no more than fp32 graphs do; so fp32's limits hold there, and small faults are found.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from contextlib import ExitStack

import torch

from engines.serving.session import Session
from iapt_export.contract.low_bits import Rounding
from iapt_export.graphs.interface import with_cache
from trainers.decoder.importance import load_importance
from trainers.decoder.method import Method
from trainers.decoder.rounded import RoundedWeights, round_weights
from trainers.decoder.streamed import is_streamed, read_weight, streamed
from validation.sides.reference import Reference
from validation.sides.stepping import session_with
from validation.sides.taps import TappedGraph, TappedRunner


def unrounded_session(session: Session) -> Session:
    """A session over a target's graphs that rounds no activations; not yet active, and its target's type is fp32.

    Args:
        session: on a quantised target; it may be closed.
    """
    bundle, graphs = session.bundle, session.target.graphs
    graphs = {name: with_cache(spec, "fp32") for name, spec in graphs.items()}
    target = dataclasses.replace(session.target, dtype="fp32", graphs=graphs)
    paths = {name: bundle / spec.path for name, spec in target.graphs.items()}
    runners = {name: TappedRunner(path, target.graphs[name], TappedGraph(path), []) for name, path in paths.items()}
    return session_with(bundle, session.manifest, target, dict(runners), session.stepper.in_place)


@torch.no_grad()
def with_rounded_weights(reference: Reference, rounding: Rounding) -> Reference:
    """The reference with the backbone's matrices rounded and restored, as the exporter's pass stores them.

    What `build` takes from fp32 weights stays as it is: a merged adapter, a folded embedding table. The copy takes as
    much memory as the backbone; that of a streamed one takes disk instead.
    """
    other = copy.copy(reference)
    other.methods = dict(reference.methods)
    forms = {spec.name: spec.form for spec in reference.manifest.methods}
    model = reference.model
    if rounding.is_scaled and any(tenant.method is None for tenant in reference.manifest.tenants):
        model = copy.deepcopy(model)  # the build merged into weights of fp16
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    with ExitStack() as stack:
        for tenant in reference.manifest.tenants:
            method = reference.methods[tenant.name]
            if tenant.method is None:
                stack.enter_context(method.merged(model))
                other.methods[tenant.name] = _without_effect(method)
            elif method.folded_form == forms[tenant.method]:
                table = reference.model.get_input_embeddings()
                other.methods[tenant.name] = method.folded(table(torch.arange(table.num_embeddings))).eval()
        importance = {} if rounding.is_scaled else load_importance(reference.bundle)
        if is_streamed(reference.model):
            read = functools.partial(read_weight, reference.model)
            rounded = RoundedWeights(reference.model, rounding, read, importance)
            other.model = streamed(reference.model, rounded)
            return other
        other.model = copy.deepcopy(model)
    round_weights(other.model, rounding, importance)
    return other


def _without_effect(method: Method) -> Method:
    still = copy.deepcopy(method)
    for parameter in still.parameters():
        parameter.zero_()
    return still
