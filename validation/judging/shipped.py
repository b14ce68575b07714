"""Hold every tenant's shipped tensors against those that training wrote: what no prompt happens to read counts too."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor

from iapt_export.contract.manifest import TenantSpec
from iapt_export.contract.settings import config_from_dict
from iapt_export.graphs.installed import as_deployed
from trainers.decoder.insertion import sizes_of
from trainers.methods.forms import FORM_CONFIGS
from validation.judging.result import Check, TargetResult
from validation.sides.reference import Reference

NAME = "tenants' files"
LIMIT = 1e-5
"""Of the largest difference over the largest value of a tensor. Both come of one computation in fp32, and are equal on
one machine; on another, sums may have another order. Chosen for that, and not measured between machines."""


def compare_shipped(reference: Reference, on_step: Callable[[str], None]) -> TargetResult | None:
    """Compute what ships from what was trained, once more, and compare it with the bundle's files.

    Tables are read row by row as prompts need them, so a wrong row shows in no answer until its token, or its position,
    is asked for.

    Args:
        reference: the PyTorch side, with the tensors that training wrote.
        on_step: called with a word, for progress.

    Returns:
        A result like that of a target, a check for each tenant; None where all tenants ship what was trained.
    """
    started, checks = time.perf_counter(), []
    for tenant in reference.manifest.tenants:
        if tenant.path and tenant.trained:
            on_step(f"computing {tenant.name}'s file once more")
            found = load_file(reference.bundle / tenant.path)
            error, where = _worst(_expected(reference, tenant), found)
            measured, limits = {"relative": error}, {"relative": LIMIT}
            checks.append(
                Check("shipped tensors", tenant.path, error <= LIMIT, measured, limits, where, tenants=[tenant.name])
            )
    if not checks:
        return None
    status = "pass" if all(check.passed for check in checks) else "fail"
    return TargetResult(NAME, "fp32", status, checks=checks, seconds=time.perf_counter() - started)


@torch.no_grad()
def _expected(reference: Reference, tenant: TenantSpec) -> dict[str, Tensor]:
    """The tensors that the bundle's method takes of a tenant."""
    method = reference.methods[tenant.name]
    if method.is_encoder:
        return dict(method.state_dict())
    (spec,) = (spec for spec in reference.manifest.methods if spec.name == tenant.method)
    made = as_deployed(method, reference.model, fold_embeddings=spec.form == method.folded_form)
    config = config_from_dict(FORM_CONFIGS[spec.form], spec.config, "manifest.json")
    return dict(made.in_stack(config, sizes_of(reference.model)).state_dict())


def _worst(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of two files' tensors, and in which tensor it lies."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (expected, found)]
    if shapes[0] != shapes[1]:
        return float("inf"), f"tensors {shapes[1]}, expected {shapes[0]}"
    errors = {
        name: float((tensor - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30))
        for name, tensor in found.items()
    }
    name = max(errors, key=lambda each: errors[each])
    return errors[name], f"worst in {name}"
