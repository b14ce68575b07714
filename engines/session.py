"""Generation with a KV cache over any runner: rows of different tenants in one batch, streamed token by token.

    with Session.open("BUNDLE") as session:
        for token in session.stream([Request("movie-sentiment", "A fine film.")]):
            print(token.text, end="")

Prefill reads each row's instruction together with its tenant's weights and writes prompts, keys and values; every
later step is the plain backbone, whoever the tenants are, unless a method treats generated tokens too (LoRA).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engines.loading import cast, load_tenants, open_runners
from engines.runner import Activated, Arrays, Runner
from engines.sampling import Sampling, choose
from engines.text import TextCodec
from iapt_export.errors import IaptError
from iapt_export.manifest import (
    SENT_PROMPTS,
    TENANT_INDEX,
    BundleManifest,
    TargetSpec,
    TenantSpec,
    verify_files,
)


@dataclass(frozen=True)
class Request:
    """What one row of a batch shall answer."""

    tenant: str
    prompt: str = ""
    """The instruction's text; or give ``tokens``."""
    tokens: tuple[int, ...] = ()
    """The instruction as token ids, instead of text."""
    prompts: np.ndarray | None = None
    """Soft prompts ``[P, D]`` that the client computed, for a tenant whose method takes them (LoPA)."""
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    """Go on to ``max_new_tokens`` whatever is generated (for measurements)."""


@dataclass(frozen=True)
class Token:
    """One generated token of one row."""

    row: int
    """Position of the request in the batch."""
    step: int
    token: int
    text: str
    """The text that this token adds; empty while a multi-byte character is incomplete."""
    finish_reason: str | None
    """``eos`` or ``length`` on the row's last token, else None."""


@dataclass
class _Row:
    request: Request
    prompt: list[int]
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False


@dataclass
class Batch:
    """What a batch's rows have in the cache."""

    tenants: list[str]
    mask: np.ndarray
    """``[B, S]`` int64 over the cache, prompt slots first."""
    cache: Arrays
    """``past_key_values.N.*`` to ``[B, H, S, K]``."""


class Session(Activated):
    """Generates with one target of one bundle."""

    def __init__(self, bundle: Path, manifest: BundleManifest, target: TargetSpec, runners: dict[str, Runner]) -> None:
        self.manifest = manifest
        self.target = target
        self.runners = runners
        self._codec: TextCodec | None = None
        self._bundle = bundle
        self.weights: Arrays = {}
        """The tenants' stacked weights, as prefill takes them; filled by `activate`."""

    @classmethod
    def open(
        cls, bundle: str | Path, target: str | None = None, *, device: str = "cpu", verify: bool = True
    ) -> Session:
        """Read a bundle and prepare one of its targets; `activate` (or a with block) loads it.

        Args:
            bundle: the folder that ``iapt-export build`` wrote.
            target: its name; None takes the bundle's first.
            device: ``cpu`` or ``cuda``, for ONNX Runtime.
            verify: check every file's hash first.

        Raises:
            IaptError: the bundle is damaged, or this machine cannot run the target.
        """
        folder = Path(bundle)
        manifest = BundleManifest.load(folder)
        if verify:
            verify_files(folder, manifest)
        chosen = manifest.target(target)
        return cls(folder, manifest, chosen, open_runners(folder, chosen, device=device))

    def activate(self) -> None:
        """Load graphs and tenants."""
        self.weights = load_tenants(self._bundle, self.manifest, self.target)
        for name in ("encoder", "prefill", "decode"):
            if name in self.runners:
                self.runners[name].activate()

    def deactivate(self) -> None:
        """Give the memory back."""
        for runner in self.runners.values():
            runner.deactivate()
        self.weights = {}

    @property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer, read when first needed."""
        if self._codec is None:
            self._codec = TextCodec(self._bundle)
        return self._codec

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Token ids of every row's answer, its end token included."""
        answers: list[list[int]] = [[] for _ in requests]
        for token in self.stream(requests):
            answers[token.row].append(token.token)
        return answers

    def stream(self, requests: list[Request]) -> Iterator[Token]:
        """Answer a batch of requests, token by token; rows end on their own.

        Raises:
            IaptError: an unknown tenant, an empty or too long prompt, too many rows, or a row that would
                outgrow the cache.
        """
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        self._check(rows)
        logits, batch = self.prefill(
            [row.prompt for row in rows], [row.request.tenant for row in rows], [row.request.prompts for row in rows]
        )
        step = 0
        while True:
            chosen = np.full(len(rows), self.manifest.backbone.pad_token_id, dtype=np.int64)
            for index, row in enumerate(rows):
                if not row.done:
                    chosen[index] = choose(logits[index], row.request.sampling, row.random)
                    yield self._advance(index, row, step, int(chosen[index]))
            if all(row.done for row in rows):
                return
            logits = self.decode(chosen, batch)
            step += 1

    def prefill(
        self, prompts: list[list[int]], tenants: list[str], sent: list[np.ndarray | None] | None = None
    ) -> tuple[np.ndarray, Batch]:
        """Read the instructions, padded on the left to one length.

        Args:
            prompts: token ids of each row.
            tenants: each row's tenant.
            sent: soft prompts ``[P, D]`` that a client computed; None has the encoder make them.

        Returns:
            Logits ``[B, V]``, and the batch with P+T cache entries a row.
        """
        length = max(map(len, prompts))
        ids = np.full((len(prompts), length), self.manifest.backbone.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, prompt in enumerate(prompts):
            ids[index, length - len(prompt) :] = prompt
            mask[index, length - len(prompt) :] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, **self.tenant_feeds(tenants)}
        if "encoder" in self.target.graphs:
            feeds |= self._sent_prompts(feeds, tenants, sent or [None] * len(tenants))
        outputs = self._infer("prefill", feeds)
        lengths = np.array([self.manifest.prompt_length(tenant) for tenant in tenants])
        slots = np.arange(self.manifest.num_slots)[None] >= self.manifest.num_slots - lengths[:, None]
        whole = np.concatenate([slots.astype(np.int64), mask], axis=1)
        return outputs["logits"][:, 0], Batch(tenants, whole, past_from_present(outputs))

    def decode(self, tokens: np.ndarray, batch: Batch) -> np.ndarray:
        """One step for ``tokens [B]``; extends the batch and returns logits ``[B, V]``."""
        batch.mask = np.concatenate([batch.mask, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        feeds = {
            "input_ids": tokens[:, None],
            "attention_mask": batch.mask,
            "position_ids": batch.mask.sum(axis=1, keepdims=True) - 1,
            **batch.cache,
            **self.tenant_feeds(batch.tenants),
        }
        outputs = self._infer("decode", feeds)
        batch.cache = past_from_present(outputs)
        return outputs["logits"][:, 0]

    def tenant_feeds(self, tenants: list[str]) -> Arrays:
        """Every method's stacked weights, and which entry of its stack each row uses: -1 for none."""
        feeds = dict(self.weights)
        for method in self.manifest.methods:
            names = [tenant.name for tenant in self.manifest.tenants_of(method.name)]
            rows = [names.index(tenant) if tenant in names else -1 for tenant in tenants]
            feeds[f"{method.name}.{TENANT_INDEX}"] = np.array(rows, dtype=np.int64)
        return feeds

    def _infer(self, graph: str, feeds: Arrays) -> Arrays:
        """Run a graph with those of ``feeds`` that it takes; the runner says which are missing."""
        names = [tensor.name for tensor in self.target.graphs[graph].inputs]
        return self.runners[graph].infer({name: feeds[name] for name in names if name in feeds})

    def _sent_prompts(self, feeds: Arrays, tenants: list[str], sent: list[np.ndarray | None]) -> Arrays:
        """``METHOD.prompts [B, P, D]``: what clients sent, the encoder's for the other rows of its method."""
        inputs = self.target.graphs["prefill"].inputs
        spec = next(tensor for tensor in inputs if tensor.name.endswith(f".{SENT_PROMPTS}"))
        name = spec.name.removesuffix(f".{SENT_PROMPTS}")
        prompts = np.zeros((len(tenants), *map(int, spec.shape[1:])), dtype=np.float32)
        own = {tenant.name for tenant in self.manifest.tenants_of(name)}
        missing = [row for row, tenant in enumerate(tenants) if tenant in own and sent[row] is None]
        if missing:
            rows = {key: array[missing] for key, array in feeds.items() if array.dtype == np.int64}
            prompts[missing] = self._infer("encoder", {**feeds, **rows})[SENT_PROMPTS]
        for row, array in enumerate(sent):
            if array is not None:
                prompts[row] = array
        return {spec.name: cast(prompts, spec.dtype)}

    def _row(self, index: int, request: Request) -> _Row:
        tenant = self.manifest.tenant(request.tenant)
        prompt = list(request.tokens) or self.codec.encode(request.prompt, tenant.prompt_format)
        wrong = [token for token in prompt if not 0 <= token < self.manifest.backbone.vocab_size]
        if wrong:
            raise IaptError(
                f"request {index}: token id {wrong[0]} is out of range; "
                f"the vocabulary has {self.manifest.backbone.vocab_size} entries"
            )
        if request.max_new_tokens < 1:
            raise IaptError(f"request {index}: max_new_tokens is {request.max_new_tokens}, expected at least 1")
        if request.prompts is not None:
            self._check_sent(index, tenant, request.prompts)
        return _Row(request, prompt, np.random.default_rng(request.sampling.seed))

    def _check_sent(self, index: int, tenant: TenantSpec, prompts: np.ndarray) -> None:
        name = f"{tenant.method}.{SENT_PROMPTS}"
        spec = next((tensor for tensor in self.target.graphs["prefill"].inputs if tensor.name == name), None)
        if spec is None:
            raise IaptError(
                f"request {index}: tenant {tenant.name} was trained with {tenant.trained_form}, which makes its own "
                "prompts; send none (only LoPA's may be computed by the client)"
            )
        finite = np.isfinite(cast(prompts, spec.dtype).astype(np.float32)).all()
        if list(prompts.shape) != spec.shape[1:] or not finite:
            raise IaptError(
                f"request {index}: the sent prompts have shape {list(prompts.shape)}, expected finite numbers of "
                f"shape {spec.shape[1:]} in {spec.dtype}"
            )

    def _check(self, rows: list[_Row]) -> None:
        ranges, slots = self.manifest.ranges, self.manifest.num_slots
        if not 1 <= len(rows) <= ranges.batch.max:
            raise IaptError(
                f"{len(rows)} requests in one batch; this bundle takes 1 to {ranges.batch.max} "
                "(send fewer at a time, or build with a larger --batch)"
            )
        longest = max(len(row.prompt) for row in rows)
        if longest > ranges.sequence.max:
            raise IaptError(
                f"a prompt has {longest} tokens; this bundle takes at most {ranges.sequence.max} "
                "(shorten it, or build with a larger --sequence)"
            )
        needed = slots + longest + max(row.request.max_new_tokens for row in rows) - 1
        if needed > ranges.past.max:
            raise IaptError(
                f"the batch needs {needed} cache entries ({slots} prompt, {longest} instruction, the rest new tokens); "
                f"this bundle has {ranges.past.max} (lower --max-new-tokens, or build with a larger --past)"
            )

    def _advance(self, index: int, row: _Row, step: int, token: int) -> Token:
        row.tokens.append(token)
        reason = None
        if token in self.manifest.backbone.eos_token_ids and not row.request.ignore_eos:
            reason = "eos"
        elif len(row.tokens) == row.request.max_new_tokens:
            reason = "length"
        row.done = reason is not None
        text = self._new_text(row, final=row.done)
        return Token(index, step, token, text, reason)

    def _new_text(self, row: _Row, final: bool) -> str:
        """What the latest token adds; a character whose bytes are not all there yet waits for the next token."""
        whole = self.codec.decode(row.tokens)
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return ""
        added, row.text = whole[len(row.text) :], whole
        return added


def past_from_present(outputs: Arrays) -> Arrays:
    """Rename a step's ``present.N.*`` to the next step's ``past_key_values.N.*``."""
    return {
        name.replace("present", "past_key_values", 1): array
        for name, array in outputs.items()
        if name.startswith("present.")
    }


__all__ = ["Batch", "Request", "Sampling", "Session", "Token", "past_from_present"]
