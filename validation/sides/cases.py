"""What is fed to the comparison: real prompts of every tenant, mixed in batches with padding."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.serving.text import TextCodec, base_format
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.manifest import BundleManifest, Ranges, TenantSpec
from iapt_export.contract.schema import parse_json

MIN_PROMPTS = 24
"""Prompts that a full comparison uses at least, over all tenants."""
QUICK_PROMPTS = 3
"""The same for a quick one."""
QUICK_TOKENS = 8
"""Tokens for each prompt of a quick comparison."""
SHORT_STEPS = 16
"""Steps of the cases that look at what is read, prefill included: so many that coarse weights' error by chance, of one
row at one step, can be told from a fault."""
LONG_STEPS = 256
"""Steps of the case that looks for errors that grow."""

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
    """Empty for the backbone alone."""
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A batch made of a bundle's ranges, under a name with which it can be run alone."""

    name: str
    rows: tuple[Prompt, ...]
    new_tokens: int
    """Steps, prefill included."""
    is_refused: bool = False
    """The session must refuse it in words."""
    is_quick: bool = True
    """Part of a quick comparison too."""
    fed: tuple[tuple[int, ...], ...] = ()
    """Each row's tokens after its instruction, one a step, of which PyTorch computes hundreds in one pass; none where
    the case is refused."""

    def __str__(self) -> str:
        lengths = ", ".join(str(len(row.tokens)) for row in self.rows)
        return f"{self.name} ({len(self.rows)} rows of {lengths} tokens, {self.new_tokens} steps)"


def generated_cases(
    manifest: BundleManifest, seed: int, text: Sequence[int], short_steps: int = SHORT_STEPS
) -> list[Case]:
    """Batches at the edges of the manifest's ranges: the same for the same seed.

    Instructions are cut from ``text``, not drawn: among random tokens stands one that no text has, at which a rounding
    decides where attention goes. There int8 was wrong by 1.8 of the largest logit at one step, by 1.2 at another, and
    by less than 0.25 at the 506 others. `unusual-tokens` has what no text has: special ids, the first and the last.

    Args:
        manifest: the bundle's.
        seed: decides where the text is cut.
        text: what the bundle's tenants read, see `example_text`.
        short_steps: of the cases that are not about long answers.
    """
    return [*_accepted(manifest, seed, text, short_steps), *_refused(manifest, seed)]


def _accepted(manifest: BundleManifest, seed: int, text: Sequence[int], short_steps: int) -> list[Case]:
    ranges, names = manifest.ranges, [tenant.name for tenant in manifest.tenants] or [""]
    room = ranges.past.max - manifest.num_slots
    rows, longest = ranges.batch.max, min(ranges.sequence.max, room)

    def batch(
        name: str, tenants: list[str], lengths: list[int], new_tokens: int = short_steps, *, is_quick: bool = True
    ) -> Case:
        prompts, fed = [], []
        for place, (tenant, wanted) in enumerate(zip(tenants, lengths, strict=True)):
            start, length = random.Random(f"{seed} {name} {place}").randrange(len(text)), min(wanted, longest)
            cut = [text[(start + offset) % len(text)] for offset in range(length + new_tokens)]
            prompts.append(Prompt(tenant, f"{length} tokens of text", tuple(cut[:length])))
            fed.append(tuple(cut[length:]))
        steps = min(new_tokens, room - max(len(row.tokens) for row in prompts) + 1)  # as many as fit into the cache
        return Case(name, tuple(prompts), steps, is_quick=is_quick, fed=tuple(tokens[: steps - 1] for tokens in fed))

    mixed = [names[place % len(names)] for place in range(rows)]
    middle = [min(longest, 5 + 6 * place) for place in range(rows)]
    uneven = [1 if place % 2 else min(longest, 40) for place in range(rows)]
    special = manifest.backbone
    unusual = (0, special.vocab_size - 1, special.pad_token_id, *special.eos_token_ids, 1)[:longest]
    last = names[-1]
    cases = [
        batch("one-token", names[:1], [1]),
        batch("largest-batch", mixed, middle, is_quick=False),
        batch("most-padding", mixed, uneven),
        batch("one-tenant", [last] * rows, middle, is_quick=False),
        batch("tenant-0", names[:1] * min(2, rows), [3, 17][: min(2, rows)]),
        dataclasses.replace(
            batch("unusual-tokens", [last], [len(unusual)]), rows=(Prompt(last, "special token ids", unusual),)
        ),
        batch("longest-instruction", names[:1], [longest], is_quick=False),
    ]
    if room > LONG_STEPS // 4:
        cases.append(batch("long-answer", [last] * min(2, rows), [8, 5][: min(2, rows)], LONG_STEPS, is_quick=False))
    if manifest.serves_backbone:
        cases.append(batch("backbone-alone", ["", last][: min(2, rows)], [9, 4][: min(2, rows)]))
    cases.append(batch("full-cache", [last], [max(1, room - 8)], room, is_quick=False))
    return cases


def _refused(manifest: BundleManifest, seed: int) -> list[Case]:
    """What no session may answer: nothing to read, too much of it, tokens that do not exist."""
    ranges, name = manifest.ranges, manifest.tenants[0].name if manifest.tenants else ""
    vocabulary = manifest.backbone.vocab_size
    room = ranges.past.max - manifest.prompt_length(name)

    def case(what: str, tokens: tuple[int, ...], new_tokens: int = 1) -> Case:
        return Case(f"refuse-{what}", (Prompt(name, what, tokens),), new_tokens, is_refused=True)

    return [
        case("only-padding", ()),
        case("too-long", (5,) * (ranges.sequence.max + 1)),
        case("overfull-cache", (5,), new_tokens=room + 1),
        case("unknown-token", (vocabulary,)),
    ]


def prompts_from_bundle(
    bundle: Path,
    manifest: BundleManifest,
    codec: TextCodec,
    seed: int,
    new_tokens: int,
    num_prompts: int = MIN_PROMPTS,
) -> list[Prompt]:
    """Prompts of all tenants in a seeded order that mixes them: ``num_prompts`` at least, where so many fit.

    One of each method, then one of each tenant, stand first: the first batch's logits and caches are compared too.

    Raises:
        IaptError: an examples file is not JSONL with ``prompt`` fields.
        BundleError: no prompt of some tenant fits the bundle, so that the tenant would go uncompared.
    """
    tenants = _asked(bundle, manifest)
    per_tenant = -(-num_prompts // len(tenants))
    prompts: list[Prompt] = []
    for tenant in tenants:
        texts = _texts(bundle, tenant)
        rounds = range(1, -(-per_tenant // len(texts)))
        texts += [f"{text} ({number})" for number in rounds for text in texts]
        prompts += _fitting(manifest, codec, tenant, texts, new_tokens)[:per_tenant]
    random.Random(seed).shuffle(prompts)
    methods = {tenant.name: tenant.method for tenant in tenants}
    of_method = {methods[prompt.tenant]: prompt for prompt in reversed(prompts)}
    of_tenant = {prompt.tenant: prompt for prompt in reversed(prompts)}

    def rank(prompt: Prompt) -> int:
        return 0 if of_method[methods[prompt.tenant]] is prompt else 1 if of_tenant[prompt.tenant] is prompt else 2

    return sorted(prompts, key=rank)


def own_prompts(
    bundle: Path, manifest: BundleManifest, codec: TextCodec, new_tokens: int, max_prompts: int
) -> list[Prompt]:
    """The example prompts as they stand, tenant by tenant: of each the first that fit, its share of ``max_prompts``.

    Raises:
        IaptError: an examples file is not JSONL with ``prompt`` fields.
        BundleError: no prompt of some tenant fits the bundle.
    """
    tenants = _asked(bundle, manifest)
    share = max(1, max_prompts // len(tenants))
    return [
        prompt
        for tenant in tenants
        for prompt in _fitting(manifest, codec, tenant, _texts(bundle, tenant), new_tokens)[:share]
    ]


def check_room(ranges: Ranges, num_slots: int, new_tokens: int) -> None:
    """Refuse ranges in which no prompt of any length has room for its answer, before anything is exported.

    Raises:
        IaptError: what to change.
    """
    if _longest(ranges, num_slots, min(new_tokens, QUICK_TOKENS)) < 1:
        raise IaptError(
            f"--past {ranges.past.max} leaves no room for a prompt to compare, beside {num_slots} prompt rows and its "
            "answer; raise it, or lower --new-tokens"
        )


def _longest(ranges: Ranges, num_slots: int, new_tokens: int) -> int:
    return min(ranges.sequence.max, ranges.past.max - num_slots - new_tokens + 1)


def _fitting(
    manifest: BundleManifest, codec: TextCodec, tenant: TenantSpec, texts: list[str], new_tokens: int
) -> list[Prompt]:
    """Those of a tenant's texts that a session takes with an answer of so many tokens.

    Raises:
        BundleError: none is short enough, so that the tenant would go uncompared.
    """
    longest = _longest(manifest.ranges, manifest.num_slots, new_tokens)
    tokenised = [Prompt(tenant.name, text, tuple(_as_trained(codec, tenant, text))) for text in texts]
    fitting = [prompt for prompt in tokenised if len(prompt.tokens) <= longest]
    if not fitting:
        raise BundleError(
            f"tenant {tenant.name or manifest.backbone.name_or_path}: no example prompt has at most {longest} "
            "tokens, so nothing to compare; raise --sequence or --past, or lower --new-tokens"
        )
    return fitting


def example_text(bundle: Path, manifest: BundleManifest, codec: TextCodec) -> list[int]:
    """Every tenant's example prompts, as it reads them, one after the other.

    Raises:
        IaptError: an examples file is not JSONL with ``prompt`` fields.
    """
    return [
        token
        for tenant in _asked(bundle, manifest)
        for text in _texts(bundle, tenant)
        for token in _as_trained(codec, tenant, text)
    ]


def _asked(bundle: Path, manifest: BundleManifest) -> list[TenantSpec]:
    """Whose prompts are compared: the tenants', or the backbone's under no name where there is none."""
    return manifest.tenants or [TenantSpec("", None, None, "none", {}, base_format(bundle))]


def _as_trained(codec: TextCodec, tenant: TenantSpec, text: str) -> list[int]:
    """A prompt's ids, after the system prompt that the tenant was trained with."""
    if tenant.prompt_format != "chat" or not tenant.system_prompt:
        return codec.encode(text, tenant.prompt_format)
    return codec.encode(
        [{"role": "system", "content": tenant.system_prompt}, {"role": "user", "content": text}], "chat"
    )


def _texts(bundle: Path, tenant: TenantSpec) -> list[str]:
    return list(GENERAL_PROMPTS) if tenant.examples is None else read_examples(bundle / tenant.examples)


def read_examples(path: Path) -> list[str]:
    """The ``prompt`` of each line of an examples file.

    Raises:
        IaptError: a line is not a JSON object with a non-empty ``prompt``, or there is none.
    """
    texts = []
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # not at what Unicode calls a line's end
    except UnicodeDecodeError as error:
        raise IaptError(f"{path} is not UTF-8 text: {error}; expected JSON lines") from error
    for number, line in enumerate(lines if lines != [""] else (), 1):
        try:
            text = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise IaptError(f'{path}:{number}: expected a JSON object like {{"prompt": "..."}}') from error
        if not isinstance(text, str) or not text.strip():
            raise IaptError(f"{path}:{number}: the prompt is empty or no text")
        texts.append(text)
    if not texts:
        raise IaptError(f'{path} is empty; expected a JSON object like {{"prompt": "..."}} on each line')
    return texts
