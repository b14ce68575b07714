"""A tenant card says how its tenant is asked, and earlier versions must not take a form that they do not know."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engines.serving.tenants import read_tenant_file
from iapt_export.contract.errors import IaptError
from iapt_export.contract.tenant_card import CARD_KEY, TenantCard
from tests.bundles import PROMPTED, TinyBuild


@pytest.mark.parametrize(("tenant", "version"), [("alpha", 2), ("beta", 1), ("gamma", 1)])
def test_a_form_that_is_new_is_told_by_the_version(tiny_build: TinyBuild, tenant: str, version: int) -> None:
    card, _ = read_tenant_file(tiny_build.bundle / "tenants" / f"{tenant}.safetensors")
    assert (card.prompt_format, card.schema_version) == (PROMPTED[tenant], version)
    assert TenantCard.from_metadata(card.to_metadata(), "it") == card


def test_a_form_that_is_none_is_refused(tiny_build: TinyBuild) -> None:
    card, _ = read_tenant_file(tiny_build.bundle / "tenants" / "beta.safetensors")
    fields = dataclasses.asdict(card) | {"prompt_format": "Chat"}
    with pytest.raises(IaptError, match="prompt_format is 'Chat', expected chat, plain or newline"):
        TenantCard.from_metadata({CARD_KEY: json.dumps(fields)}, "it")
