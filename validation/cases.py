"""What is fed to the comparison: real prompts of every tenant, mixed in batches with padding."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from engines.text import TextCodec
from iapt_export.errors import BundleError, IaptError
from iapt_export.manifest import BundleManifest

MIN_PROMPTS = 24
"""Prompts that a full comparison uses at least, over all tenants."""

GENERAL_PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short greeting for a birthday card.",
    "List three fruits that are red.",
    "Translate 'good morning' into Spanish.",
    "The train was late again, and nobody at the station knew why. What could have happened?",
    "Summarise: Water expands when it freezes, which is why bottles left in the freezer can burst.",
    "Is 17 a prime number?",
)
"""Used for adapters that bring no example prompts of their own."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of one tenant."""

    tenant: str
    text: str
    tokens: tuple[int, ...]


def prompts_from_bundle(
    bundle: Path, manifest: BundleManifest, codec: TextCodec, seed: int, new_tokens: int
) -> list[Prompt]:
    """Prompts of all tenants in a seeded order that mixes them: `MIN_PROMPTS` at least, where so many fit.

    One of each method, then one of each tenant, stand first: the first batch's logits and caches are compared too.

    Raises:
        IaptError: an examples file is not JSONL with ``prompt`` fields.
        BundleError: no prompt of some tenant fits the bundle, so that the tenant would go uncompared.
    """
    per_tenant = -(-MIN_PROMPTS // len(manifest.tenants))
    room = manifest.ranges.past.max - manifest.num_slots - new_tokens + 1
    longest = min(manifest.ranges.sequence.max, room)
    found: list[Prompt] = []
    for tenant in manifest.tenants:
        texts = list(GENERAL_PROMPTS) if tenant.examples is None else read_examples(bundle / tenant.examples)
        rounds = range(1, -(-per_tenant // len(texts)))
        texts += [f"{text} ({number})" for number in rounds for text in texts]
        tokenised = [Prompt(tenant.name, text, tuple(codec.encode(text, tenant.prompt_format))) for text in texts]
        fitting = [prompt for prompt in tokenised if len(prompt.tokens) <= longest][:per_tenant]
        if not fitting:
            raise BundleError(
                f"tenant {tenant.name}: no example prompt has at most {longest} tokens, so nothing to compare; "
                "raise --sequence or --past, or lower --new-tokens"
            )
        found += fitting
    random.Random(seed).shuffle(found)
    methods = {tenant.name: tenant.method for tenant in manifest.tenants}
    of_method = {methods[prompt.tenant]: prompt for prompt in reversed(found)}
    of_tenant = {prompt.tenant: prompt for prompt in reversed(found)}
    return sorted(found, key=lambda p: 0 if of_method[methods[p.tenant]] is p else 1 if of_tenant[p.tenant] is p else 2)


def read_examples(path: Path) -> list[str]:
    """The ``prompt`` of each line of an examples file.

    Raises:
        IaptError: a line is not a JSON object with a non-empty ``prompt``, or there is none.
    """
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            text = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise IaptError(f'{path}:{number}: expected a JSON object like {{"prompt": "..."}}') from error
        if not isinstance(text, str) or not text.strip():
            raise IaptError(f"{path}:{number}: the prompt is empty or no text")
        texts.append(text)
    if not texts:
        raise IaptError(f'{path} is empty; expected a JSON object like {{"prompt": "..."}} on each line')
    return texts
