"""The bundles that `benchmarks.serving` measures: the plain backbone, IAPT, and LoRA as the comparator.

Adapters have random weights, because what they compute does not change what it costs. The bundles hold no proof; for
anything but timing use ``iapt-export build``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iapt_export import BuildRequest, build
from trainers.adapters.adapter import Adapter, AdapterConfig
from trainers.adapters.directory import save_adapter
from trainers.decoder.backbone import Backbone
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import IAPTConfig, LoRAConfig
from trainers.methods.forms import new_method

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAST = 512


@dataclass(frozen=True)
class BundlePlan:
    """One bundle to measure."""

    method: Any = IAPTConfig()  # noqa: RUF009 (frozen)
    tenants: int = 8
    dtype: str = "fp32"
    quantise: str = ""
    """As ``build --quantise`` takes it."""
    merged: bool = False
    """Add the one adapter to the weights: the plain backbone's graph."""
    drafts: int = 0
    """Tokens of a draft that a step may verify."""
    longest: int = 256
    """Tokens of an instruction."""
    past: int = PAST
    """Cache entries of a row."""


PLAIN = LoRAConfig(rank=1, target_modules=("q_proj",))
BUNDLES = {
    "plain": BundlePlan(PLAIN, 1, merged=True),
    "plain-int8": BundlePlan(PLAIN, 1, "int8", merged=True),
    "plain-int4": BundlePlan(PLAIN, 1, "int4", merged=True),
    "plain-int4-64": BundlePlan(PLAIN, 1, "int4", "block=64", merged=True),
    "plain-int4-64-cache": BundlePlan(PLAIN, 1, "int4", "block=64,cache=8", merged=True),
    "plain-int4-all": BundlePlan(PLAIN, 1, "int4", "block=64,head=4,narrow=4", merged=True),
    "iapt-8": BundlePlan(),
    "iapt-8-int4": BundlePlan(dtype="int4", quantise="block=64"),
    "iapt-64": BundlePlan(tenants=64),
    "iapt-narrow": BundlePlan(IAPTConfig(bottleneck=64)),
    "lora-qv": BundlePlan(LoRAConfig(rank=8, target_modules=("q_proj", "v_proj"))),
    "lora-all": BundlePlan(LoRAConfig(rank=16, target_modules=SEVEN)),
    "cost-plain": BundlePlan(PLAIN, 1, merged=True, longest=512, past=640),
    "cost-iapt": BundlePlan(longest=512, past=640),
    "cost-lora-equal": BundlePlan(LoRAConfig(rank=6, target_modules=("q_proj", "v_proj")), longest=512, past=640),
    "cost-lora-all": BundlePlan(LoRAConfig(rank=16, target_modules=SEVEN), longest=512, past=640),
    "drafts-fp32": BundlePlan(tenants=0, drafts=3),
    "drafts-int4": BundlePlan(tenants=0, dtype="int4", drafts=3),
}
"""Those for drafts have no tenant: what they answer matters, and the backbone's own answers are real ones. Those for
`benchmarks.cost` take long instructions, whose cache the others' figures of memory would hold, too."""


def make_bundle(plan: BundlePlan, backbone: Backbone, output: Path) -> None:
    """Write one bundle to ``output``, which must not exist; adapters and stages are kept beside it."""
    adapters = []
    for number in range(plan.tenants):
        adapter = random_adapter(number, plan.method, backbone)
        adapters.append(output.with_name(f"{output.name}-adapters") / f"tenant{number}")
        save_adapter(adapters[-1], adapter.config, adapter.tensors)
    request = BuildRequest(
        model=backbone.name_or_path,
        adapters=adapters,
        output=output,
        targets=[f"onnxruntime:{plan.dtype}"],
        quantise=plan.quantise,
        sequence=f"1:128:{plan.longest}",
        past=f"1:256:{plan.past}",
        tenants=f"1:8:{max(64, plan.tenants)}",
        merge_lora=plan.merged,
        drafts=plan.drafts,
        prove=False,
        cache=output.with_name("stages"),
    )
    build(request, lambda text, *_: print(f"{output.name}: {text}", flush=True))


def random_adapter(seed: int, method: Any, backbone: Backbone) -> Adapter:
    """An adapter whose weights are drawn, zeros included: a product with zeros costs what any other costs."""
    sizes = sizes_of(backbone.model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = new_method(method, sizes)
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    config = AdapterConfig(
        base_model_name_or_path=backbone.name_or_path,
        backbone_fingerprint=backbone.fingerprint,
        method=method,
        **{name: getattr(sizes, name) for name in sizes.__dataclass_fields__},
    )
    return Adapter(config, dict(module.state_dict()))
