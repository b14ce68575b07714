"""PEFT's own answers, by its model classes over the backbone as transformers runs it: nothing of ours in them."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iapt_export.contract.errors import IaptError
from trainers.adapters.adapter import Adapter, AdapterConfig, is_in_peft
from trainers.adapters.directory import save_adapter
from trainers.decoder.attention import stock_attention
from validation.sides.reference import Reference

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
        if adapter.path is not None
        and (adapter.from_peft or is_in_peft(adapter.config.peft_type, adapter.config.value_dim))
    }


def write_folders(reference: Reference, folder: Path) -> dict[str, PeftFolder]:
    """Write the tenants of methods that PEFT has as directories for it, from what the bundle holds of them.

    DoRA's are left out: the bundle has what came of their lengths, and not these.
    """
    manifest = reference.manifest
    width = manifest.backbone.value_dim
    names = [tenant.name for tenant in manifest.tenants if is_in_peft(tenant.trained_form, width)]
    for name in names:
        method = reference.methods[name]
        linears = {linear: method.sizes.linears[linear] for linear in method.linear_names}
        config = AdapterConfig(
            base_model_name_or_path=manifest.backbone.name_or_path,
            backbone_fingerprint=manifest.backbone.fingerprint,
            **asdict(replace(method.sizes, linears=linears)),
            method=method.config,
        )
        save_adapter(folder / name, config, method.state_dict())
    return {name: PeftFolder(folder / name) for name in names}


def peft_answer(
    model: Any, folder: PeftFolder, prompt: Sequence[int], new_tokens: int
) -> tuple[list[int], list[np.ndarray]]:
    """What a ``PeftModel`` gives for one prompt, token by token, each from the whole text before it.

    Not by its ``generate``: PEFT 0.21 does not see the cache of transformers 5.24, which has another name, and puts a
    prompt or prefix before every single token.

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
    logits: list[np.ndarray] = []
    options: dict[str, Any] = {} if folder.task is None else {"task_ids": torch.tensor([folder.task])}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with stock_attention(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that are ours, and of its own deprecations
        wrapped = None
        try:
            wrapped = peft.PeftModel.from_pretrained(model, str(folder.path)).eval()
            for _ in range(new_tokens):
                output = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
                logits.append(output.logits[0, -1].float().numpy())
                ids = torch.cat([ids, torch.tensor([[int(logits[-1].argmax())]])], dim=1)
        except Exception as error:  # PEFT's and transformers' errors share no base class
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise IaptError(f"PEFT {peft.__version__} cannot run {folder.path}: {reason}; {ADVICE}") from error
        finally:
            _unwrap(wrapped)
    return ids[0, len(prompt) :].tolist(), logits


def _unwrap(wrapped: Any) -> None:
    """Take out of the backbone what PEFT put into it."""
    with contextlib.suppress(AttributeError):  # prompts stand outside of it
        wrapped.base_model.unload()
