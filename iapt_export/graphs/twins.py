"""Export twins: modules that trace well, take and return plain tensors, and compute what the trained ones do.

Each twin has a test against the module it stands for. Tenants enter as stacked weights with
``METHOD.tenant_index [B]`` picking a row's tenant, so one graph serves any number of them. Every twin takes its
plain inputs one by one and then the rest as one tuple, in the order of the graph's interface.

Shapes: B batch, T instruction tokens, P prompt slots, S cache length, L layers, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import iapt_export.graphs.ops.layer_end  # noqa: F401  (registers torch.ops.iapt.layer_end)
from iapt_export.contract.graphs import PAST
from iapt_export.contract.manifest import READS_INSTRUCTION, GraphSpec
from iapt_export.graphs.in_place import Step, serve
from iapt_export.graphs.installed import Installed, generators, in_decode, rows_from_inputs
from trainers.decoder.insertion import continue_from, decoder_layers, last_token, read_instruction


class Twin(nn.Module):
    """What all twins know: the backbone, the methods, and the names of the tensors in the tuple."""

    num_plain: ClassVar[int] = 2
    """Inputs that come one by one."""

    def __init__(self, backbone: Any, installed: list[Installed], spec: GraphSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.installed = installed
        self.names = [tensor.name for tensor in spec.inputs]

    def named(self, rest: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The tuple's tensors by name."""
        return dict(zip(self.names[-len(rest) :], rest, strict=True)) if rest else {}


class EncoderTwin(Twin):
    """Instruction in, the prompts that LoPA sends out; one per bundle."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor]:
        """``input_ids, attention_mask [B, T]`` to ``prompts [B, P, D]``."""
        (item,) = (item for item in self.installed if item.encoder)
        assert item.encoder is not None
        weights = item.stacked_rows(self.named(rest))
        return (item.encoder.prepare(weights, self.backbone, input_ids, attention_mask)["prompts"],)


class PrefillTwin(Twin):
    """Instruction in, last-token logits and a filled KV cache (prompts included) out."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``input_ids, attention_mask [B, T]`` to ``logits [B, 1, V]`` and K, V of P+T entries."""
        rows = rows_from_inputs(self.installed, self.named(rest))
        index = last_token(attention_mask) + rows.num_slots  # [B]
        cache = DynamicCache()
        output = read_instruction(
            self.backbone,
            rows,
            input_ids,
            attention_mask,
            select=lambda hidden: hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1])),
            cache=cache,
        )
        return (output.logits, *flatten(cache))


class DecodeTwin(Twin):
    """One step over a cache of plain tensors: the plain backbone's, but for methods that act on generated tokens."""

    num_plain = 3

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, rest: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """``input_ids, position_ids [B, 1]``, ``attention_mask [B, S+1]``, K, V of S entries to logits, K, V of S+1."""
        inputs = self.named(rest)
        past = [tensor for name, tensor in inputs.items() if name.startswith(PAST)]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        rows = rows_from_inputs(self.installed, inputs, only=in_decode(self.installed))
        output = continue_from(self.backbone, rows, input_ids, attention_mask, cache, position_ids=position_ids)
        return (output.logits, *flatten(cache))


class ServeTwin(Twin):
    """Prefill and decode in one graph for ONNX Runtime; see `iapt_export.graphs.in_place`."""

    num_plain = 4

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        rest: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """``input_ids, position_ids [B, T]``, ``seqlens_k [B]``, buffers ``[B, H, C, K]`` to logits ``[B, 1, V]``."""
        inputs = self.named(rest)
        past = [tensor for name, tensor in inputs.items() if name.startswith(PAST)]
        flag = inputs.get(READS_INSTRUCTION)
        step = Step(position_ids, seqlens_k, total_sequence_length, past, flag)
        logits = serve(self.backbone, rows_from_inputs(self.installed, inputs), input_ids, step)
        return (logits, *step.present)


class VerifyTwin(Twin):
    """A decode step of `ServeTwin` by several tokens a row, with logits behind each; the same methods act."""

    num_plain = 4

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        rest: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """``input_ids, position_ids [B, T]``, ``seqlens_k [B]``, buffers ``[B, H, C, K]`` to logits ``[B, T, V]``."""
        inputs = self.named(rest)
        past = [tensor for name, tensor in inputs.items() if name.startswith(PAST)]
        step = Step(position_ids, seqlens_k, total_sequence_length, past, flag=False, every=True)
        rows = rows_from_inputs(self.installed, inputs, only=in_decode(self.installed))
        return (serve(self.backbone, rows, input_ids, step), *step.present)


class ServePrefillTwin(Twin):
    """The reading half of `ServeTwin`, of standard operators."""

    num_plain = 3
    reads: ClassVar[bool] = True

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, seqlens_k: Tensor, rest: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """``input_ids, position_ids [B, T]``, ``seqlens_k [B]``, buffers ``[B, H, C, K]`` to logits ``[B, 1, V]``."""
        inputs = self.named(rest)
        past = [tensor for name, tensor in inputs.items() if name.startswith(PAST)]
        step = Step(position_ids, seqlens_k, None, past, self.reads)
        chosen = self.installed if self.reads else in_decode(self.installed)
        logits = serve(self.backbone, rows_from_inputs(self.installed, inputs, only=chosen), input_ids, step)
        return (logits, *step.present)


class ServeDecodeTwin(ServePrefillTwin):
    """The other half: one token a row, and of the methods those that act on generated tokens."""

    reads = False


class GeneratorTwin(Twin):
    """IAPT's generators alone: every layer's prompts from every layer's hidden states."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor]:
        """``hidden_states [B, L, T, D]``, ``attention_mask [B, T]`` to ``prompts [B, L, P, D]``."""
        rows = rows_from_inputs(self.installed, self.named(rest), only=generators(self.installed))
        batch, _, _, width = hidden_states.shape
        layers = len(decoder_layers(self.backbone))
        empty = hidden_states.new_zeros(batch, rows.num_slots, width)
        prompts = []
        for layer in range(layers):
            made = rows.slots(layer, empty, hidden_states[:, layer], attention_mask)[:, None]
            prompts.append(torch.ops.iapt.layer_end(made, layer))
        return (torch.cat(prompts, dim=1),)


def flatten(cache: DynamicCache) -> list[Tensor]:
    """Key and value of layer 0, of layer 1, and so on."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
