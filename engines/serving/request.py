"""What a client asks for, and what it gets token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.serving.grammar import Grammar
from engines.serving.renamed import renamed
from engines.serving.sampling import Sampling
from engines.serving.shaping import LogitsHook


@renamed(prompts="soft_prompts")
@dataclass(frozen=True)
class Request:
    """One instruction for one tenant."""

    tenant: str
    """Its name; an empty text, or the backbone's name, asks the backbone itself."""
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
    max_new_tokens: int | None = 64
    """The longest answer; None for as long as the cache holds."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer beside the bundle's end tokens; their text is not part of it."""
    ignore_eos: bool = False
    """Go on to ``max_new_tokens`` whatever is generated (for measurements)."""
    min_tokens: int = 0
    """The answer has so many tokens before an end token, a stop token or a stop text may end it."""
    logprobs: int | None = None
    """Give each token's log-probability, and those of this many of the likeliest; None for none."""
    grammar: Grammar | None = None
    """What the answer must match: JSON, a JSON schema, a regular expression, one of some texts."""
    logits_hook: LogitsHook | None = None
    """Changes the logits of each step, see `engines.serving.shaping.LogitsHook`."""
    priority: int = 0
    """Of a tenant's waiting requests those of a smaller number get a row first; other tenants' do not wait for them."""
    deadline_s: float | None = None
    """Seconds after `submit` at which the answer ends with what it has, as ``deadline``."""


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
    logprob: float | None = None
    """Natural logarithm of the probability that the model gave it, before any setting of `Sampling`; if asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Token ids and log-probabilities of the likeliest."""
    text_offset: int = 0
    """Characters of the answer before it, those included that may be of a stop text; with log-probabilities alone."""


@dataclass(frozen=True)
class Ended:
    """A request ends between two tokens."""

    finish_reason: str
    """``cancelled`` or ``deadline``."""
    text: str = ""
    """What was said and not handed out."""


Item = Token | Ended | Exception
"""What a request gets: a token, its end between two, or its failure."""


@renamed(row="index")
@dataclass(frozen=True)
class Answer:
    """All that was generated for one request."""

    index: int
    tokens: list[int]
    """Token ids, the end token included."""
    text: str
    finish_reason: str
    """``eos``, ``length``, ``stop``, ``cancelled``, ``deadline``, or ``error`` of a partial answer."""
    error: Exception | None = None
    """Why the request could not be answered, or not to its end."""
