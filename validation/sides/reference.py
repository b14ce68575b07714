"""PyTorch's side of the comparison: eager, tenant by tenant, with nothing of the exporter in it.

`Reference` reads the weights that were trained from the bundle and the backbone from where the user says, and runs
the trained modules of `trainers`: no twin, nothing folded, no mixed rows. `TorchRunner` runs what was installed,
eagerly, behind the runner contract, so that a session can generate with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from engines.runner import NOWHERE, Array, Arrays, Runner, check_feeds, numpy_type
from iapt_export.building.layout import check_weights
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.graphs import ENCODER, KINDS, PAST, PRESENT
from iapt_export.contract.manifest import BundleManifest, GraphSpec
from iapt_export.contract.settings import config_from_dict
from iapt_export.graphs.installed import in_decode, installed_from_manifest, rows_from_inputs
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.generate import decode, prefill
from trainers.decoder.insertion import positions, sizes_of
from trainers.decoder.method import Method, Weights, rows_of
from trainers.decoder.streamed import abreast
from trainers.methods.configs import ADAPTER_CONFIGS
from trainers.methods.forms import new_method

Result = TypeVar("Result")
BACKBONE = "the backbone"
"""What reports call the rows that name no tenant."""


class NoMethod(Method):
    """What a request that names no tenant gets: the backbone as it is."""

    @staticmethod
    def shapes(config: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """See `Method.shapes`."""
        return {}

    @property
    def num_slots(self) -> int:
        """See `Method.num_slots`."""
        return 0


class Reference:
    """The backbone and every tenant's method, as the trainer made them."""

    def __init__(self, bundle: Path, manifest: BundleManifest, backbone: Any) -> None:
        """Load the tenants' methods.

        Args:
            bundle: the bundle's folder.
            manifest: its manifest.
            backbone: a `trainers.decoder.backbone.Backbone` in fp32; its model may be one of
                `trainers.decoder.streamed`.

        Raises:
            BundleError: the backbone is not the bundle's, or has other weights.
        """
        if backbone.fingerprint != manifest.backbone.fingerprint:
            raise BundleError(
                f"{backbone.name_or_path} has fingerprint {backbone.fingerprint}, the bundle was built from "
                f"{manifest.backbone.name_or_path} with {manifest.backbone.fingerprint}; give that one with --model"
            )
        check_weights(backbone, manifest.backbone)
        self.model = backbone.model
        self.bundle = bundle
        self.manifest = manifest
        sizes = sizes_of(self.model)
        self.methods: dict[str, Method] = {}
        """Tenant to its module with the weights that were trained; the backbone alone under no name."""
        if manifest.serves_backbone:
            self.methods[""] = NoMethod(None, sizes)
        for tenant in manifest.tenants:
            config = config_from_dict(ADAPTER_CONFIGS[tenant.trained_form], tenant.trained_config, "manifest.json")
            method = new_method(config, sizes)
            method.load_state_dict(load_file(bundle / (tenant.trained or tenant.path or "")))
            self.methods[tenant.name] = method.eval()

    def together(self, calls: Sequence[Callable[[Reference], Result]]) -> list[Result]:
        """Results of computations that have nothing to do with each other, each given a reference to compute with.

        Over a streamed backbone all share one reading of its weights; see `trainers.decoder.streamed.abreast`.
        """

        def over(model: Any) -> Reference:
            other = copy.copy(self)
            other.model = model
            return other

        return abreast(self.model, [lambda model, call=call: call(over(model)) for call in calls])  # type: ignore[misc]

    def prefill(self, tenant: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache]:
        """Logits ``[B, V]`` and cache of rows of one tenant; see `trainers.decoder.generate.prefill`."""
        return prefill(self.model, rows_of(self.methods[tenant]), ids, mask)

    def decode(self, tenant: str, token: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits ``[B, V]`` of one more step; see `trainers.decoder.generate.decode`."""
        return decode(self.model, rows_of(self.methods[tenant]), token, mask, cache)

    @torch.no_grad()
    def prompts_and_hidden(self, tenant: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Every layer's prompts ``[B, L, P, D]`` and what they were made from ``[B, L, T, D]``."""
        hidden, prompts = [], []
        method = copy.copy(self.methods[tenant])
        make = method.slots

        def record(weights: Weights, layer: int, slots: Tensor, tokens: Tensor, readable: Tensor) -> Tensor:
            hidden.append(tokens)
            prompts.append(make(weights, layer, slots, tokens, readable))
            return prompts[-1]

        method.slots = record  # type: ignore[method-assign, assignment]
        prefill(self.model, rows_of(method), ids, mask)
        return torch.stack(prompts, dim=1), torch.stack(hidden, dim=1)


class TorchRunner(Runner):
    """A graph's computation in eager PyTorch behind the runner contract."""

    def __init__(self, name: str, spec: GraphSpec, reference: Reference) -> None:
        self.name = name
        self.spec = spec
        self.model = reference.model
        self.installed = installed_from_manifest(reference.manifest, reference.model)
        self._active = False

    def activate(self) -> None:
        """Nothing to load: the reference holds the model."""
        self._active = True

    @torch.no_grad()
    def infer(self, feeds: Mapping[str, Array], into: Mapping[str, Array] = NOWHERE) -> dict[str, Any]:
        """See `engines.runner.Runner.infer`."""
        if not self._active:
            raise IaptError(f"{self.spec.path}: the runner is not active; use it in a with block or call activate()")
        check_feeds(self.spec, feeds)
        outputs = self._outputs({tensor.name: torch.tensor(feeds[tensor.name]) for tensor in self.spec.inputs})
        for name, array in into.items():
            array[...] = outputs[name]
        return {**outputs, **into}

    def zeros(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """See `engines.runner.Runner.zeros`."""
        return np.zeros(shape, numpy_type(dtype))

    def _outputs(self, feeds: dict[str, Tensor]) -> Arrays:
        if self.name == ENCODER:
            return {"prompts": self._encode(feeds).numpy()}
        logits, cache = self._prefill(feeds) if KINDS[self.name].reads else self._decode(feeds)
        outputs = {"logits": logits[:, None].numpy()}
        for index, layer in enumerate(cache.layers):
            outputs[f"{PRESENT}{index}.key"] = layer.keys.numpy()
            outputs[f"{PRESENT}{index}.value"] = layer.values.numpy()
        return outputs

    def _encode(self, feeds: dict[str, Tensor]) -> Tensor:
        (item,) = (item for item in self.installed if item.encoder)
        assert item.encoder is not None
        weights = item.stacked_rows(feeds)
        return item.encoder.prepare(weights, self.model, feeds["input_ids"], feeds["attention_mask"])["prompts"]

    def _prefill(self, feeds: dict[str, Tensor]) -> tuple[Tensor, DynamicCache]:
        rows = rows_from_inputs(self.installed, feeds)
        return prefill(self.model, rows, feeds["input_ids"], feeds["attention_mask"])

    def _decode(self, feeds: dict[str, Tensor]) -> tuple[Tensor, DynamicCache]:
        past = [tensor for name, tensor in feeds.items() if name.startswith(PAST)]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        mask = feeds["attention_mask"]
        if not torch.equal(positions(mask)[:, -1:], feeds["position_ids"]):
            raise IaptError("position_ids do not count the mask's real tokens; expected the number of ones less one")
        rows = rows_from_inputs(self.installed, feeds, only=in_decode(self.installed))
        return decode(self.model, rows, feeds["input_ids"][:, 0], mask, cache), cache

    def deactivate(self) -> None:
        """Nothing to give back."""
        self._active = False


def numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values as an fp32 array."""
    return tensor.detach().float().numpy()
