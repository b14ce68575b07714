"""Generation with a KV cache over any runner: rows of different tenants in one batch, streamed token by token.

    with Session.open("BUNDLE") as session:
        for token in session.stream([Request("movie-sentiment", "A fine film.")]):
            print(token.text, end="")

Prefill reads each row's instruction together with its tenant's weights and writes prompts, keys and
values; every later step is the plain backbone, whoever the tenants are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engines.loading import load_tenants, open_runners
from engines.runner import Activated, Arrays, Runner
from engines.sampling import Sampling, choose
from engines.text import TextCodec
from iapt_export.errors import IaptError
from iapt_export.manifest import BundleManifest, TargetSpec, verify_files


@dataclass(frozen=True)
class Request:
    """What one row of a batch shall answer."""

    tenant: str
    prompt: str = ""
    """The instruction's text; or give ``tokens``."""
    tokens: tuple[int, ...] = ()
    """The instruction as token ids, instead of text."""
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
        for name in ("prefill", "decode"):
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
        logits, cache, mask = self.prefill([row.prompt for row in rows], [row.request.tenant for row in rows])
        step = 0
        while True:
            chosen = np.full(len(rows), self.manifest.backbone.pad_token_id, dtype=np.int64)
            for index, row in enumerate(rows):
                if not row.done:
                    chosen[index] = choose(logits[index], row.request.sampling, row.random)
                    yield self._advance(index, row, step, int(chosen[index]))
            if all(row.done for row in rows):
                return
            logits, cache, mask = self.decode(chosen, mask, cache)
            step += 1

    def prefill(self, prompts: list[list[int]], tenants: list[str]) -> tuple[np.ndarray, Arrays, np.ndarray]:
        """Read the instructions, padded on the left to one length.

        Returns:
            Logits ``[B, V]``, the cache as ``past_key_values.N.*`` arrays ``[B, H, P+T, K]``, and the
            mask ``[B, P+T]`` over it (prompt rows first).
        """
        length = max(map(len, prompts))
        ids = np.full((len(prompts), length), self.manifest.backbone.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, prompt in enumerate(prompts):
            ids[index, length - len(prompt) :] = prompt
            mask[index, length - len(prompt) :] = 1
        rows = np.array([self.manifest.tenant_index(tenant) for tenant in tenants], dtype=np.int64)
        outputs = self.runners["prefill"].infer(
            {"input_ids": ids, "attention_mask": mask, "tenant_index": rows, **self.weights}
        )
        slots = np.ones((len(prompts), self.manifest.generator.prompt_length), dtype=np.int64)
        return outputs["logits"][:, 0], past_from_present(outputs), np.concatenate([slots, mask], axis=1)

    def decode(self, tokens: np.ndarray, mask: np.ndarray, cache: Arrays) -> tuple[np.ndarray, Arrays, np.ndarray]:
        """One step of the plain backbone for ``tokens [B]``; returns logits, cache and mask as `prefill` does."""
        mask = np.concatenate([mask, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        outputs = self.runners["decode"].infer(
            {
                "input_ids": tokens[:, None],
                "attention_mask": mask,
                "position_ids": mask.sum(axis=1, keepdims=True) - 1,
                **cache,
            }
        )
        return outputs["logits"][:, 0], past_from_present(outputs), mask

    def _row(self, index: int, request: Request) -> _Row:
        tenant = self.manifest.tenants[self.manifest.tenant_index(request.tenant)]
        prompt = list(request.tokens) or self.codec.encode(request.prompt, tenant.prompt_format)
        wrong = [token for token in prompt if not 0 <= token < self.manifest.backbone.vocab_size]
        if wrong:
            raise IaptError(
                f"request {index}: token id {wrong[0]} is out of range; "
                f"the vocabulary has {self.manifest.backbone.vocab_size} entries"
            )
        if request.max_new_tokens < 1:
            raise IaptError(f"request {index}: max_new_tokens is {request.max_new_tokens}, expected at least 1")
        return _Row(request, prompt, np.random.default_rng(request.sampling.seed))

    def _check(self, rows: list[_Row]) -> None:
        ranges, slots = self.manifest.ranges, self.manifest.generator.prompt_length
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


__all__ = ["Request", "Sampling", "Session", "Token", "past_from_present"]
