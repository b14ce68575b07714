"""Spares the exporter its second trace of a program that needs none, and what else it does over and over.

``torch.onnx.export`` traces what it is given once more (``ExportedProgram.run_decompositions``), to write in-place
operators without side effects and to break up operators that it has no ONNX for. A decoder's program has few of
these, all of them simple; each is rewritten here where it stands, which takes milliseconds instead of half of all
the time of an export. A program with anything else in it goes the long way.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

LOGGER = logging.getLogger("iapt_export")

aten = torch.ops.aten


def rewrite_for_one_trace(program: ExportedProgram) -> bool:
    """Rewrite what the exporter would trace again for, and tell it so.

    Args:
        program: as ``torch.export.export`` made it, changed in place: afterwards its ``run_decompositions`` gives
            the program itself.

    Returns:
        False where an operator has side effects or holds a graph of its own; the program is then as it was.
    """
    graph = program.graph_module.graph
    reason = next(filter(None, map(_why_traced_again, graph.nodes)), None)
    if reason:
        LOGGER.info("traced a second time: %s", reason)
        return False
    for node in list(graph.nodes):
        if node.target in REWRITES:
            REWRITES[node.target](graph, node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    vars(program)["run_decompositions"] = lambda *_args, **_keywords: program
    return True


@contextlib.contextmanager
def nothing_computed_twice() -> Iterator[None]:
    """Let ``torch.export`` and ``torch.onnx.export`` use what is known, while the context is open.

    They read the signatures of all translations from their sources in each call, and of an operator for each node;
    compute each node once more to see whether its arguments have to be promoted to one type, although the trace has
    every node's value; ask for PyTorch's composite operators once for each of their namespaces; cut a program into
    parts at every ``no_grad``, and put it together again; and note where in the sources each node comes from, which
    nothing of ours keeps. These are PyTorch's insides: where a version has others, it goes on as it is.
    """
    try:
        patches = _patches()
    except (ImportError, AttributeError) as error:
        LOGGER.info("the exporter computes twice what it knows: %s", error)
        patches = []
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _patches() -> list[Any]:
    """What the context replaces."""
    from onnx_ir.schemas import OpSignature
    from torch._export import utils
    from torch._export.passes import replace_set_grad_with_hop_pass as grad
    from torch.fx import proxy
    from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
    from torch.onnx._internal.exporter._registration import ONNXRegistry
    from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter as Promotion

    def patch(owner: Any, name: str, made: Callable[[Any], Any]) -> Any:
        return mock.patch.object(owner, name, made(getattr(owner, name)))

    return [
        patch(ONNXRegistry, "from_torchlib", _copies_of),
        patch(onnxscript_apis, "get_torchlib_ops", _cached),
        patch(OpSignature, "from_op_schema", _cached_by_operator),
        patch(Promotion, "run_node", _promotion_alone),
        patch(utils, "_materialize_cpp_cia_ops", functools.cache),  # once a context: later ones see other operators
        patch(grad, "replace_set_grad_with_hop_pass", _unless_cut_in_vain),
        mock.patch.object(proxy, "CapturedTraceback", _NoTraceback),
    ]


_cached = functools.cache(functools.cache)
"""A function's cached form, the same in every call."""


@functools.cache
def _cached_by_operator(from_op_schema: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Signatures are told apart by the operator's name and version."""
    known: dict[tuple[str, str, int], Any] = {}

    def signature(schema: Any) -> Any:
        key = (schema.domain, schema.name, schema.since_version)
        if key not in known:
            known[key] = from_op_schema(schema)
        return known[key]

    return signature


def _unless_cut_in_vain(cut: Callable[..., Any]) -> Callable[..., Any]:
    """Where all switches of ``no_grad`` set what is set already, they are removed, and that is all that is to do."""

    def removed(module: Any, signature: Any) -> Any:
        graph = module.graph
        switches = [node for node in graph.nodes if node.target is torch._C._set_grad_enabled]
        if any(node.op == "get_attr" for node in graph.nodes) or any(
            node.args[0] != torch.is_grad_enabled() for node in switches
        ):
            return cut(module, signature)
        for node in switches:
            graph.erase_node(node)
        module.recompile()
        return module, signature

    return removed


class _NoTraceback:
    """Stands for the traceback of a node."""

    @classmethod
    def extract(cls) -> _NoTraceback:
        return cls()

    def summary(self) -> list[Any]:
        return []


@functools.cache
def _copies_of(from_torchlib: Callable[..., Any]) -> Any:
    """Registries of translations, read once; each may get custom ones."""
    read = functools.cache(from_torchlib)

    def registry(**opset: int) -> Any:
        made = copy.copy(read(**opset))
        made.functions = {target: list(translations) for target, translations in made.functions.items()}
        return made

    return staticmethod(registry)


def _promotion_alone(run_node: Callable[[Any, Node], Any]) -> Callable[[Any, Node], Any]:
    """Promotes a node's arguments, and brings its value up to date if that changed them."""
    from torch.onnx._internal.fx.passes.type_promotion import get_type_promotion_rule

    def promoted(interpreter: Any, node: Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run_node(interpreter, node)
        with interpreter._set_current_node(node):
            rule = get_type_promotion_rule(node, interpreter.type_promotion_table)
            if rule:
                interpreter._maybe_promote_node(node, rule)
        return node.meta["val"]

    return promoted


def _why_traced_again(node: Node) -> str | None:
    if node.op == "get_attr":
        return f"{node.target} is inside the program"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"{node.target} holds a graph"
    if node.target in REWRITES or not isinstance(node.target, torch._ops.OpOverload):
        return None
    return f"{node.target} has side effects" if node.target._schema.is_mutable else None


def _remove(graph: Graph, node: Node) -> None:
    """Assertions of the trace; the exporter drops them too."""
    graph.erase_node(node)


def _pass_through(graph: Graph, node: Node) -> None:
    """The same values, in the type that the node gives."""
    source = node.args[0]
    assert isinstance(source, Node)
    node.kwargs = {}
    if source.meta["val"].dtype != node.meta["val"].dtype:
        node.target, node.args = torch.ops.prims.convert_element_type.default, (source, node.meta["val"].dtype)
    elif any(user.op == "output" for user in node.users):  # the program knows its outputs by their names
        node.target, node.args = aten.clone.default, (source,)
    else:
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _renamed(target: Any) -> Callable[[Graph, Node], None]:
    """The operator's other name, which has a translation."""

    def rename(_graph: Graph, node: Node) -> None:
        node.target = target

    return rename


def _reshape(graph: Graph, node: Node) -> None:
    """``flatten`` and ``unflatten`` to sizes that are known but for one; translations compute all from the tensor's."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) < 2:
        node.target, node.args = aten.reshape.default, (node.args[0], sizes)


REWRITES: dict[Any, Callable[[Graph, Node], None]] = {
    aten._assert_tensor_metadata.default: _remove,
    aten._assert_scalar.default: _remove,
    aten.to.device: _pass_through,
    aten.to.dtype: _pass_through,
    aten.to.dtype_layout: _pass_through,
    aten.detach.default: _pass_through,
    aten.detach_.default: _pass_through,
    aten.lift_fresh_copy.default: _pass_through,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.__and__.Tensor: _renamed(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _renamed(aten.bitwise_or.Tensor),
}
