"""``probes.json``: texts, conversations and ids with what transformers made of them when the bundle was built.

Whoever turns text into ids compares with them when it opens the bundle, and refuses where one differs: another version
of a tokenizer, or a runtime that leaves a part of it out, gives other ids without an error. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from iapt_export.contract.errors import BundleError
from iapt_export.contract.schema import parse_json, read_fields

PROBES_FILE = "probes.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TextProbe:
    """A text as it is, and its ids with the tokenizer's own special tokens."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class ChatProbe:
    """A conversation, what the chat template makes of it, and the ids of that."""

    messages: list[dict[str, str]]
    text: str | None
    """None where the template refuses the conversation."""
    ids: list[int]


@dataclass(frozen=True)
class AnswerProbe:
    """Ids, and their text without special tokens and without cleaning spaces up."""

    ids: list[int]
    text: str


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What a bundle's tokenizer must give."""

    date: str
    """What ``strftime_now(...)`` gave in the templates, whatever its pattern; some write the date."""
    texts: list[TextProbe]
    chats: list[ChatProbe] = field(default_factory=list)
    """Empty where the tokenizer has no chat template."""
    answers: list[AnswerProbe]
    schema_version: int = SCHEMA_VERSION

    def save(self, bundle: Path) -> None:
        """Write ``probes.json``."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=True) + "\n"
        (bundle / PROBES_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, bundle: Path) -> Probes:
        """Read and check ``probes.json``.

        Raises:
            BundleError: it is no JSON, of another schema, or has missing, unknown or wrong fields.
        """
        path = bundle / PROBES_FILE
        try:
            fields = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {error}; build the bundle again") from error
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version is {version!r}, this version of iapt-export reads {SCHEMA_VERSION}; "
                "upgrade iapt-export, or build the bundle again"
            )
        problems: list[str] = []
        probes: Probes = read_fields(cls, fields, "probes", problems)
        if problems:
            raise BundleError(f"{path} is not valid: " + "; ".join(problems))
        return probes
