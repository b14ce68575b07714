"""What a tenant's file says of itself, in the metadata of its safetensors. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.manifest import BundleManifest, MethodSpec, TenantSpec
from iapt_export.contract.prompt_format import ONE_OF, PROMPT_FORMATS
from iapt_export.contract.schema import parse_json, read_fields

CARD_KEY = "iapt_tenant"
NAME = re.compile(r"\w[\w.-]{0,127}")
"""A tenant's name, which names a file too."""
SCHEMA_VERSIONS = (1, 2)
"""2 is that of prompts which versions that read 1 alone would feed in another way."""
OLDER: dict[str, dict[str, Any]] = {"IAPT": {"normalize": False}}
"""Form to the fields that it got later, with what files that lack them mean, as `trainers.methods.configs` has it."""


def check_name(name: str, remedy: str) -> None:
    """Refuse a tenant's name that no folder of tenants could have, or that leaves it.

    Raises:
        IaptError: it is none; ``remedy`` ends the sentence.
    """
    if not NAME.fullmatch(name):
        raise IaptError(
            f"tenant name {name!r} must be up to 128 letters, digits, '-', '_' or '.', the first a letter, a digit or "
            f"'_'; {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class TenantCard:
    """Which tenant a file holds, and which bundles can take it."""

    name: str
    form: str
    """What its method's graphs compute: ``IAPT``, ``PROMPT_TUNING``, ``POSITION_TABLE``, ..."""
    config: dict[str, Any]
    """That form's settings which change what is computed; a bundle that takes the tenant has a method with them."""
    backbone: str
    """The backbone's name, for people."""
    fingerprint: str
    """The backbone's fingerprint, which must be the bundle's."""
    trained_form: str
    """The method that it was trained with."""
    prompt_format: str
    """One of `iapt_export.contract.prompt_format.PROMPT_FORMATS`."""
    system_prompt: str | None = None
    """What all of its training examples began with; empty for none, None where they differ or did not say."""
    eos_token_id: int | None = None
    """What ended its answers in training, which must be an end token of the bundle; None where it is not known."""
    labels: list[str] = field(default_factory=list)
    prompt_length: int | None = None
    """Cache entries that its prompts take, as its method's in the bundle; None in files of older versions."""
    schema_version: int = 1

    def __post_init__(self) -> None:
        if self.prompt_format not in PROMPT_FORMATS:
            raise BundleError(f"prompt_format is {self.prompt_format!r}, expected {ONE_OF}")
        if self.prompt_format == "newline" and self.schema_version == 1:
            object.__setattr__(self, "schema_version", 2)

    def fits(self, form: str, config: Mapping[str, Any]) -> bool:
        """Whether a bundle's method computes what this tenant needs; how weights were found does not count."""
        mine, theirs = (_comparable(form, fields) for fields in (self.config, config))
        return self.form == form and all(theirs.get(name) == value for name, value in mine.items())

    def contradictions(self, manifest: BundleManifest, spec: TenantSpec, method: MethodSpec) -> list[str]:
        """One line for each thing that a bundle's manifest says otherwise of its own tenant."""
        told = {
            "name": (self.name, spec.name),
            "fingerprint": (self.fingerprint, manifest.backbone.fingerprint),
            "trained_form": (self.trained_form, spec.trained_form),
            "prompt_format": (self.prompt_format, spec.prompt_format),
            "system_prompt": (self.system_prompt, spec.system_prompt),
            "labels": (self.labels, spec.labels),
            "prompt_length": (self.prompt_length, method.prompt_length),
        }
        problems = [
            f"{name} is {mine!r}, and {theirs!r} in the manifest"
            for name, (mine, theirs) in told.items()
            if mine != theirs
        ]
        if not self.fits(method.form, method.config):
            problems.append(f"form and config are not those of method {method.name}")
        if self.eos_token_id is not None and self.eos_token_id not in manifest.backbone.eos_token_ids:
            problems.append(f"eos_token_id is {self.eos_token_id}, which is none of the manifest's")
        return problems

    def to_metadata(self) -> dict[str, str]:
        """As safetensors keeps it."""
        return {CARD_KEY: json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> TenantCard:
        """Read and check a file's card.

        Raises:
            IaptError: there is none, or it is of another schema, or has missing, unknown or wrong fields.
        """
        try:
            fields = parse_json(metadata[CARD_KEY])
        except (KeyError, ValueError) as error:
            raise IaptError(
                f"{where} carries no tenant card; expected a file written by 'iapt-export tenant', or a bundle's "
                "tenants/NAME.safetensors"
            ) from error
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if version not in SCHEMA_VERSIONS:
            raise IaptError(
                f"{where}: the tenant card's schema_version is {version!r}, this version of iapt-export reads "
                f"{' and '.join(map(str, SCHEMA_VERSIONS))}; write the file again"
            )
        problems: list[str] = []
        card: TenantCard = read_fields(cls, fields, "tenant card", problems)
        if problems:
            raise IaptError(f"{where} has no valid tenant card: " + "; ".join(problems))
        return card


def _comparable(form: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A form's settings with those that an older file lacks; lists of names in one order, also before they are JSON."""
    complete = {**OLDER.get(form, {}), **config}
    return {
        name: sorted(value, key=str) if isinstance(value, list | tuple) else value for name, value in complete.items()
    }
