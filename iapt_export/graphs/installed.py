"""The methods of a bundle: tenants of one method and one configuration share stacked weights.

Each installed method has a name that is unique in its bundle; its graph inputs begin with it. ``NAME.tenant_index
[B]`` says which entry of its stack a row uses; -1 where the row's tenant is of another method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import iapt_export.graphs.ops.rational_op  # noqa: F401  (registers torch.ops.iapt.rational)
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import SENT_PROMPTS, TENANT_INDEX, BundleManifest
from iapt_export.contract.settings import computing_fields, config_from_dict
from trainers.adapters.adapter import Adapter
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import Method, Part, Rows, Weights
from trainers.methods.forms import FORM_CONFIGS, FORMS, form_name


@dataclass(frozen=True)
class Installed:
    """A method as a bundle ships it."""

    name: str
    """Unique in the bundle: ``iapt``, ``prompt_tuning``, ``iapt_2``."""
    method: Method
    """What the graphs of prefill and decode do; only its configuration counts, the weights are inputs."""
    encoder: Method | None = None
    """Makes the prompts that ``method`` takes as sent, in a graph of its own."""

    @property
    def stacked(self) -> Method:
        """The method whose tensors the tenants' files hold."""
        return self.encoder or self.method

    def __post_init__(self) -> None:
        if self.method.rational_form:
            self.method.rational = torch.ops.iapt.rational  # one node in a trace; in eager mode the same function

    def part(self, inputs: Mapping[str, Tensor]) -> Part:
        """This method with each row's weights; other rows may be of other methods, or the backbone alone.

        Args:
            inputs: a graph's inputs by name; those called ``NAME.*`` count.
        """
        index = inputs.get(f"{self.name}.{TENANT_INDEX}")
        active = None if index is None else index >= 0
        if self.encoder:
            return Part(self.method, {SENT_PROMPTS: inputs[f"{self.name}.{SENT_PROMPTS}"]}, active)
        return Part(self.method, self.method.expanded(self.stacked_rows(inputs)), active)

    def stacked_rows(self, inputs: Mapping[str, Tensor]) -> Weights:
        """Each row's own weights ``[B, ...]``, picked from the stacks ``NAME.TENSOR [N, ...]``."""
        index = inputs[f"{self.name}.{TENANT_INDEX}"].clamp(min=0)  # other rows pick any, and drop it
        stacks = {name: inputs[f"{self.name}.{name}"] for name, _ in self.stacked.named_parameters()}
        return self.stacked.picked(stacks, index)


def rows_from_inputs(
    installed: list[Installed], inputs: Mapping[str, Tensor], *, only: list[Installed] | None = None
) -> Rows:
    """What a graph's inputs say is done to each row.

    Args:
        installed: the bundle's methods.
        inputs: ``NAME.*`` to tensor.
        only: the methods that take part in this graph; None means all.
    """
    chosen = installed if only is None else only
    return Rows(*(item.part(inputs) for item in chosen))


def in_decode(installed: list[Installed]) -> list[Installed]:
    """The methods that treat generated tokens too."""
    return [item for item in installed if item.method.in_decode]


def generators(installed: list[Installed]) -> list[Installed]:
    """The methods that generate prompts at every layer, which is what ``generator.onnx`` holds."""
    return [item for item in installed if item.method.generates]


def deploy(adapter: Adapter, backbone: Any, *, fold_embeddings: bool = False) -> Method:
    """The module that is shipped for an adapter; see `trainers.decoder.method.Method.deployed`.

    Args:
        adapter: the trained adapter.
        backbone: the backbone's transformers model.
        fold_embeddings: ship what changes embeddings alone as one embedding table for each tenant.
    """
    return as_deployed(adapter.module(), backbone, fold_embeddings=fold_embeddings)


def as_deployed(module: Method, backbone: Any, *, fold_embeddings: bool = False) -> Method:
    """`deploy` for a method that is at hand."""
    if fold_embeddings and module.folded_form:
        table = backbone.get_input_embeddings()
        # through the module and not its weight, because some backbones scale what it returns
        return module.folded(table(torch.arange(table.num_embeddings)).detach()).eval()
    return module.deployed().eval()


def install(tenants: dict[str, Adapter], deployed: dict[str, Method]) -> tuple[list[Installed], dict[str, str]]:
    """Group the tenants by what is shipped for them.

    Args:
        tenants: name to adapter.
        deployed: name to what `deploy` made of it.

    Returns:
        The bundle's methods, and for each tenant the name of its own.

    Raises:
        IaptError: methods that one set of graphs cannot serve together, with the reason.
    """
    by_key: dict[tuple[Any, ...], Installed] = {}
    owner: dict[str, str] = {}
    for tenant, adapter in tenants.items():
        method = deployed[tenant]
        encoder = adapter.module() if FORMS[adapter.config.peft_type].is_encoder else None
        stacked = encoder or method
        key = (type(stacked), computing_fields(stacked.config))
        if key not in by_key:
            base = form_name(stacked).lower()
            taken = sum(item.name.startswith(base) for item in by_key.values())
            by_key[key] = Installed(f"{base}_{taken + 1}" if taken else base, method, encoder)
        owner[tenant] = by_key[key].name
    methods = list(by_key.values())
    if problems := [*_rational_problems(methods), *_encoder_problems(methods)]:
        raise IaptError("; ".join(problems) + "; build one bundle for each")
    return methods, owner


def installed_from_manifest(manifest: BundleManifest, backbone: Any) -> list[Installed]:
    """A bundle's methods, as its manifest describes them.

    Args:
        manifest: the bundle's.
        backbone: its transformers model.
    """
    sizes = sizes_of(backbone)
    methods = []
    for spec in manifest.methods:
        config = config_from_dict(FORM_CONFIGS[spec.form], spec.config, "manifest.json")
        stacked = FORMS[spec.form](config, sizes).eval()
        if stacked.is_encoder:
            methods.append(Installed(spec.name, stacked.deployed(), stacked))
        else:
            methods.append(Installed(spec.name, stacked))
    return methods


def rational_forms(installed: list[Installed]) -> set[tuple[int, int, str]]:
    """(numerator coefficients, denominator coefficients, form) of every rational activation among the methods."""
    return {item.method.rational_form for item in installed if item.method.rational_form}


def _rational_problems(installed: list[Installed]) -> list[str]:
    forms = sorted(rational_forms(installed))
    if len(forms) < 2:
        return []
    shown = " and ".join(f"degrees ({top - 1}, {bottom}) form {form}" for top, bottom, form in forms)
    return [f"the rational activations differ ({shown}), and a graph holds one body of the operator"]


def _encoder_problems(installed: list[Installed]) -> list[str]:
    encoders = [item for item in installed if item.encoder]
    if len(encoders) < 2:
        return []
    return ["LoPA adapters of different configurations need an encoder graph each, and a bundle has one"]
