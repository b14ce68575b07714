"""What a tuning method may do to a frozen decoder: the one contract that every method's file fills in.

A method overrides what it changes and inherits "unchanged" for the rest:

    expanded     what all layers read, made of the weights alone                 (IAPT, P-tuning v2)
    prepare      anything it must know of the instruction beforehand             (LoPA)
    embed        the embeddings of the tokens                                    (ADePT, DePT)
    soft_prompt  what stands before the embedded tokens, in the P prompt slots   (prompt tuning and its kin)
    slots        the hidden states of the P prompt slots, right before a layer   (IAPT)
    key_value    the keys and values of the slots inside a layer, after RoPE     (P-tuning v2)
    project      the output of a linear layer                                    (LoRA)

All are pure functions of ``weights``: name to tensor, each with a leading axis of 1 (one adapter for all rows)
or B (each row its own tenant's). The trained module and the exported graph so run the same lines.

Shapes: B batch, T tokens, P prompt slots, L layers, D hidden width, R rank or bottleneck, H key/value heads, K head
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainers.decoder.backbone_sizes import Sizes

Weights = dict[str, Tensor]
"""Parameter name to tensor ``[1 or B, ...]``."""


class Method(nn.Module):
    """A method's trained tensors and what they do. Subclasses say which (`shapes`) and override the hooks."""

    config: Any
    decayed: tuple[str, ...] = ()
    """Parameters that weight decay acts on: matrices that are multiplied, no prompts, biases or coefficients."""
    learning_rate: ClassVar[float] = 3e-3
    """Peak learning rate of AdamW where the user names none."""
    in_decode: bool = False
    """Whether generated tokens are treated too; else the decode step is the plain backbone's."""
    generates: ClassVar[bool] = False
    """Whether `slots` makes new prompts of the instruction at every layer."""
    is_encoder: ClassVar[bool] = False
    """Whether `prepare` makes ``prompts [B, P, D]``, which `deployed` takes ready made: the work of another graph."""
    is_mergeable: ClassVar[bool] = False
    """Whether `merged` can write it into the backbone's weights."""
    folded_form: ClassVar[str | None] = None
    """Name of what `folded` makes, in `trainers.methods.forms.FORMS`; None where there is nothing to fold."""
    rational_form: tuple[int, int, str] | None = None
    """Coefficients of numerator and denominator, and form, of a rational activation; None without one."""
    rational: Callable[..., Tensor]
    """Evaluates that activation, see `trainers.methods.rational`; an export puts its traceable operator here."""

    def __init__(self, config: Any, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        for name, shape in self.shapes(config, sizes).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.reset_parameters()

    @staticmethod
    def shapes(config: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Name to shape of every trained tensor, in the order in which files and graphs carry them."""
        raise NotImplementedError

    @property
    def num_slots(self) -> int:
        """P: cache entries that stand before the instruction."""
        return int(self.config.prompt_length)

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's current random state."""

    def start(self, backbone: Any, tokenizer: Any, instruction: list[int]) -> None:
        """Move the initial weights, before training, to values that disturb the frozen backbone least.

        Args:
            backbone: the frozen causal LM.
            tokenizer: its tokenizer.
            instruction: token ids of one instruction, to see what instructions begin with.
        """

    def learning_rate_factors(self) -> dict[str, float]:
        """Parameter name to what the learning rate is multiplied by for it; 1 where it is not named."""
        return {}

    def weights(self) -> Weights:
        """The trained tensors and what `expanded` adds, with the row axis that the hooks expect."""
        return self.expanded({name: parameter[None] for name, parameter in self.named_parameters()})

    def expanded(self, weights: Weights) -> Weights:
        """``weights``, and with them what several layers read of them and no instruction changes, made once."""
        return weights

    def deployed(self) -> Method:
        """The module that is shipped in its place: equal outputs, what can be computed beforehand computed."""
        return self

    def folded(self, embedding_table: Tensor) -> Method:
        """The module that is shipped in its place where what it does to embeddings is computed for every token.

        Args:
            embedding_table: ``[V, D]``, row v what the backbone's embedding module returns for token v; for a
                backbone that scales embeddings inside that module this is not the module's weight.
        """
        raise NotImplementedError

    def merged(self, backbone: Any) -> AbstractContextManager[None]:
        """Write this method's effect into the backbone's own weights while the context is open.

        One tenant then costs nothing at run time.

        Args:
            backbone: a causal LM of transformers, changed in place; the very tensors from before are put back.
        """
        raise NotImplementedError

    def picked(self, stacks: Weights, index: Tensor) -> Weights:
        """Each row's own weights ``[B, ...]``, by ``index [B]`` out of ``stacks``: name to ``[N, ...]``."""
        return {name: stack.index_select(0, index) for name, stack in stacks.items()}

    def prepare(self, weights: Weights, backbone: Any, input_ids: Tensor, mask: Tensor) -> Weights:
        """What must be known of the instruction before it is read: the weights, with tensors ``[B, ...]`` added.

        Args:
            weights: this method's tensors.
            backbone: the frozen causal LM, with nothing inserted.
            input_ids: ``[B, T]`` int64.
            mask: ``[B, T]``, nonzero at instruction tokens.
        """
        return weights

    @classmethod
    def stack_kind(cls) -> type[Method]:
        """The method with whose tenants this one's may share a stack, see `stack_config`."""
        return cls

    @classmethod
    def stack_config(cls, configs: list[Any], sizes: Sizes, rank: int | None = None) -> Any | None:
        """Settings of one stack for tenants of all these settings; None where only equal ones can share a stack.

        Args:
            configs: of the tenants, all of this method.
            sizes: of the backbone.
            rank: the highest rank that a tenant may have, where the method has one; None takes the tenants' highest.

        Raises:
            IaptError: a tenant has a higher rank.
        """
        return None

    def in_stack(self, config: Any, sizes: Sizes) -> Method:
        """This method in tensors of a stack's settings, see `stack_config`; itself where it cannot be."""
        return self

    def embed(self, weights: Weights, input_ids: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Embeddings ``[B, T, D]`` of ``input_ids [B, T]``; ``mask [B, T]`` is nonzero at instruction tokens."""
        return embeddings

    def soft_prompt(self, weights: Weights) -> Tensor | None:
        """``[1 or B, P, D]`` before the embedded tokens; None where the slots begin as zeros.

        The backbone treats it as its embeddings: some scale them (Granite) or normalise them (Bloom) before layer 0, as
        they do in PEFT.
        """
        return None

    def slots(self, weights: Weights, layer: int, slots: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The hidden states of the prompt slots right before ``layer``.

        Args:
            weights: this method's tensors.
            layer: index of the layer.
            slots: ``[B, P, D]``, what the layer before made of its slots; before layer 0 what the backbone made of
                `soft_prompt`, or of zeros.
            tokens: ``[B, T, D]``, the hidden states of the tokens right before the layer.
            mask: ``[B, T]``, nonzero at instruction tokens (never padding, never the response).

        Returns:
            ``[B, P, D]``; the very tensor ``slots`` where nothing changes.
        """
        return slots

    def layer_kind(self, layer: int) -> Hashable:
        """What a layer is to this method beside a place in its stacks: layers that differ in it are traced apart."""
        return None

    def key_value(self, weights: Weights, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, P, K]`` of the prompt slots in ``layer``, rotary positions applied already."""
        return key, value

    def project(self, weights: Weights, layer: int, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Output ``[B, T, N]`` of the linear layer ``name`` of ``layer`` for ``inputs [B, T, M]``."""
        return outputs

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Linear layers that `project` changes, named as in `Sizes.linears`."""
        return ()

    @property
    def changes_cache(self) -> bool:
        """Whether `key_value` does anything."""
        return False


@dataclass
class Part:
    """A method with weights for the rows at hand."""

    method: Method
    weights: Weights
    active: Tensor | None = None
    """``[B]`` booleans, the rows that are of this method; None means all."""

    def choose(self, changed: Tensor, unchanged: Tensor) -> Tensor:
        """``changed`` in this part's rows, ``unchanged`` in all others."""
        if self.active is None or changed is unchanged:
            return changed
        return torch.where(self.active.view(-1, *[1] * (changed.dim() - 1)), changed, unchanged)


class Rows:
    """What is done to each row of a batch: nothing, one method for all, or each row its own tenant's method.

    Rows of methods with fewer slots leave the first ones empty: `slot_mask` hides them.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts
        self.num_slots = max((part.method.num_slots for part in parts), default=0)

    @property
    def mixed(self) -> bool:
        """Whether rows differ, so that slots may be empty in some."""
        return any(part.active is not None for part in self.parts)

    def slot_mask(self, mask: Tensor) -> Tensor:
        """``[B, P]`` in the type of ``mask [B, T]``: 1 where a row has a prompt."""
        if not self.mixed:
            return mask.new_ones(mask.shape[0], self.num_slots)
        place = torch.arange(self.num_slots, device=mask.device)
        filled = torch.zeros(mask.shape[0], self.num_slots, dtype=torch.bool, device=mask.device)
        for part in self.parts:
            assert part.active is not None
            filled = filled | (part.active[:, None] & (place >= self.num_slots - part.method.num_slots)[None])
        return filled.to(mask.dtype)

    def prepared(self, backbone: Any, input_ids: Tensor, mask: Tensor) -> Rows:
        """These rows with what `Method.prepare` adds to their weights."""
        return Rows(*(replace(p, weights=p.method.prepare(p.weights, backbone, input_ids, mask)) for p in self.parts))

    def embed(self, input_ids: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """See `Method.embed`."""
        for part in self.parts:
            changed = part.method.embed(part.weights, input_ids, embeddings, mask)
            embeddings = part.choose(changed, embeddings)
        return embeddings

    def prompts(self, slots: Tensor) -> Tensor:
        """``slots [B, P, D]`` with what `Method.soft_prompt` gives; methods with fewer slots fill the last ones."""
        for part in self.parts:
            prompt = part.method.soft_prompt(part.weights)
            if prompt is not None:
                empty = self.num_slots - part.method.num_slots
                expanded = prompt.to(slots.dtype).expand(slots.shape[0], -1, -1)
                slots = part.choose(torch.cat([slots[:, :empty], expanded], dim=1) if empty else expanded, slots)
        return slots

    def slots(self, layer: int, slots: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `Method.slots`; methods with fewer slots see the last ones."""
        for part in self.parts:
            empty = self.num_slots - part.method.num_slots
            part_slots = slots[:, empty:] if empty else slots
            changed = part.method.slots(part.weights, layer, part_slots, tokens, mask)
            if changed is part_slots:
                continue
            changed = changed.to(slots.dtype)
            slots = part.choose(torch.cat([slots[:, :empty], changed], dim=1) if empty else changed, slots)
        return slots

    def key_value(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Method.key_value`; ``key`` and ``value`` are those of all slots."""
        for part in self.parts:
            if not part.method.changes_cache:
                continue
            empty = self.num_slots - part.method.num_slots
            changed = part.method.key_value(part.weights, layer, key[:, :, empty:], value[:, :, empty:])
            key, value = (
                part.choose(torch.cat([old[:, :, :empty], new.to(old.dtype)], dim=2), old)
                for old, new in zip((key, value), changed, strict=True)
            )
        return key, value

    def project(self, layer: int, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `Method.project`."""
        for part in self.parts:
            if name in part.method.linear_names:
                outputs = part.choose(part.method.project(part.weights, layer, name, inputs, outputs), outputs)
        return outputs

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Linear layers that any part changes."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.method.linear_names))

    @property
    def changes_cache(self) -> bool:
        """Whether any part sets keys and values."""
        return any(part.method.changes_cache for part in self.parts)

    @property
    def in_decode(self) -> Rows:
        """The parts that treat generated tokens too."""
        return Rows(*(part for part in self.parts if part.method.in_decode))


def rows_of(method: Method | None) -> Rows:
    """One method for all rows, or the plain backbone."""
    return Rows() if method is None else Rows(Part(method, method.weights()))
