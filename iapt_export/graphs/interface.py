"""The graphs' inputs and outputs, written once: tracing, the manifest and the tests read them from here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from iapt_export.contract.graphs import PAST, PRESENT
from iapt_export.contract.manifest import READS_INSTRUCTION, SENT_PROMPTS, TENANT_INDEX, GraphSpec, TensorSpec
from iapt_export.contract.sizes import BackboneSizes
from iapt_export.graphs.in_place import needs_flag
from iapt_export.graphs.installed import Installed, generators, in_decode

COEFFICIENTS = ("numerator", "denominator")
"""Weights that stay fp32 in every dtype, because the activation is evaluated in fp32."""


def weight_specs(item: Installed, dtype: str) -> list[TensorSpec]:
    """One tenant's tensors, as its file holds them but for the type, which is the graph's."""
    return [
        TensorSpec(name, "fp32" if name in COEFFICIENTS else dtype, list(parameter.shape))
        for name, parameter in item.stacked.named_parameters()
    ]


Tensors = tuple[list[TensorSpec], list[TensorSpec]]
"""A graph's inputs and outputs."""


@dataclass(frozen=True)
class Sizing:
    """What the interfaces of a bundle's graphs are made of."""

    installed: list[Installed]
    shape: BackboneSizes
    dtype: str
    capacity: int | None = None
    """Cache entries of a row in graphs that want a fixed number."""
    drafts: int = 0
    """Drafted tokens of a row that one step verifies; 0 for no such graph."""
    rounded_cache: str = ""
    """Type of a cache that is written in place, where it is not the graphs'."""

    def hidden(self, name: str, *sizes: int | str) -> TensorSpec:
        """A tensor ``[batch, ..., D]`` in the graph's type."""
        return TensorSpec(name, self.dtype, ["batch", *sizes, self.shape.hidden_size])

    def stepped(self, present: str | int) -> list[TensorSpec]:
        """What every step returns: logits, and a cache of ``present`` entries."""
        return [TensorSpec("logits", self.dtype, ["batch", 1, self.shape.vocab_size]), *self.cache(PRESENT, present)]

    def cache(self, prefix: str, length: str | int) -> list[TensorSpec]:
        """Keys and values of every layer, ``length`` entries."""
        dtype = self.rounded_cache or self.dtype
        return [
            TensorSpec(f"{prefix}{layer}.{part}", dtype, ["batch", self.shape.num_kv_heads, length, width])
            for layer in range(self.shape.num_layers)
            for part, width in zip(("key", "value"), self.shape.cache_widths, strict=True)
        ]

    def taken(self, items: list[Installed]) -> list[TensorSpec]:
        """What a step takes for methods that act in it."""
        return [spec for item in items for spec in self._method(item)]

    def stacked(self, item: Installed) -> list[TensorSpec]:
        """A method's index, and its tenants' weights."""
        # a size of its own for each method, because each has its own number of tenants
        stack = f"tenants_{item.name}"
        weights = weight_specs(item, self.dtype)
        return [_index(item), *(TensorSpec(f"{item.name}.{w.name}", w.dtype, [stack, *w.shape]) for w in weights)]

    def _method(self, item: Installed) -> list[TensorSpec]:
        if item.encoder is None:
            return self.stacked(item)
        sent = self.hidden(f"{item.name}.{SENT_PROMPTS}", item.method.num_slots)
        return [_index(item), sent] if len(self.installed) > 1 else [sent]


def _whole(*sizes: int | str, names: tuple[str, ...], dtype: str = "int64") -> list[TensorSpec]:
    return [TensorSpec(name, dtype, list(sizes)) for name in names]


def _instruction() -> list[TensorSpec]:
    return _whole("batch", "sequence", names=("input_ids", "attention_mask"))


def prefill(of: Sizing) -> Tensors:
    """Instruction in, a cache of prompts and instruction out."""
    return [*_instruction(), *of.taken(of.installed)], of.stepped("present")


def decode(of: Sizing) -> Tensors:
    """A token a row, and a cache that comes back longer by one."""
    inputs = [
        *_whole("batch", 1, names=("input_ids",)),
        *_whole("batch", "total", names=("attention_mask",)),
        *_whole("batch", 1, names=("position_ids",)),
    ]
    return [*inputs, *of.cache(PAST, "past"), *of.taken(in_decode(of.installed))], of.stepped("total")


def serve(of: Sizing) -> Tensors:
    """Both kinds of step over buffers of any capacity."""
    inputs = [
        *_whole("batch", "sequence", names=("input_ids", "position_ids")),
        *_whole("batch", names=("seqlens_k",), dtype="int32"),
        *_whole(names=("total_sequence_length",), dtype="int32"),
        *of.cache(PAST, "capacity"),
    ]
    if needs_flag([item.method for item in of.installed]):
        inputs += _whole(names=(READS_INSTRUCTION,), dtype="bool")
    return [*inputs, *of.taken(of.installed)], of.stepped("capacity")


def verify(of: Sizing) -> Tensors | None:
    """A row's last token and its drafted ones, over the buffers of `serve`; logits behind each.

    Where the buffers are one memory, so are the ones after each token but the last, ``present.N.key.STEP``.
    """
    if not of.drafts:
        return None
    length = of.drafts + 1
    inputs = [
        *_whole("batch", length, names=("input_ids", "position_ids")),
        *_whole("batch", names=("seqlens_k",), dtype="int32"),
        *_whole(names=("total_sequence_length",), dtype="int32"),
        *of.cache(PAST, "capacity"),
        *of.taken(in_decode(of.installed)),
    ]
    present = of.cache(PRESENT, "capacity")
    between = [replace(spec, name=f"{spec.name}.{step}") for step in range(of.drafts) for spec in present]
    logits = TensorSpec("logits", of.dtype, ["batch", length, of.shape.vocab_size])
    return inputs, [logits, *present, *between]


def as_traced(spec: GraphSpec, dtype: str) -> GraphSpec:
    """An interface before the passes: without the buffers between the tokens of one step, its cache of ``dtype``."""
    outputs = [tensor for tensor in spec.outputs if not (tensor.name.startswith(PRESENT) and tensor.name[-1].isdigit())]
    return with_cache(replace(spec, outputs=outputs), dtype)


def with_cache(spec: GraphSpec, dtype: str) -> GraphSpec:
    """An interface with a cache of another type."""

    def changed(tensors: list[TensorSpec]) -> list[TensorSpec]:
        return [replace(each, dtype=dtype) if each.name.startswith((PAST, PRESENT)) else each for each in tensors]

    return replace(spec, inputs=changed(spec.inputs), outputs=changed(spec.outputs))


def serve_prefill(of: Sizing) -> Tensors | None:
    """Instruction in, over buffers of a fixed capacity."""
    return _one_step(of, "places", of.installed)


def serve_decode(of: Sizing) -> Tensors | None:
    """A token a row, over the same buffers."""
    return _one_step(of, 1, in_decode(of.installed))


def _one_step(of: Sizing, length: str | int, acting: list[Installed]) -> Tensors | None:
    if of.capacity is None:
        return None
    inputs = [
        *_whole("batch", length, names=("input_ids", "position_ids")),
        *_whole("batch", names=("seqlens_k",), dtype="int32"),
    ]
    return [*inputs, *of.cache(PAST, of.capacity), *of.taken(acting)], of.stepped(of.capacity)


def encoder(of: Sizing) -> Tensors | None:
    """Instruction in, the prompts of a method that computes them beforehand out."""
    for item in of.installed:
        if item.encoder:
            return [*_instruction(), *of.stacked(item)], [of.hidden(SENT_PROMPTS, item.method.num_slots)]
    return None


def generator(of: Sizing) -> Tensors | None:
    """Every layer's hidden states in, every layer's prompts out."""
    if not (generated := generators(of.installed)):
        return None
    layers, length = of.shape.num_layers, max(item.method.num_slots for item in generated)
    inputs = [of.hidden("hidden_states", layers, "sequence"), _instruction()[1], *of.taken(generated)]
    return inputs, [of.hidden("prompts", layers, length)]


def _index(item: Installed) -> TensorSpec:
    return TensorSpec(f"{item.name}.{TENANT_INDEX}", "int64", ["batch"])
