"""PEFT's own answers, by its model classes over the backbone as transformers runs it: nothing of ours in them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest, TenantSpec
from iapt_export.contract.settings import config_from_dict
from trainers.adapters.adapter import Adapter, AdapterConfig
from trainers.adapters.directory import save_adapter
from trainers.adapters.peft_format import PEFT_TYPES
from trainers.decoder.attention import stock_attention
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import METHOD_CONFIGS
from trainers.methods.forms import METHODS

ADVICE = "--no-peft-check leaves this comparison out"


@dataclass(frozen=True)
class PeftFolder:
    """A tenant as PEFT loads it."""

    path: Path
    task: int | None = None
    """Which task of a multitask prompt."""


def peft_version() -> str:
    """The installed PEFT's version, or that there is none."""
    try:
        import peft
    except ImportError:
        return "not installed"
    return str(peft.__version__)


def folders_of(adapters: Mapping[str, Adapter]) -> dict[str, PeftFolder]:
    """The directories that PEFT can read, of the adapters that a bundle is built from."""
    return {
        name: PeftFolder(adapter.path, adapter.peft_task)
        for name, adapter in adapters.items()
        if adapter.config.peft_type in PEFT_TYPES and adapter.path is not None
    }


def write_folders(bundle: Path, manifest: BundleManifest, model: Any, folder: Path) -> dict[str, PeftFolder]:
    """Write the tenants of methods that PEFT has as directories for it, from a bundle's own files."""
    tenants = [tenant for tenant in manifest.tenants if tenant.trained_form in PEFT_TYPES]
    for tenant in tenants:
        save_adapter(folder / tenant.name, _config(tenant, manifest, model), _trained(bundle, tenant))
    return {tenant.name: PeftFolder(folder / tenant.name) for tenant in tenants}


def peft_answer(
    model: Any, folder: PeftFolder, prompt: Sequence[int], new_tokens: int
) -> tuple[list[int], list[np.ndarray]]:
    """What ``PeftModel.generate`` gives for one prompt.

    Args:
        model: the backbone, of transformers; unchanged afterwards.
        folder: the adapter.
        prompt: token ids.
        new_tokens: how many are generated, past any end token.

    Returns:
        The tokens, and each one's logits ``[V]`` in fp32.

    Raises:
        IaptError: PEFT cannot load or run the adapter.
    """
    import peft

    ids = torch.tensor([prompt])
    options = {} if folder.task is None else {"task_ids": torch.tensor([folder.task])}
    with stock_attention(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that are ours, and of its own deprecations
        wrapped = None
        try:
            wrapped = peft.PeftModel.from_pretrained(model, str(folder.path))
            generated = wrapped.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
        except Exception as error:  # PEFT's and transformers' errors share no base class
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise IaptError(f"PEFT {peft.__version__} cannot run {folder.path}: {reason}; {ADVICE}") from error
        finally:
            _unwrap(wrapped)
    tokens = generated.sequences[0, -new_tokens:].tolist()
    return tokens, [step[0].float().numpy() for step in generated.logits]


def _unwrap(wrapped: Any) -> None:
    """Take out of the backbone what PEFT put into it."""
    with contextlib.suppress(AttributeError):  # prompts stand outside of it
        wrapped.base_model.unload()


def _trained(bundle: Path, tenant: TenantSpec) -> dict[str, torch.Tensor]:
    return load_file(bundle / (tenant.trained or tenant.path or ""))


def _config(tenant: TenantSpec, manifest: BundleManifest, model: Any) -> AdapterConfig:
    method = config_from_dict(METHOD_CONFIGS[tenant.trained_form], tenant.trained_config, "manifest.json")
    sizes = sizes_of(model)
    names = METHODS[tenant.trained_form](method, sizes).linear_names
    return AdapterConfig(
        base_model_name_or_path=manifest.backbone.name_or_path,
        backbone_fingerprint=manifest.backbone.fingerprint,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab_size,
        linears={name: sizes.linears[name] for name in names},
        layers_path=sizes.layers_path,
        method=method,
    )
