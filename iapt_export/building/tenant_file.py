"""One adapter as a tenant's file: what a running session of an existing bundle takes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

from iapt_export.building.plain_tenant import plain_tenant
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest, write_atomically
from iapt_export.contract.tenant_card import TenantCard, check_name

if TYPE_CHECKING:
    from trainers.decoder.backbone import Backbone


def write_tenant_file(
    adapter: str,
    bundle: Path,
    output: Path,
    load_backbone: Callable[[], Backbone],
    peft_prompt_format: str | None = None,
) -> TenantCard:
    """Write ``output`` whole or not at all; without torch where training's tensors are shipped as they are.

    Args:
        adapter: ``DIR`` or ``NAME=DIR``.
        bundle: the bundle that shall serve it, or any with the same backbone and method.
        output: a safetensors file.
        load_backbone: gives the bundle's backbone; called where what is shipped has to be computed.
        peft_prompt_format: how prompts are fed to an adapter that stock PEFT wrote, ``plain``, ``newline`` or ``chat``;
            needed where the tokenizer has a chat template.

    Returns:
        The card that the file carries.

    Raises:
        IaptError: a bad adapter, another backbone, a method that the bundle's graphs cannot run, or an output of
            another name.
    """
    if output.suffix != ".safetensors":
        raise IaptError(f"{output} must end in .safetensors, by which a server's folder of tenants knows its files")
    check_name(output.stem, "servers call a tenant as its file is called, so give another output")
    made = plain_tenant(adapter, BundleManifest.load(bundle))
    if made is None:
        from iapt_export.building.computed_tenant import computed_tenant

        made = computed_tenant(adapter, bundle, load_backbone(), peft_prompt_format)
    card, tensors = made
    stored = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_atomically(output, safetensors.numpy.save(stored, card.to_metadata()))
    return card
