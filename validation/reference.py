"""PyTorch's side of the comparison: eager, tenant by tenant, with nothing of the exporter in it.

It reads the tenants' weights from the bundle and the backbone from where the user says, and runs the
trained modules of `trainers`, never the export twins. `TorchRunner` puts the same computation behind
the runner contract, so that a session can generate with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from engines.runner import Arrays, Runner, check_feeds
from iapt_export.bundle import weights_sha256
from iapt_export.errors import BundleError, IaptError
from iapt_export.manifest import BundleManifest, GraphSpec
from trainers.adapter import METHODS
from trainers.config import config_from_dict
from trainers.generate import decode, prefill
from trainers.iapt import IAPTGenerator
from trainers.insertion import positions


class Reference:
    """The backbone and every tenant's generator, as the trainer made them."""

    def __init__(self, bundle: Path, manifest: BundleManifest, backbone: Any) -> None:
        """Load the tenants' generators.

        Args:
            bundle: the bundle's folder.
            manifest: its manifest.
            backbone: a `trainers.backbone.Backbone` in fp32.

        Raises:
            BundleError: the backbone is not the bundle's, or has other weights.
        """
        if backbone.fingerprint != manifest.backbone.fingerprint:
            raise BundleError(
                f"{backbone.name_or_path} has fingerprint {backbone.fingerprint}, the bundle was built from "
                f"{manifest.backbone.name_or_path} with {manifest.backbone.fingerprint}; give that one with --model"
            )
        if weights_sha256(backbone.model) != manifest.backbone.weights_sha256:
            raise BundleError(
                f"{backbone.name_or_path} has the architecture but not the weights of the bundle's backbone, "
                f"{manifest.backbone.name_or_path}; give the same revision with --model and --revision"
            )
        self.model = backbone.model
        self.manifest = manifest
        self.num_prompts = manifest.generator.prompt_length
        spec = manifest.backbone
        config = config_from_dict(METHODS[manifest.generator.method], manifest.generator.config, "manifest.json")
        self.generators: list[IAPTGenerator] = []
        for tenant in manifest.tenants:
            generator = IAPTGenerator(config, spec.hidden_size, spec.num_layers)
            generator.load_state_dict(load_file(bundle / tenant.path))
            self.generators.append(generator.eval())

    def prefill(self, tenant: int, ids: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache]:
        """Logits ``[B, V]`` and cache of rows of one tenant; see `trainers.generate.prefill`."""
        return prefill(self.model, self.generators[tenant], self.num_prompts, ids, mask)

    @torch.no_grad()
    def prompts_and_hidden(self, tenant: int, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Every layer's prompts ``[B, L, P, D]`` and what they were made from ``[B, L, T, D]``."""
        hidden_states, made = [], []

        def record(layer: int, hidden: Tensor, readable: Tensor) -> Tensor:
            hidden_states.append(hidden)
            made.append(self.generators[tenant](layer, hidden, readable))
            return made[-1]

        prefill(self.model, record, self.num_prompts, ids, mask)
        return torch.stack(made, dim=1), torch.stack(hidden_states, dim=1)


class TorchRunner(Runner):
    """Prefill or decode in eager PyTorch behind the runner contract; rows of different tenants run apart."""

    def __init__(self, name: str, spec: GraphSpec, reference: Reference) -> None:
        self.name = name
        self.spec = spec
        self.reference = reference
        self._active = False

    def activate(self) -> None:
        """Nothing to load: the reference holds the model."""
        self._active = True

    def infer(self, feeds: Arrays) -> Arrays:
        """See `engines.runner.Runner.infer`; the tenants' weights among the inputs are not used."""
        if not self._active:
            raise IaptError(f"{self.spec.path}: the runner is not active; use it in a with block or call activate()")
        check_feeds(self.spec, feeds)
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        logits, layers = self._prefill(tensors) if self.name == "prefill" else self._decode(tensors)
        outputs = {"logits": logits[:, None].numpy()}
        for index, (key, value) in enumerate(layers):
            outputs[f"present.{index}.key"], outputs[f"present.{index}.value"] = key.numpy(), value.numpy()
        return outputs

    def _prefill(self, feeds: dict[str, Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        index = feeds["tenant_index"]
        rows, order = [], []
        for tenant in index.unique().tolist():
            chosen = (index == tenant).nonzero()[:, 0]
            rows.append(self.reference.prefill(tenant, feeds["input_ids"][chosen], feeds["attention_mask"][chosen]))
            order.append(chosen)
        back = torch.cat(order).argsort()
        layers = [
            tuple(
                torch.cat([getattr(cache.layers[layer], part) for _, cache in rows])[back]
                for part in ("keys", "values")
            )
            for layer in range(len(rows[0][1].layers))
        ]
        return torch.cat([logits for logits, _ in rows])[back], layers  # type: ignore[return-value]

    def _decode(self, feeds: dict[str, Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        past = [tensor for name, tensor in feeds.items() if name.startswith("past_key_values.")]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        mask = feeds["attention_mask"]
        if not torch.equal(positions(mask)[:, -1:], feeds["position_ids"]):
            raise IaptError("position_ids do not count the mask's real tokens; expected the number of ones less one")
        logits = decode(self.reference.model, feeds["input_ids"][:, 0], mask, cache)
        return logits, [(layer.keys, layer.values) for layer in cache.layers]

    def deactivate(self) -> None:
        """Nothing to give back."""
        self._active = False


def numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values as an fp32 array."""
    return tensor.detach().float().numpy()
