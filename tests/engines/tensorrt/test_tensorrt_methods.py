"""Engines of a bundle with several methods: TensorRT for RTX takes the graphs, each method with its own sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.tensorrt.builder import engine_from_onnx
from engines.tensorrt.engine_info import ProfileShape, check_engine, profile_from_spec
from iapt_export.building.plan import TenantPlan, plan_tenants
from iapt_export.contract.manifest import Range, Ranges
from iapt_export.graphs.export import Serving, export_graphs
from tests.bundles import METHOD, tiny_adapter
from tests.graphs import specs_for
from tests.tiny import tiny_llama
from trainers.methods.configs import LoPAConfig, LoRAConfig, PrefixTuningConfig, PromptTuningConfig

RANGES = Ranges(batch=Range(1, 2, 4), sequence=Range(1, 8, 16), past=Range(5, 16, 32), tenants=Range(1, 2, 8))
CONFIGS = [
    METHOD,
    PromptTuningConfig(prompt_length=4),
    PrefixTuningConfig(prompt_length=7),
    LoPAConfig(prompt_length=6, rank=2),
    LoRAConfig(rank=2, target_modules=("v_proj",)),
]
STACKS = {
    "encoder": {"lopa"},
    "serve_prefill": {"iapt", "prompt_tuning", "prefix_tuning", "lora"},
    "serve_decode": {"lora"},
}
"""Graph to the methods whose weights it takes; LoPA's prompts come to serve_prefill as they were sent."""


def planned(model: Any) -> TenantPlan:
    tenants = {f"t{seed}": tiny_adapter(seed, config, num_layers=1) for seed, config in enumerate(CONFIGS)}
    return plan_tenants(tenants, model)


@pytest.mark.parametrize("name", ["serve_prefill", "serve_decode", pytest.param("encoder", marks=pytest.mark.slow)])
def test_engines_of_a_mixed_bundle(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model = tiny_llama(num_hidden_layers=1)
    plan = planned(model)
    model.half()
    capacity = RANGES.past.max
    specs = specs_for(model, plan.installed, "fp16", capacity)
    serving = Serving(capacity=capacity)
    export_graphs(model, plan.installed, tmp_path, dtype="fp16", opset=23, names=(name,), serving=serving)
    engine = tmp_path / f"{name}.engine"
    info = engine_from_onnx(tmp_path / f"{name}.onnx", engine, specs[name], RANGES)
    assert check_engine(specs[name], info, RANGES, engine) == []
    (profile,) = info.profiles
    stacks = {tensor.name: tensor for tensor in specs[name].inputs if str(tensor.shape[0]).startswith("tenants_")}
    assert {stack.partition(".")[0] for stack in stacks} == STACKS[name]
    for stack, tensor in stacks.items():
        own = [int(size) for size in tensor.shape[1:]]
        assert profile[stack] == ProfileShape([1, *own], [2, *own], [8, *own])


def test_each_methods_tenants_have_the_range_of_tenants() -> None:
    model = tiny_llama(num_hidden_layers=1)
    profile = profile_from_spec(specs_for(model, planned(model).installed)["prefill"], RANGES)
    assert profile["iapt.query"] == ProfileShape([1, 1, 8, 4], [2, 1, 8, 4], [8, 1, 8, 4])
    assert profile["prompt_tuning.prompt"] == ProfileShape([1, 4, 32], [2, 4, 32], [8, 4, 32])
    assert profile["lopa.prompts"] == ProfileShape([1, 6, 32], [2, 6, 32], [4, 6, 32])
    assert profile["lora.tenant_index"] == ProfileShape([1], [2], [4])
