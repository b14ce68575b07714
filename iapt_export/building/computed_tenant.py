"""Tenants whose file is computed from what training wrote, with torch and their backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iapt_export.building.layout import check_weights, tenant_card
from iapt_export.building.plan import TenantPlan, load_tenants, plan_tenants
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.settings import config_from_dict
from iapt_export.contract.tenant_card import TenantCard
from trainers.decoder.backbone import Backbone
from trainers.decoder.insertion import sizes_of
from trainers.methods.forms import FORM_CONFIGS, FORMS


def computed_tenant(
    adapter: str, bundle: Path, backbone: Backbone, peft_prompt_format: str | None
) -> tuple[TenantCard, dict[str, np.ndarray]]:
    """A tenant's card, and its weights in fp32 as the bundle's graphs take them.

    Args:
        adapter: as `iapt_export.building.tenant_file.write_tenant_file` takes it, like the others.
        bundle: the bundle that shall serve it.
        backbone: the bundle's.
        peft_prompt_format: how prompts are fed to an adapter of stock PEFT.

    Raises:
        IaptError: a bad adapter, another backbone, or a method that the bundle's graphs cannot run.
    """
    manifest = BundleManifest.load(bundle)
    adapters = load_tenants([adapter], backbone, peft_prompt_format)
    ((name, loaded),) = adapters.items()
    if loaded.config.backbone_fingerprint != manifest.backbone.fingerprint:
        raise IaptError(f"{adapter} was trained on another backbone than {bundle}'s {manifest.backbone.name_or_path}")
    check_weights(backbone, manifest.backbone)  # folded tables and DoRA's norms are computed with them
    forms = {method.form for method in manifest.methods}
    fold = FORMS[loaded.config.peft_type].folded_form in forms
    plan = plan_tenants(adapters, backbone.model, fold_embeddings=fold)
    plan = _in_the_bundles_stack(plan, name, manifest, backbone.model)
    card = tenant_card(name, plan, manifest.backbone)
    if not any(card.fits(method.form, method.config) for method in manifest.methods):
        raise IaptError(
            f"{bundle} has no method {card.form} with {card.config}, so its graphs cannot run {adapter}; build a "
            "bundle with an adapter of that kind"
        )
    return card, {name: tensor.detach().float().numpy() for name, tensor in plan.shipped[name].items()}


def _in_the_bundles_stack(plan: TenantPlan, name: str, manifest: BundleManifest, model: Any) -> TenantPlan:
    """The plan with the tenant in tensors of the bundle's own stack, where its method can be one of that."""
    (item,) = plan.installed
    for spec in manifest.methods:
        if item.encoder is None and FORMS[spec.form].stack_kind() is type(item.method).stack_kind():
            config = config_from_dict(FORM_CONFIGS[spec.form], spec.config, "manifest.json")
            stacked = item.method.in_stack(config, sizes_of(model))
            if stacked is not item.method:
                return replace(
                    plan, installed=[replace(item, method=stacked)], shipped={name: dict(stacked.state_dict())}
                )
    return plan
