"""The operators of graphs over a cache in place that PyTorch has no word for: attention, a write, and a condition.

``com.microsoft::GroupQueryAttention`` is ONNX Runtime's: it writes the new keys and values into the cache buffers at
each row's own length, where past and present share memory, and attends to what is written so far.

``TensorScatter`` is the standard's, but newer than what torch's exporter writes, so it is traced under a domain of our
own and renamed by `iapt_export.graphs.passes.use_tensor_scatter`. It writes new keys or values into a buffer at each
row's own place. TensorRT makes its KV-cache-update layer of it, which needs input and output at one address.

``iapt::instruction_only(changed, unchanged, flag)`` marks what is computed only while an instruction is read; the pass
`iapt_export.graphs.passes.sink_into_if` turns it into an ``If``, and no such node is left in a shipped graph.

``iapt::set_first(target, new, length, axis)`` becomes standard slices; torch.export would bind their lengths to a
smallest number of tokens.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import values
from torch import Tensor

MICROSOFT = "com.microsoft"
ATTENTION = "GroupQueryAttention"
PRODUCT = "MatMulNBits"
LOOKUP = "GatherBlockQuantized"
MARKER = "InstructionOnly"
SCATTER = "TensorScatter"
MARKER_DOMAIN = "ai.iapt.trace"
"""Domain of these two; it exists between tracing and the passes only."""


@torch.library.custom_op("iapt::attend_in_place", mutates_args=())
def attend_in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: list[Tensor],
    lengths: list[Tensor],
    sinks: list[Tensor],
    factors: list[float],
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over a cache; exists for tracing only.

    Args:
        query: ``[B, T, heads K]``.
        key: ``[B, T, H K]``.
        value: ``[B, T, H K]``.
        past: key and value buffers ``[B, H, C, K]``.
        lengths: each row's entries after this step less one ``[B]``, and the most of them; int32.
        sinks: a score for each head that only takes part in the softmax ``[heads]``; none or one.
        factors: of the scores, and the soft cap that they run against, 0 for none.
        window: entries that are seen, -1 for all.

    Returns:
        ``[B, T, heads K]``, and the buffers after the step.
    """
    raise NotImplementedError("serve.onnx runs in ONNX Runtime; in PyTorch use trainers.decoder.generate")


@attend_in_place.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, past: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(past[0]), torch.empty_like(past[1])


@torch.library.custom_op("iapt::tensor_scatter", mutates_args=())
def tensor_scatter(past: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """``past [B, H, C, K]`` with the entries from ``write_indices [B]`` on replaced by ``update [B, H, T, K]``."""
    places = write_indices[:, None] + torch.arange(update.shape[2], device=past.device)
    return past.scatter(2, places[:, None, :, None].expand_as(update), update)


@tensor_scatter.register_fake
def _(past: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(past)


@torch.library.custom_op("iapt::instruction_only", mutates_args=())
def instruction_only(changed: Tensor, unchanged: Tensor, flag: Tensor) -> Tensor:
    """``changed`` where ``flag`` (a boolean scalar) is set, else ``unchanged``."""
    return torch.where(flag, changed, unchanged)


@instruction_only.register_fake
def _(changed: Tensor, unchanged: Tensor, flag: Tensor) -> Tensor:
    return torch.empty_like(unchanged)


@torch.library.custom_op("iapt::set_first", mutates_args=())
def set_first(target: Tensor, new: Tensor, length: int, axis: int) -> Tensor:
    """``target``, ``length`` long along ``axis``, with its first entries replaced by ``new``, as far as both reach."""
    count = min(new.shape[axis], length)
    return torch.cat([new.narrow(axis, 0, count), target.narrow(axis, count, length - count)], dim=axis)


@set_first.register_fake
def _(target: Tensor, new: Tensor, length: int, axis: int) -> Tensor:
    return torch.empty_like(target)


def register_schemas() -> None:
    """Tell onnx the operators' signatures; the exporter's translation looks them up."""
    if onnx.defs.has(ATTENTION, MICROSOFT):
        return
    schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    optional = schema.FormalParameterOption.Optional
    onnx.defs.register_schema(
        schema(
            ATTENTION,
            MICROSOFT,
            1,
            doc="ONNX Runtime's grouped-query attention over a cache of fixed capacity.",
            inputs=[
                parameter("query", "T"),  # or all three in one
                *(parameter(name, "T", param_option=optional) for name in ("key", "value")),
                *(parameter(name, "C") for name in ("past_key", "past_value")),
                parameter("seqlens_k", "tensor(int32)"),
                parameter("total_sequence_length", "tensor(int32)"),
                *(parameter(name, "T", param_option=optional) for name in ("cos_cache", "sin_cache")),
                parameter("position_ids", "tensor(int64)", param_option=optional),
                *(parameter(name, "T", param_option=optional) for name in ("attention_bias", "head_sink")),
                *(parameter(name, "tensor(float)", param_option=optional) for name in ("k_scale", "v_scale")),
            ],
            outputs=[parameter("output", "T"), *(parameter(name, "C") for name in ("present_key", "present_value"))],
            type_constraints=[("T", floats, ""), ("C", [*floats, "tensor(int8)"], "of the cache")],
            attributes=[
                schema.Attribute("num_heads", schema.AttrType.INT, "query heads"),
                schema.Attribute("kv_num_heads", schema.AttrType.INT, "key and value heads"),
                schema.Attribute("scale", schema.AttrType.FLOAT, "factor of the scores"),
                schema.Attribute("softcap", onnx.helper.make_attribute("softcap", 0.0), "bound of the scores, 0: none"),
                schema.Attribute("local_window_size", schema.AttrType.INT, "entries that are seen, -1 for all"),
                schema.Attribute("do_rotary", onnx.helper.make_attribute("do_rotary", 0), "1: turn query and key"),
                schema.Attribute(
                    "rotary_interleaved", onnx.helper.make_attribute("rotary_interleaved", 0), "1: turn neighbours"
                ),
                *(
                    schema.Attribute(name, onnx.helper.make_attribute(name, "NONE"), "how many scales a cache has")
                    for name in ("k_quant_type", "v_quant_type")
                ),
                schema.Attribute(
                    "kv_cache_bit_width", onnx.helper.make_attribute("kv_cache_bit_width", 0), "of a rounded cache"
                ),
            ],
        )
    )
    everything = [*floats, "tensor(int64)", "tensor(bool)"]
    onnx.defs.register_schema(
        schema(
            MARKER,
            MARKER_DOMAIN,
            1,
            doc="Marks what is computed only while an instruction is read.",
            inputs=[parameter("changed", "T"), parameter("unchanged", "T"), parameter("flag", "tensor(bool)")],
            outputs=[parameter("result", "T")],
            type_constraints=[("T", everything, "")],
        )
    )
    onnx.defs.register_schema(
        schema(
            SCATTER,
            MARKER_DOMAIN,
            1,
            doc="Writes entries into a cache from each row's own place on.",
            inputs=[parameter("past", "T"), parameter("update", "T"), parameter("write_indices", "tensor(int64)")],
            outputs=[parameter("present", "T")],
            type_constraints=[("T", floats, "")],
        )
    )


def translation_table() -> dict[Any, Any]:
    """What ``torch.onnx.export(custom_translation_table=...)`` needs for these operators."""
    register_schemas()
    microsoft, marker, standard = values.Opset(MICROSOFT, 1), values.Opset(MARKER_DOMAIN, 1), onnxscript.opset20

    def attention(
        query: Any, key: Any, value: Any, past: Any, lengths: Any, sinks: Any, factors: Any, window: int
    ) -> Any:
        kv_heads, head_dim = past[0].shape[1], past[0].shape[3]
        scale, softcap = factors
        sink = [None, None, None, None, *sinks] if sinks else []  # behind the rotary table, positions and bias
        return microsoft.GroupQueryAttention(
            query,
            key,
            value,
            *past,
            *lengths,
            *sink,
            num_heads=query.shape[2] // head_dim,
            kv_num_heads=kv_heads,
            scale=scale,
            softcap=softcap,
            local_window_size=window,
        )

    def scatter(past: Any, update: Any, write_indices: Any) -> Any:
        return marker.TensorScatter(past, update, write_indices)

    def only(changed: Any, unchanged: Any, flag: Any) -> Any:
        return marker.InstructionOnly(changed, unchanged, flag)

    def first(target: Any, new: Any, length: Any, axis: int) -> Any:
        count = new.shape[axis]
        axes = standard.Constant(value_ints=[axis])
        reach = standard.Reshape(length, standard.Constant(value_ints=[1]))
        kept = standard.Slice(new, standard.Constant(value_ints=[0]), reach, axes)
        rest = standard.Slice(target, standard.Constant(value_ints=[count]), reach, axes)
        return standard.Concat(kept, rest, axis=axis)

    return {
        torch.ops.iapt.attend_in_place.default: attention,
        torch.ops.iapt.tensor_scatter.default: scatter,
        torch.ops.iapt.instruction_only.default: only,
        torch.ops.iapt.set_first.default: first,
    }
