"""From a request to an entry of the queue: every check of its fields, its text as token ids, its grammar."""

from __future__ import annotations

import dataclasses
import math
import operator
import threading
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from engines.serving.conversation import check_text_fields, encode_request
from engines.serving.drafts import Drafter
from engines.serving.entry import Entry
from engines.serving.grammar import Grammar, GrammarCompiler
from engines.serving.opened_files import OpenedFiles
from engines.serving.request import Request
from engines.serving.sampling import Sampling, is_whole
from engines.serving.shaping import Shaping
from engines.serving.stepper import Stepper
from engines.serving.stop_texts import check_stops
from engines.serving.tenants import Tenant, cast
from engines.serving.text import TOKENIZER_FILE, TextCodec
from iapt_export.contract.errors import IaptError, shown
from iapt_export.contract.manifest import BundleManifest

MAX_NEW_TOKENS = 2**31
MAX_DEADLINE_S = 365 * 86400
MAX_LOGPROBS = 100
RIGHT_CALL = 'Request(tenant="NAME", prompt="TEXT")'


class Admission:
    """Checks requests against one bundle."""

    def __init__(self, bundle: Path, manifest: BundleManifest, stepper: Stepper, files: OpenedFiles) -> None:
        self._bundle = bundle
        self._files = files
        self._has_codec = (bundle / TOKENIZER_FILE).is_file()
        self._manifest = manifest
        self._stepper = stepper
        self._reading = threading.Lock()
        self._codec: TextCodec | None = None
        self._compiler: GrammarCompiler | None = None

    @property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer, read when first needed, by one thread alone: it takes tens of megabytes."""
        with self._reading:
            if self._codec is None:
                self._files.check()
                self._codec = TextCodec(self._bundle)
            return self._codec

    def entry(self, request: Request, number: int, tenant: Tenant, where: str = "") -> Entry:
        """What the scheduler takes.

        Args:
            request: the request.
            number: what its tokens carry as ``index``.
            tenant: its tenant.
            where: names the request in errors.

        Raises:
            IaptError: it cannot be answered; the error names the field.
        """
        where = where or f"request {number}"
        check_text_fields(where, request)
        self._check_length(where, request, len(request.tokens))  # before each of a million is looked at
        check_fields(where, request)
        prompt = self._prompt(where, request, tenant)
        if request.max_new_tokens is None:
            room = self._stepper.capacity - tenant.prompt_length - len(prompt) + 1
            request = dataclasses.replace(request, max_new_tokens=max(room, request.min_tokens, 1))
        self._check_room(where, request, tenant, prompt)
        ends = frozenset(self._manifest.backbone.eos_token_ids)
        return Entry(
            request,
            number,
            tenant,
            prompt,
            self.codec if request.stop or self._has_codec else None,
            ends,
            np.random.default_rng(request.sampling.seed),
            None if request.soft_prompts is None else self._sent(where, tenant, request.soft_prompts),
            self._shaping(request, prompt, ends),
            Drafter(prompt, self._stepper.drafts) if self._stepper.drafts else None,
        )

    def _prompt(self, where: str, request: Request, tenant: Tenant) -> list[int]:
        prompt = [operator.index(token) for token in request.tokens]
        prompt = prompt or encode_request(where, request, tenant, self.codec)
        size = self._manifest.backbone.vocab_size
        named = {
            "tokens": prompt,
            "stop_token_ids": request.stop_token_ids,
            "logit_bias": request.sampling.logit_bias,
        }
        for name, tokens in named.items():
            wrong = [token for token in tokens if not 0 <= token < size]
            if wrong:
                text = f"token id {shown(wrong[0])} is out of range; the vocabulary has {size} entries"
                raise IaptError(f"{where}: {text}", field=name)
        return prompt

    def _check_length(self, where: str, request: Request, count: int) -> None:
        longest = self._manifest.ranges.sequence.max
        if count > longest:
            raise IaptError(
                f"{where}: the prompt has {count} tokens; this bundle takes at most {longest}",
                code="context_length_exceeded",
                field=_read_from(request),
                remedy="shorten it, or build with a larger --sequence",
            )

    def _check_room(self, where: str, request: Request, tenant: Tenant, prompt: list[int]) -> None:
        self._check_length(where, request, len(prompt))
        if len(prompt) < (least := self._manifest.ranges.sequence.min):
            raise IaptError(
                f"{where}: the prompt has {len(prompt)} tokens; this bundle takes at least {least}",
                field=_read_from(request),
                remedy="build with a smaller --sequence",
            )
        assert request.max_new_tokens is not None
        needed = tenant.prompt_length + len(prompt) + request.max_new_tokens - 1
        if needed > self._stepper.capacity:
            raise IaptError(
                f"{where} needs {needed} cache entries ({tenant.prompt_length} prompt, {len(prompt)} instruction, the "
                f"rest new tokens); this bundle has {self._stepper.capacity}",
                code="context_length_exceeded",
                field="max_new_tokens",
                remedy="lower --max-new-tokens, or build with a larger --past",
            )

    def _shaping(self, request: Request, prompt: list[int], ends: frozenset[int]) -> Shaping | None:
        """What changes its logits; None where nothing does, so that the row costs what the model costs."""
        sampling = request.sampling
        if not (sampling.changes_logits or request.min_tokens or request.logits_hook or request.grammar):
            return None
        return Shaping(
            sampling,
            prompt,
            ends=(frozenset() if request.ignore_eos else ends) | frozenset(request.stop_token_ids),
            min_tokens=request.min_tokens,
            hook=request.logits_hook,
            matcher=None if request.grammar is None else self._grammars().compile(request.grammar),
        )

    def _grammars(self) -> GrammarCompiler:
        codec, backbone = self.codec, self._manifest.backbone
        with self._reading:
            if self._compiler is None:
                self._compiler = GrammarCompiler(codec.to_json(), backbone.vocab_size, backbone.eos_token_ids)
            return self._compiler

    def _sent(self, where: str, tenant: Tenant, prompts: np.ndarray) -> np.ndarray:
        """A copy of the prompts that a client sent; its own array may change while the request waits."""
        spec = self._stepper.sent_prompts
        if spec is None or spec.name.split(".")[0] != tenant.method:
            raise IaptError(
                f"{where}: tenant {tenant.name} was trained with {tenant.trained_form}, which makes its own prompts; "
                "send none (only LoPA's may be computed by the client)",
                field="soft_prompts",
            )
        try:
            given = np.array(prompts)
            if given.dtype.kind in "cOSU":  # complex numbers would lose a part, texts would be read as numbers
                raise TypeError(given.dtype)
            copied = cast(given, spec.dtype)
        except (TypeError, ValueError, OverflowError) as error:
            what = f"{where}: soft_prompts is {shown(prompts)}, expected an array of numbers"
            raise IaptError(what, field="soft_prompts") from error
        if list(copied.shape) != spec.shape[1:]:
            raise IaptError(
                f"{where}: the sent prompts have shape {list(copied.shape)}, expected {spec.shape[1:]}",
                field="soft_prompts",
            )
        if not np.isfinite(copied.astype(np.float32)).all():
            raise IaptError(
                f"{where}: the sent prompts hold NaN or infinity, or numbers too large for {spec.dtype}",
                field="soft_prompts",
            )
        return copied


def _read_from(request: Request) -> str:
    """The field that says what to read."""
    return "messages" if request.messages else "tokens" if len(request.tokens) else "prompt"


def check_are_requests(requests: Any) -> None:
    """Refuse what holds no requests: one alone, a text, a mapping.

    Raises:
        IaptError: with the right call.
    """
    if not isinstance(requests, Iterable) or isinstance(requests, str | bytes | Mapping):
        raise IaptError(f"expected a list of requests, such as [{RIGHT_CALL}], found {type(requests).__name__}")


def check_is_request(request: Any, where: str, tenants: Collection[str]) -> None:
    """Refuse what was made by a wrong call of `Request`, before anything is looked up.

    Args:
        request: what came.
        where: names it in errors.
        tenants: the names that a request may have.

    Raises:
        IaptError: with the right call.
    """
    if not isinstance(request, Request):
        raise IaptError(f"{where} is {type(request).__name__}, expected {RIGHT_CALL}")
    for name in ("tenant", "prompt"):
        value = getattr(request, name)
        if not isinstance(value, str):
            many = isinstance(value, list | tuple)
            remedy = f"; it is one instruction: [{RIGHT_CALL} for TEXT in TEXTS]" if many else f": {RIGHT_CALL}"
            raise IaptError(f"{where}: {name} is {type(value).__name__}, expected text{remedy}", field=name)
    if request.tenant in tenants or not request.tenant:
        return
    has_tokens = not isinstance(request.tokens, tuple) or request.tokens
    says_nothing = not (request.prompt or request.messages or has_tokens)
    if request.prompt in tenants or (says_nothing and " " in request.tenant):
        text = f"tenant is {request.tenant[:60]!r} and prompt {request.prompt[:60]!r}; expected {RIGHT_CALL}"
        known = f"the tenants are {', '.join(tenants)}"
        raise IaptError(f"{where}: {text}, and {known}", code="tenant_not_found", field="tenant")


def check_fields(where: str, request: Request) -> None:
    """Refuse a request whose fields no session could serve.

    Raises:
        IaptError: what was expected, and what came.
    """
    check_stops(where, request)

    def refuse(name: str, text: str) -> None:
        raise IaptError(f"{where}: {text}", field=name)

    longest = request.max_new_tokens
    if longest is not None and (not is_whole(longest) or not 1 <= longest <= MAX_NEW_TOKENS):
        limit = f"at most {MAX_NEW_TOKENS}" if is_whole(longest) and longest > 0 else "at least 1"
        refuse("max_new_tokens", f"max_new_tokens is {shown(longest)}, expected {limit}, a whole number")
    for name in ("tokens", "stop_token_ids"):
        strange = [token for token in getattr(request, name) if not is_whole(token)]
        if strange:
            refuse(name, f"{shown(strange[0])} is no token id; expected whole numbers")
    if not is_whole(request.min_tokens) or not 0 <= request.min_tokens <= (longest or request.min_tokens):
        refuse("min_tokens", f"min_tokens is {shown(request.min_tokens)}, expected 0 to max_new_tokens, a whole number")
    if request.logprobs is not None and (not is_whole(request.logprobs) or not 0 <= request.logprobs <= MAX_LOGPROBS):
        refuse("logprobs", f"logprobs is {shown(request.logprobs)}, expected None, or 0 to {MAX_LOGPROBS}")
    if not is_whole(request.priority):
        refuse("priority", f"priority is {shown(request.priority)}, expected a whole number")
    deadline = request.deadline_s
    if deadline is not None and not (isinstance(deadline, Real) and 0 < deadline <= MAX_DEADLINE_S):
        refuse("deadline_s", f"deadline_s is {shown(deadline)}, expected more than 0 seconds, at most a year, or None")
    if not isinstance(request.sampling, Sampling):
        refuse("sampling", f"sampling is {type(request.sampling).__name__}, expected a Sampling")
    if request.grammar is not None and not isinstance(request.grammar, Grammar):
        refuse("grammar", f"grammar is {type(request.grammar).__name__}, expected a Grammar")
    if request.grammar is not None and request.ignore_eos:
        refuse("ignore_eos", "an answer with a grammar ends where the grammar ends; leave out ignore_eos")
    if request.grammar is not None and request.min_tokens:
        refuse("min_tokens", "an answer with a grammar ends where the grammar ends; leave out min_tokens")
    if request.logits_hook is not None and not callable(request.logits_hook):
        refuse("logits_hook", f"logits_hook is {type(request.logits_hook).__name__}, expected a function")


def work_of(request: Request) -> float:
    """What `Admission.entry` has to read, in characters or ids; without end where a grammar has to be compiled."""
    if request.grammar is not None:
        return math.inf
    read = len(request.prompt) + len(request.tokens) + sum(map(len, request.stop))
    return read + sum(len(str(message)) for message in request.messages)
