"""Adapters that an existing bundle shall serve, compared in the place of its own tenants."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from iapt_export.building.layout import new_tenant, save_tenant
from iapt_export.building.plan import load_tenants
from iapt_export.building.tenant_file import write_tenant_file
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest, TenantSpec
from trainers.adapters.adapter import EXAMPLES_FILE, Adapter
from validation.sides.peft_side import PeftFolder, folders_of


@contextmanager
def newcomers(
    adapters: Sequence[str], bundle: Path, manifest: BundleManifest, backbone: Any
) -> Iterator[tuple[BundleManifest, Mapping[str, PeftFolder]]]:
    """A bundle's manifest with other tenants, whose files are those that ``iapt-export tenant`` writes.

    Args:
        adapters: as `build` takes them; at least one.
        bundle: its folder, in which nothing is written.
        manifest: its own.
        backbone: the `trainers.decoder.backbone.Backbone` that it was built from.

    Returns:
        The manifest, whose tenants' files stand in a temporary folder while the context is open, and what PEFT reads.

    Raises:
        IaptError: a bad adapter, one for another backbone, one that the bundle's graphs cannot run, or more of them
            than it has places.
    """
    if len(adapters) > (places := manifest.ranges.tenants.max):
        raise IaptError(f"{len(adapters)} adapters are more than the bundle's {places} places; compare fewer at a time")
    with tempfile.TemporaryDirectory(prefix="iapt-tenants-") as folder:
        loaded = load_tenants(adapters, backbone)
        specs = [
            _placed(argument, name, adapter, bundle, manifest, backbone, Path(folder))
            for argument, (name, adapter) in zip(adapters, loaded.items(), strict=True)
        ]
        yield replace(manifest, tenants=specs), folders_of(loaded)


def _placed(
    argument: str, name: str, adapter: Adapter, bundle: Path, manifest: BundleManifest, backbone: Any, folder: Path
) -> TenantSpec:
    """A tenant whose files have absolute paths, which joined to the bundle's stay what they are."""
    path, trained = folder / f"{name}.safetensors", folder / f"{name}.trained.safetensors"
    card = write_tenant_file(argument, bundle, path, lambda: backbone)
    save_tenant(adapter.tensors, trained)
    examples = adapter.path / EXAMPLES_FILE if adapter.path else None
    return new_tenant(
        name,
        adapter,
        method=next(method.name for method in manifest.methods if card.fits(method.form, method.config)),
        path=str(path),
        trained=str(trained),
        examples=str(examples.resolve()) if examples and examples.is_file() else None,
    )
