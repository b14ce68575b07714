"""Tenants whose file holds what training wrote, as it is: a machine without torch makes such a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from iapt_export.building.adapter_argument import parse_adapter
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BackboneSpec, BundleManifest
from iapt_export.contract.settings import computing_fields, raise_problems
from iapt_export.contract.tenant_card import TenantCard
from trainers.adapters.adapter import (
    WEIGHTS_FILE,
    AdapterConfig,
    backbone_problems,
    doubt_of_weights,
    is_stock_peft,
    read_adapter_config,
    read_fields,
)

LOGGER = logging.getLogger("iapt_export")
Arrays = dict[str, np.ndarray]


def plain_tenant(adapter: str, manifest: BundleManifest) -> tuple[TenantCard, Arrays] | None:
    """A tenant's card and its weights, if the bundle takes them as training wrote them.

    Args:
        adapter: ``DIR`` or ``NAME=DIR``, with what else `parse_adapter` reads.
        manifest: the bundle that shall serve it.

    Returns:
        The card, and tensors in fp32 under the names of the bundle's graphs; None where what is shipped is computed
        from the adapter, such as LoRA's stack or a table.

    Raises:
        IaptError: a bad adapter, or one for another backbone.
    """
    name, folder, options = parse_adapter(adapter)
    if is_stock_peft(read_fields(folder)):
        return None
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    stacks = [method for method in manifest.methods if method.form == config.peft_type]
    shapes = {weight.name: list(weight.shape) for method in stacks for weight in method.weights}
    if not stacks or not path.is_file() or _names(path) != shapes.keys():
        return None
    if options:
        raise IaptError(f"--adapter {adapter}: {folder} was not written by stock PEFT and says all of this itself")
    _check_backbone(config, manifest.backbone, str(folder))
    if doubt := doubt_of_weights(str(folder), config, manifest.backbone.name_or_path, manifest.backbone.weights_sha256):
        LOGGER.warning("%s", doubt)
    card = new_card(name, config, manifest.backbone, config.peft_type, config.method)
    taking = [method for method in stacks if card.fits(method.form, method.config)]
    if not taking:
        return None
    shapes = {weight.name: list(weight.shape) for weight in taking[0].weights}
    return card, _read(path, shapes)


def new_card(name: str, adapter: AdapterConfig, backbone: BackboneSpec, form: str, config: Any) -> TenantCard:
    """What a tenant's file says of itself.

    Args:
        name: the tenant's.
        adapter: how it was trained.
        backbone: of the bundle that takes it.
        form: what its graphs compute.
        config: that form's settings.
    """
    return TenantCard(
        name=name,
        form=form,
        config=json.loads(json.dumps(dict(computing_fields(config)))),  # as a manifest has it
        backbone=backbone.name_or_path,
        fingerprint=backbone.fingerprint,
        trained_form=adapter.peft_type,
        prompt_format=adapter.prompt_format,
        system_prompt=adapter.system_prompt,
        eos_token_id=adapter.eos_token_id,
        labels=list(adapter.labels),
        prompt_length=config.prompt_length,
    )


def _names(path: Path) -> set[str]:
    with _opened(path) as file:
        return set(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise IaptError(f"{path} is not a whole safetensors file ({error}); copy or train it again") from error


def _check_backbone(config: AdapterConfig, backbone: BackboneSpec, source: str) -> None:
    theirs = (backbone.hidden_size, backbone.num_layers, backbone.fingerprint)
    if problems := backbone_problems(config, theirs, "bundle"):
        raise IaptError(
            f"the adapter {source} was trained for {config.base_model_name_or_path}, another backbone than the "
            f"bundle's {backbone.name_or_path}: {'; '.join(problems)}"
        )


def _read(path: Path, shapes: dict[str, list[int | str]]) -> Arrays:
    problems, tensors = [], {}
    with _opened(path) as file:
        for name, shape in shapes.items():
            tensor = file.get_tensor(name).astype(np.float32)
            if list(tensor.shape) != shape:
                problems.append(f"tensor {name} has shape {tensor.shape}, expected {tuple(shape)}")
            elif not np.isfinite(tensor).all():
                problems.append(f"tensor {name} holds NaN or infinity; train the adapter again")
            tensors[name] = tensor
    raise_problems(str(path), problems)
    return tensors
