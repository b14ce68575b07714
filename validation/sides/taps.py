"""Tensors inside a graph that a PyTorch module can be held against, and a runner that gives them out.

Nodes carry the path of their module (`iapt_export.graphs.passes.name_nodes`). Of every module without children, what
goes in and what comes out is a tap, so are the rotated queries, what the rational activation reads and makes, and each
layer's keys and values. Taps are added as outputs to a copy of the graph in memory; the bundle's files stay as they
are.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from engines.onnxruntime.devices import OPTIONS, PROVIDERS
from engines.onnxruntime.runner import OnnxRuntimeRunner
from engines.runner import NOWHERE, numpy_type
from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import PAST, PRESENT
from iapt_export.contract.manifest import GraphSpec, TensorSpec
from iapt_export.graphs.ops import RATIONAL
from iapt_export.graphs.ops.serving_ops import ATTENTION, PRODUCT
from iapt_export.graphs.passes.inline_rational import RATIONAL_MODULE
from iapt_export.graphs.passes.quantise_cache import SCALE_INPUTS
from validation.sides.fp4 import with_kernels_for_fp4
from validation.sides.nibbles import split_products

SHAPE_OPERATORS = ("Shape", "Concat", "Squeeze", "Unsqueeze", "Range", "Cast")
"""Operators that appear in modules only to compute shapes and masks, next to the one that does the work."""
PRODUCTS = ("MatMul", "Gemm", PRODUCT)
"""Operators of linear layers; their first input is the layer's."""
ATTENTION_OPERATORS = ("Attention", "GroupQueryAttention")
"""Those whose first input is the rotated query."""


@dataclass(frozen=True)
class Tap:
    """A tensor of a graph under the name that both sides know."""

    name: str
    """``model.layers.3.mlp.down_proj.output``, ``present.3.key``, ..."""
    value: str
    """Its name in the graph."""
    place: int
    """Position of the node that makes it; -1 for a graph input."""


class TappedGraph:
    """A graph's structure: its nodes by module, who makes and who reads each value.

    Products with quantised weights round their inputs for speed. In this copy they do not, so that what stands before
    and after them can be held against PyTorch with the same weights (`validation.sides.rounding`) as closely as in
    fp32. `TappedRunner` computes those with 8 bits as two with 4, see `validation.sides.nibbles`. A cache in 8 bits is
    fp32 in it.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.model = onnx.load(path, load_external_data=False)
        with_kernels_for_fp4(self.model)
        _widen_cache(self.model.graph)
        self.nodes = list(self.model.graph.node)
        for node in self.nodes:
            for attribute in node.attribute:
                if (node.op_type, attribute.name) == (PRODUCT, "accuracy_level"):
                    attribute.i = 0
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.maker = {value: place for place, node in enumerate(self.nodes) for value in node.output}
        self.readers: dict[str, list[int]] = {}
        for place, node in enumerate(self.nodes):
            for value in node.input:
                self.readers.setdefault(value, []).append(place)
        self.outputs = [value.name for value in self.model.graph.output]

    def initializer(self, name: str) -> np.ndarray:
        """A weight's values as they are stored, in the graph or in the file beside it."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.weights[name])  # the library keeps what it reads in the tensor
        return numpy_helper.to_array(tensor, str(self.folder))

    def module(self, place: int) -> str:
        """Path of a node's module."""
        return self.nodes[place].name.rpartition("/")[0]

    def of_module(self, path: str) -> list[int]:
        """Places of a module's own nodes."""
        return [place for place in range(len(self.nodes)) if self.module(place) == path]

    def taps(self, modules: list[str]) -> list[Tap]:
        """All taps in the order in which the graph makes them; some name the same value from its two ends.

        Args:
            modules: paths of the backbone's modules that have no children.
        """
        taps = [Tap(name, name, self.maker[name]) for name in self.outputs]
        for path in modules:
            taps += self._around(path)
        for place, node in enumerate(self.nodes):
            path = self.module(place)
            if node.op_type in ATTENTION_OPERATORS and path and node.input[1]:  # else it gets query, key, value in one
                taps += self._tap(f"{path}.query", node.input[0])
            if node.op_type == RATIONAL and path:
                taps += self._rational(path, node.input[0], node.output[0])
        for path in {self.module(place) for place in range(len(self.nodes))}:
            if path.endswith(RATIONAL_MODULE):
                taps += self._rational(path.removesuffix(RATIONAL_MODULE), *self.ends_of_rational(path))
        return sorted(taps, key=lambda tap: (tap.place, tap.name.endswith(".input")))

    def ends_of_rational(self, path: str) -> tuple[str, str]:
        """What the activation reads and makes where it is written in standard operators.

        Args:
            path: of its nodes' module, which ends in `RATIONAL_MODULE`.
        """
        places = self.of_module(path)
        # Horner's rule begins with the highest coefficient times the variable, see `rational_op.rational_function`
        product = next(place for place in places if self.nodes[place].op_type == "Mul")
        variable = self.nodes[product].input[1]
        if (cast := self.maker.get(variable)) in places:
            variable = self.nodes[cast].input[0]
        return variable, self.nodes[places[-1]].output[0]

    def operators_between(self, tap: Tap, known: set[str]) -> list[int]:
        """Places of the nodes that make a tap out of values that are known to be right."""
        places: set[int] = set()
        open_values = [tap.value]
        while open_values:
            place = self.maker.get(open_values.pop())
            if place is None or place in places:
                continue
            places.add(place)
            open_values += [value for value in self.nodes[place].input if value not in known]
        return sorted(places)

    def with_outputs(self, taps: list[Tap]) -> onnx.ModelProto:
        """A copy of the graph with the taps added to its outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for value in dict.fromkeys(tap.value for tap in taps):
            if value not in self.outputs:
                model.graph.output.append(onnx.ValueInfoProto(name=value))
        return model

    def _tap(self, name: str, value: str) -> list[Tap]:
        return [Tap(name, value, self.maker[value])] if value in self.maker else []

    def _rational(self, path: str, reads: str, makes: str) -> list[Tap]:
        return self._tap(f"{path}.pooled", reads) + self._tap(f"{path}.activated", makes)

    def _around(self, path: str) -> list[Tap]:
        places = self.of_module(path)
        if not places:
            return []
        produced = {value for place in places for value in self.nodes[place].output}
        result = [
            value
            for place in places
            for value in self.nodes[place].output
            if value in self.outputs or any(reader not in places for reader in self.readers.get(value, []))
        ]
        # what selects the rows of the logits stands in the head's module too, before its product
        products = [self.nodes[place].input[0] for place in places if self.nodes[place].op_type in PRODUCTS]
        read = products or [
            value
            for place in places
            if self.nodes[place].op_type not in SHAPE_OPERATORS
            for value in self.nodes[place].input
            if value in self.maker and value not in produced
        ]
        return [
            *(self._tap(f"{path}.input", read[0]) if read else []),
            *(self._tap(f"{path}.output", result[-1]) if result else []),
        ]


class TappedRunner(OnnxRuntimeRunner):
    """Runs a copy of a graph that gives out its taps as well; ``seen`` holds them after each `infer`.

    More outputs keep the runtime from fusing across them: where a fault lies in such a fusion, it is gone here, and the
    comparison says so.
    """

    def __init__(self, path: Path, spec: GraphSpec, graph: TappedGraph, taps: list[Tap], device: str = "cpu") -> None:
        known = {tensor.name for tensor in spec.outputs}
        values = dict.fromkeys(tap.value for tap in taps if tap.value not in known)
        extra = [TensorSpec(value, "any", []) for value in values]
        super().__init__(path, dataclasses.replace(spec, outputs=[*spec.outputs, *extra]), device=device)
        self.graph = graph
        self.taps = taps
        self.seen: dict[str, Any] = {}
        self._split: dict[str, np.ndarray] = {}
        """What the session reads for as long as it is open."""

    def activate(self) -> None:
        """Load the copy; its weights are read from the bundle."""
        if self._session is not None:
            return
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # else a product behind DequantizeLinear becomes MatMulNBits, which rounds its inputs
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.path.parent.resolve())
        )
        model = self.graph.with_outputs(self.taps)
        self._split = split_products(model, self.graph.initializer) if self.device == "cpu" else {}
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._split.values()]
        options.add_external_initializers(list(self._split), values)
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=[(PROVIDERS[self.device], OPTIONS[self.device])]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            reason = str(error).strip().splitlines()[0]
            raise IaptError(f"ONNX Runtime refuses {self.path.name} with taps as outputs: {reason}") from error

    def deactivate(self) -> None:
        """See `engines.runner.Runner.deactivate`."""
        super().deactivate()
        self._split = {}

    def zeros(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """On the host, whatever the device, because all of it is looked at after each step."""
        return np.zeros(shape, numpy_type(dtype))

    def infer(self, feeds: Mapping[str, Any], into: Mapping[str, Any] = NOWHERE) -> dict[str, Any]:
        """See `engines.runner.Runner.infer`; what the session does not know, and the cache before, are kept aside."""
        if not self.taps:
            return super().infer(feeds, into)  # without a copy of the cache, which may be larger than the weights
        past = {name: array.copy() for name, array in feeds.items() if name.startswith(PAST)}
        outputs = super().infer(feeds, into)
        written = [name for name in into if not name.startswith(PRESENT)]  # those are what `Stepper.present` shows
        known = {name: array for name, array in outputs.items() if name not in into}
        known |= {name: outputs[name].copy() for name in written}
        self.seen = {tap.name: known[tap.value] for tap in self.taps if tap.value in known} | past
        return outputs


def _widen_cache(graph: onnx.GraphProto) -> None:
    """Undo `iapt_export.graphs.passes.quantise_cache`."""
    for node in graph.node:
        if node.op_type == ATTENTION and len(node.input) > max(SCALE_INPUTS):
            for place in SCALE_INPUTS:
                node.input[place] = ""
            kept = [each for each in node.attribute if "quant_type" not in each.name and "bit_width" not in each.name]
            del node.attribute[:]
            node.attribute.extend(kept)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT8 and value.name.startswith((PAST, PRESENT)):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def layer_of(name: str, layers_path: str) -> int | None:
    """The decoder layer that a tap or a module lies in."""
    match = re.match(rf"(?:{re.escape(layers_path)}|present|past_key_values)\.(\d+)\.", name)
    return int(match[1]) if match else None
