"""What a client asks for, and what it gets token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.serving.renamed import renamed
from engines.serving.sampling import Sampling


@renamed(prompts="soft_prompts")
@dataclass(frozen=True)
class Request:
    """One instruction for one tenant."""

    tenant: str
    prompt: str = ""
    """The instruction's text; or give ``tokens``."""
    tokens: tuple[int, ...] = ()
    """The instruction as token ids, instead of text."""
    messages: Sequence[Mapping[str, str]] = ()
    """The instruction as a conversation, instead of one text: ``{"role": ..., "content": ...}`` each, the user's last;
    for a tenant that was trained with a chat template."""
    system: str | None = None
    """A system prompt; None takes the one that the tenant was trained with, an empty text takes none."""
    soft_prompts: np.ndarray | None = None
    """``[P, D]``, which the client computed, for a tenant whose method takes them (LoPA)."""
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer beside the bundle's end tokens; their text is not part of it."""
    ignore_eos: bool = False
    """Go on to ``max_new_tokens`` whatever is generated (for measurements)."""


@renamed(row="index")
@dataclass(frozen=True)
class Token:
    """One generated token."""

    index: int
    """Number of the request among those that were given together."""
    step: int
    token: int
    text: str
    """The text that this token adds; what could be part of a character or of a stop text waits for the next."""
    finish_reason: str | None
    """``eos``, ``length`` or ``stop`` on the last token, else None."""


Item = Token | Exception | None
"""What a request gets: a token, its failure, or None where it was cancelled and dropped."""


@renamed(row="index")
@dataclass(frozen=True)
class Answer:
    """All that was generated for one request."""

    index: int
    tokens: list[int]
    """Token ids, the end token included."""
    text: str
    finish_reason: str
    """``eos``, ``length``, ``stop`` or ``cancelled``."""
