"""The tenants of a running session: their weights, stacked by method, as data that comes and goes.

A method's tenants share arrays ``METHOD.TENSOR [N, ...]`` that the graphs take as inputs, so a tenant is added by
writing its entry: nothing is rebuilt, and rows under way keep theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from engines.runner import Arrays, numpy_type
from engines.serving.text import base_format
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.manifest import (
    TENANT_INDEX,
    BundleManifest,
    MethodSpec,
    TargetSpec,
    TenantSpec,
    served_name,
)
from iapt_export.contract.tenant_card import TenantCard, check_name
from iapt_export.contract.weights_header import read_header

FLOATS = ("float32", "float16", "bfloat16")
"""Types that a tenant's file may have."""


@dataclass
class Tenant:
    """One tenant while it is installed."""

    name: str
    method: str | None
    """Name of its method; None where it is merged into the backbone."""
    index: int
    """Its entry in the method's stack."""
    prompt_length: int
    """Cache entries that its rows have before their instruction."""
    prompt_format: str
    trained_form: str
    system_prompt: str | None = None
    """The one with which all of its training examples began; empty for none, None where they differ or did not say."""
    told: bool = False
    """Whether the user was told of a request in another form than training's."""
    users: int = 0
    """Requests that were accepted for it and are not finished."""
    removed: bool = False


@dataclass(frozen=True)
class NewTenant:
    """A tenant's file, read and checked against a bundle."""

    name: str
    card: TenantCard
    method: MethodSpec
    entries: Arrays
    """``METHOD.TENSOR`` to this tenant's entry, in the type that the graphs take."""


class TenantsFullError(IaptError):
    """A method has as many tenants as the bundle takes."""

    def __init__(self, method: str, *args: object, **fields: Any) -> None:
        """Say of which method."""
        super().__init__(*args, **fields)
        self.method = method


class TenantBank:
    """The stacked weights, and which entry is whose; entries of removed tenants are used again."""

    def __init__(self, bundle: Path, manifest: BundleManifest, target: TargetSpec) -> None:
        """Load the bundle's own tenants.

        Raises:
            BundleError: a tenant's file is missing, no safetensors, or not what the contract asks for.
        """
        self.manifest = manifest
        self.methods = {method.name: method for method in manifest.methods}
        self.types = {tensor.name: tensor.dtype for graph in target.graphs.values() for tensor in graph.inputs}
        self.tenants: dict[str, Tenant] = {}
        self.stacks: Arrays = {}
        """``METHOD.TENSOR`` to ``[N, ...]`` in the type that the graphs take. Read-only: what changes is another array,
        so that runners see it (see `engines.runner.Runner.infer`)."""
        self._arrays: Arrays = {}
        self._entries: dict[str, list[Tenant | None]] = {}
        for method in manifest.methods:
            specs = manifest.tenants_of(method.name)
            files = [_read_tenant(bundle, manifest, spec, method) for spec in specs]
            for weight in method.weights:
                name = f"{method.name}.{weight.name}"
                stack = np.stack([file[weight.name] for file in files])
                self._arrays[name] = self._cast(stack, name, f"method {method.name}: a tenant's {weight.name}")
            self._entries[method.name] = [self._enter(spec, index) for index, spec in enumerate(specs)]
        self._show(self._arrays)
        for spec in manifest.tenants:
            if spec.method is None:
                self._enter(spec, -1)
        self.base = _base(bundle, manifest)
        """The backbone alone; None where a tenant is merged into its weights."""
        self._names_of_base = (served_name(manifest.backbone.name_or_path), manifest.backbone.name_or_path)

    def get(self, name: str) -> Tenant:
        """The tenant of that name; the backbone alone for an empty one or its own.

        Raises:
            BundleError: no such tenant.
        """
        if name in self.tenants:
            return self.tenants[name]
        if self.base is not None and name in ("", *self._names_of_base):
            return self.base
        known = ", ".join(self.tenants) or "none"
        text = f"tenant {name!r} is not in this bundle; its tenants are {known}"
        if name == "":
            text = (
                "the backbone alone cannot be asked in this bundle: a tenant is merged into it, or it was built by an "
                f"earlier version; its tenants are {known}"
            )
        raise BundleError(text, code="tenant_not_found", field="tenant")

    def read(self, path: Path, name: str | None = None) -> NewTenant:
        """Read a tenant's file, as ``iapt-export tenant`` writes it; while steps run, because nothing changes.

        Args:
            path: a safetensors file with a tenant card.
            name: what to call it; None takes the card's name.

        Raises:
            IaptError: the file is for another backbone or a method that the bundle lacks, holds other tensors or
                NaN, was trained with another end token, or would be called as the backbone is or by no name.
        """
        card, tensors = read_tenant_file(path)
        chosen = card.name if name is None else name
        check_name(chosen, "call it by another one")
        if self.base is not None and chosen in self._names_of_base:
            raise IaptError(f"{chosen!r} is the name under which the backbone answers; give the tenant another one")
        if card.fingerprint != self.manifest.backbone.fingerprint:
            raise IaptError(
                f"{path} was made for another backbone ({card.backbone}); this bundle's is "
                f"{self.manifest.backbone.name_or_path}"
            )
        ends = self.manifest.backbone.eos_token_ids
        if card.eos_token_id is not None and card.eos_token_id not in ends:
            raise IaptError(
                f"{path}: its answers end with token {card.eos_token_id}, this bundle's with "
                f"{', '.join(map(str, ends)) or 'none'}, so they would run on; build the bundle again with its adapter"
            )
        method = self._method_of(card, path)
        if card.prompt_length not in (None, method.prompt_length):
            raise IaptError(
                f"{path}: its prompts take {card.prompt_length} cache entries, those of method {method.name} in this "
                f"bundle {method.prompt_length}; build the bundle again with its adapter"
            )
        entries = {}
        for weight in method.weights:
            tensor = tensors.get(weight.name)
            _check_tensor(tensor, weight.name, weight.shape, f"tenant {chosen}")
            assert tensor is not None
            stack = f"{method.name}.{weight.name}"
            entries[stack] = self._cast(tensor, stack, f"tenant {chosen}: {weight.name}")
        return NewTenant(chosen, card, method, entries)

    def install(self, new: NewTenant, *, replace: bool = False) -> Tenant:
        """Install what `read` gave; also while a step runs, which reads other entries and the stacks it began with.

        Args:
            new: a tenant.
            replace: take the place of a tenant of that name; its requests under way keep the old weights.

        Raises:
            IaptError: the name is taken.
            TenantsFullError: the method's stack is full.
        """
        if new.name in self.tenants and not replace:
            raise IaptError(f"tenant {new.name!r} is installed already; remove it first, or replace it")
        old = self.tenants.get(new.name)
        if old is not None and old.method == new.method.name and old.users == 0:
            index = old.index  # nobody reads it, so a full stack may replace too
        else:
            index = self._free_entry(new.method.name)
        for stack, array in new.entries.items():
            self._arrays[stack][index] = array
        self._show(new.entries)  # after all entries are written, so that no step reads half of them
        if new.name in self.tenants:
            self.remove(new.name)
        card, method = new.card, new.method
        tenant = Tenant(
            new.name,
            method.name,
            index,
            method.prompt_length,
            card.prompt_format,
            card.trained_form,
            card.system_prompt,
        )
        self.tenants[new.name] = self._entries[method.name][index] = tenant
        return tenant

    def remove(self, name: str) -> None:
        """Take a tenant out; its entry is free once its requests under way are finished.

        Raises:
            BundleError: no such tenant.
            IaptError: it is merged into the backbone.
        """
        tenant = self.get(name)
        if tenant is self.base:
            raise IaptError(f"{tenant.name} is the backbone and cannot be removed")
        if tenant.method is None:
            raise IaptError(f"tenant {name} is merged into the backbone's weights and cannot be removed")
        tenant.removed = True
        del self.tenants[name]
        self._collect(tenant)

    def acquire(self, name: str) -> Tenant:
        """The tenant, kept until `release`.

        Raises:
            BundleError: no such tenant.
        """
        tenant = self.get(name)
        tenant.users += 1
        return tenant

    def release(self, tenant: Tenant) -> None:
        """A request of this tenant is finished."""
        tenant.users -= 1
        self._collect(tenant)

    def indices(self, tenants: list[Tenant]) -> Arrays:
        """``METHOD.tenant_index [B]`` for rows of these tenants: -1 where a row's tenant is of another method."""
        return {
            f"{method}.{TENANT_INDEX}": np.array(
                [tenant.index if tenant.method == method else -1 for tenant in tenants], dtype=np.int64
            )
            for method in self.methods
        }

    def _enter(self, spec: TenantSpec, index: int) -> Tenant:
        length = self.manifest.prompt_length(spec.name)
        tenant = Tenant(
            spec.name, spec.method, index, length, spec.prompt_format, spec.trained_form, spec.system_prompt
        )
        self.tenants[spec.name] = tenant
        return tenant

    def _method_of(self, card: TenantCard, path: Path) -> MethodSpec:
        for method in self.manifest.methods:
            if card.fits(method.form, method.config):
                return method
        offered = "; ".join(f"{method.form} {json.dumps(method.config)}" for method in self.manifest.methods)
        raise IaptError(
            f"{path}: this bundle has no method {card.form} with {json.dumps(card.config)}, so its graphs cannot run "
            f"it; it has {offered or 'none'}. Build a bundle with an adapter of that kind"
        )

    def _free_entry(self, method: str) -> int:
        entries, limit = self._entries[method], self.manifest.ranges.tenants.max
        for index, tenant in enumerate(entries):
            if tenant is None:
                return index
        if len(entries) >= limit:
            leaving = sum(tenant is not None and tenant.removed for tenant in entries)
            remedy = f"wait for the requests of {leaving} removed ones" if leaving else "remove one"
            raise TenantsFullError(
                method,
                f"method {method} is full: this bundle takes {limit} tenants of it",
                code="tenants_full",
                remedy=f"{remedy}, or build with a larger --tenants",
            )
        grown = min(2 * len(entries), limit)
        larger = {}
        for weight in self.methods[method].weights:
            name = f"{method}.{weight.name}"
            larger[name] = np.zeros((grown, *self._arrays[name].shape[1:]), self._arrays[name].dtype)
            larger[name][: len(entries)] = self._arrays[name]
        self._arrays = {**self._arrays, **larger}
        self._show(larger)
        first = len(entries)
        entries += [None] * (grown - first)
        return first

    def _show(self, names: Iterable[str]) -> None:
        """Put new read-only views of these arrays into `stacks`, at once, so that no step sees stacks of two sizes."""
        views = {name: self._arrays[name].view() for name in names}
        for view in views.values():
            view.flags.writeable = False
        self.stacks = {**self.stacks, **views}

    def _collect(self, tenant: Tenant) -> None:
        if tenant.removed and tenant.users == 0 and tenant.method is not None:
            self._entries[tenant.method][tenant.index] = None

    def _cast(self, array: np.ndarray, name: str, what: str) -> np.ndarray:
        converted = cast(array, self.types[name])
        if not np.isfinite(converted.astype(np.float32)).all():
            raise BundleError(f"{what} has numbers too large for {self.types[name]}; build for fp32 or bf16")
        return converted


def _base(bundle: Path, manifest: BundleManifest) -> Tenant | None:
    if not manifest.serves_backbone:
        return None
    return Tenant(served_name(manifest.backbone.name_or_path), None, -1, 0, base_format(bundle), "none")


def read_tenant_file(path: Path) -> tuple[TenantCard, Arrays]:
    """A tenant's card and tensors.

    Raises:
        IaptError: no safetensors file, or one without a valid card.
    """
    metadata, tensors = _read_weights(path, "write it again")
    return TenantCard.from_metadata(metadata, str(path)), tensors


def _read_tenant(bundle: Path, manifest: BundleManifest, spec: TenantSpec, method: MethodSpec) -> Arrays:
    if spec.path is None:
        raise BundleError(f"tenant {spec.name} is of method {method.name} but names no weights file")
    metadata, tensors = _read_weights(bundle / spec.path, "build the bundle again")
    card = TenantCard.from_metadata(metadata, str(bundle / spec.path))
    if problems := card.contradictions(manifest, spec, method):
        raise BundleError(
            f"{bundle / spec.path} is not what the manifest says of tenant {spec.name}: its card's "
            f"{'; '.join(problems)}. Build the bundle again"
        )
    for weight in method.weights:
        _check_tensor(tensors.get(weight.name), weight.name, weight.shape, f"tenant {spec.name}")
    return tensors


def _read_weights(path: Path, remedy: str) -> tuple[dict[str, str], Arrays]:
    try:
        metadata, entries = read_header(path)
        with safe_open(path, framework="numpy") as file:
            return metadata, {name: file.get_tensor(name) for name in entries}
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from error
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{path} is not a whole safetensors file ({error}); {remedy}") from error


def _check_tensor(tensor: np.ndarray | None, name: str, shape: list[int | str], what: str) -> None:
    if tensor is None or list(tensor.shape) != shape:
        came = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
        raise BundleError(f"{what}: {name} has {came}, the bundle expects {shape}")
    if tensor.dtype.name not in FLOATS:
        raise BundleError(f"{what}: {name} is of type {tensor.dtype.name}, expected one of {', '.join(FLOATS)}")
    if not np.isfinite(tensor.astype(np.float32)).all():
        raise BundleError(f"{what}: {name} holds NaN or infinity; train the adapter again")


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in a manifest's type, such as ``fp16``."""
    with np.errstate(over="ignore"):  # callers look for infinities
        return array.astype(numpy_type(dtype))
