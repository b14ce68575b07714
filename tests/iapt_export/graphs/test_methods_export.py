"""Every method as ONNX graphs: ONNX Runtime makes of them what the trained module does in PyTorch, row by row.

One layer each, for tracing is slow; bundles of two layers are in tests/iapt_export/building, with most of the methods.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from iapt_export.building.plan import TenantPlan, plan_tenants
from iapt_export.graphs.export import export_graphs
from tests.bundles import METHOD, tiny_adapter
from tests.graphs import Arrays, flat, run_onnx, specs_for, worst
from tests.thorough import default_for
from tests.tiny import padded, tiny_llama
from trainers.decoder.generate import decode, prefill
from trainers.decoder.method import rows_of
from trainers.methods.configs import (
    ADePTConfig,
    DePTConfig,
    LAMPConfig,
    LoPAConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)

ADEPT = ADePTConfig(prompt_length=5, bottleneck=4)
ADEPT_ON = dataclasses.replace(ADEPT, decode_offset=True)
LORA = LoRAConfig(rank=2, target_modules=("q_proj", "down_proj"))
PREFIX = PrefixTuningConfig(prompt_length=7)
CONFIGS: dict[str, Any] = {
    "IAPT": METHOD,
    "prompt tuning": PromptTuningConfig(prompt_length=4),
    "LAMP": LAMPConfig(init_length=20, rank=3, window=5),
    "prefix tuning": PREFIX,
    "prefix tuning with projection": dataclasses.replace(PREFIX, projection=True, projection_width=8),
    "DePT": DePTConfig(prompt_length=3, rank=2, max_length=4),
    "LoPA": LoPAConfig(prompt_length=6, rank=2),
    "ADePT": ADEPT,
    "ADePT with decode offset": ADEPT_ON,
    "folded ADePT": ADEPT,
    "folded ADePT with decode offset": ADEPT_ON,
    "LoRA": LORA,
    "merged LoRA": LORA,
}
IN_DECODE = {"ADePT with decode offset", "folded ADePT with decode offset", "LoRA"}
SLOW = {"ADePT", "folded ADePT with decode offset", "merged LoRA"}
"""Their parts are exported by other cases too; test_rounding.py builds and compares a merged adapter."""
DEFAULT = ("IAPT", "LoRA")
CASES = default_for(
    DEFAULT.__contains__, (pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CONFIGS)
)
LENGTHS = [7, 3, 5]
INDEX = [1, 0, 1]
STEPS = 3
LIMIT = 5e-5
"""fp32 rounding through two tiny layers, with weights that are far larger than trained ones."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A bundle's graphs of one method with two tenants, and how they came about."""

    plan: TenantPlan
    prefill: Path
    decode: Path
    encoder: Path


class Exports:
    """Exports what is asked for once; methods that end as the same graphs share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_llama(num_hidden_layers=1)
        self.known: dict[str, Path] = {}

    @functools.cached_property
    def plain_decode(self) -> Path:
        """The step of the backbone alone."""
        folder = self.folder / "plain"
        folder.mkdir()
        export_graphs(self.model, [], folder, dtype="fp32", opset=23, names=("decode",))
        return folder / "decode.onnx"

    def __getitem__(self, case: str) -> Exported:
        count = 1 if "merged" in case else 2
        tenants = {str(seed): tiny_adapter(seed, CONFIGS[case], num_layers=1) for seed in range(count)}
        flags = {"merge_lora": "merged" in case, "fold_embeddings": "folded" in case}
        plan = plan_tenants(tenants, self.model, **flags)
        name = next((item.name for item in plan.installed), "merged") + " on" * (case in IN_DECODE)
        if name not in self.known:
            self.known[name] = self._export(plan, name)
        folder = self.known[name]
        own = folder / "decode.onnx"
        return Exported(
            plan, folder / "prefill.onnx", own if own.exists() else self.plain_decode, folder / "encoder.onnx"
        )

    def _export(self, plan: TenantPlan, name: str) -> Path:
        """Prefill, the encoder, and decode only where it is not the plain backbone's."""
        folder = self.folder / name
        folder.mkdir()
        specs = specs_for(self.model, plan.installed)
        dotted = [t.name for t in specs["decode"].inputs if "." in t.name and not t.name.startswith("past_key_values.")]
        names = tuple(name for name in ("prefill", "decode", "encoder") if name in specs)
        names = names if dotted or plan.merged else tuple(name for name in names if name != "decode")
        with plan.merged.merged(self.model) if plan.merged else nullcontext():
            export_graphs(self.model, plan.installed, folder, dtype="fp32", opset=23, names=names)
        return folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("methods"))


def taken(path: Path, feeds: Arrays) -> Arrays:
    """Those of the feeds that a graph takes; all that it takes must be there."""
    return {value.name: feeds[value.name] for value in onnx.load(path, load_external_data=False).graph.input}


def tenant_feeds(exported: Exported, index: list[int]) -> Arrays:
    """Everybody's shipped weights, stacked, and whose each row is."""
    feeds: Arrays = {}
    for item in exported.plan.installed:
        shipped = list(exported.plan.shipped.values())
        feeds |= {
            f"{item.name}.{name}": torch.stack([tensors[name] for tensors in shipped]).detach().numpy()
            for name in shipped[0]
        }
        feeds[f"{item.name}.tenant_index"] = np.array(index, np.int64)
    return feeds


def run_graphs(exported: Exported, tokens: list[list[int]], index: list[int]) -> list[Arrays]:
    """Prefill of the mixed rows, then a decode step for each column of ``tokens``: every run's outputs."""
    ids, mask = padded(LENGTHS, "left")
    tenants = tenant_feeds(exported, index)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **tenants}
    for item in exported.plan.installed:
        if item.encoder:
            feeds[f"{item.name}.prompts"] = run_onnx(exported.encoder, taken(exported.encoder, feeds))["prompts"]
    outputs = [run_onnx(exported.prefill, taken(exported.prefill, feeds))]
    total = np.concatenate([np.ones((3, exported.plan.num_slots), np.int64), mask.numpy()], axis=1)
    for step in zip(*tokens, strict=True):
        total = np.concatenate([total, np.ones((3, 1), np.int64)], axis=1)
        feeds = {
            "input_ids": np.array(step, np.int64)[:, None],
            "attention_mask": total,
            "position_ids": total.sum(axis=1, keepdims=True) - 1,
            **{
                name.replace("present", "past_key_values"): array
                for name, array in outputs[-1].items()
                if name != "logits"
            },
            **tenants,
        }
        outputs.append(run_onnx(exported.decode, taken(exported.decode, feeds)))
    return outputs


def trained_steps(model: Any, plan: TenantPlan, row: int, tenant: int) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """One row alone, without padding, through its trained module: tokens, logits of each step, the cache's tensors."""
    rows = rows_of(list(plan.adapters.values())[tenant].module())
    ids, mask = padded(LENGTHS, "left")
    own = ids[row : row + 1, mask[row].bool()]
    logits, cache = prefill(model, rows, own, torch.ones_like(own))
    tokens, found = [], [logits[0]]
    for _ in range(STEPS):
        tokens.append(int(found[-1].argmax()))
        ones = torch.ones(1, rows.num_slots + own.shape[1] + len(tokens), dtype=torch.long)
        found.append(decode(model, rows, torch.tensor(tokens[-1:]), ones, cache)[0])
    return tokens, found, [tensor[0] for tensor in flat(cache)]


@pytest.mark.parametrize("case", CASES)
def test_mixed_rows_of_a_method_are_each_tenants_own(exports: Exports, case: str) -> None:
    exported = exports[case]
    index = [min(tenant, len(exported.plan.adapters) - 1) for tenant in INDEX]
    truths = [trained_steps(exports.model, exported.plan, row, tenant) for row, tenant in enumerate(index)]
    outputs = run_graphs(exported, [tokens for tokens, _, _ in truths], index)
    for row, (_, logits, cache) in enumerate(truths):
        for step, wanted in enumerate(logits):
            assert worst(outputs[step]["logits"][row, 0], wanted) < LIMIT, (row, step)
        names = [name for name in outputs[-1] if name != "logits"]
        padding = max(LENGTHS) - LENGTHS[row]
        for name, wanted in zip(names, cache, strict=True):
            slots = exported.plan.num_slots
            made = np.delete(outputs[-1][name][row], np.s_[slots : slots + padding], axis=1)
            assert worst(made, wanted) < LIMIT, (row, name)


@pytest.mark.parametrize("case", default_for(DEFAULT.__contains__, (case for case in CONFIGS if case not in SLOW)))
def test_the_tenants_tell(exports: Exports, case: str) -> None:
    """Rows that use a neighbour's weights differ by far more than any rounding, so the test above sees it."""
    exported = exports[case]
    right, wrong = (run_graphs(exported, [], index)[0]["logits"] for index in (INDEX, [0, 1, 0]))
    assert all(worst(right[row], wrong[row]) > 1e-2 for row in range(3))


@pytest.mark.parametrize("case", sorted(IN_DECODE - SLOW))
def test_the_tenants_tell_in_decode_steps_too(exports: Exports, case: str) -> None:
    exported = exports[case]
    tokens = [[5], [6], [7]]
    outputs = run_graphs(exported, tokens, INDEX)
    feeds = {
        "input_ids": np.array(tokens, np.int64),
        "attention_mask": np.ones((3, 8 + exported.plan.num_slots), np.int64),
        "position_ids": np.full((3, 1), 7 + exported.plan.num_slots),
        **{name.replace("present", "past_key_values"): a for name, a in outputs[0].items() if name != "logits"},
    }
    right, wrong = (
        run_onnx(exported.decode, taken(exported.decode, feeds | tenant_feeds(exported, index)))["logits"]
        for index in (INDEX, [0, 1, 0])
    )
    assert all(worst(right[row], wrong[row]) > 1e-2 for row in range(3))


def inputs_of_methods(path: Path) -> list[str]:
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    return [name for name in names if "." in name and not name.startswith("past_key_values.")]


@pytest.mark.parametrize("case", default_for("IAPT".__eq__, sorted(set(CONFIGS) - IN_DECODE - SLOW)))
def test_the_decode_step_of_prompts_is_the_plain_backbones(exports: Exports, case: str) -> None:
    """No index and no weight of a tenant enters it. All methods but those that treat generated tokens share it."""
    specs = specs_for(exports.model, exports[case].plan.installed)
    plain = specs_for(exports.model, [])
    assert specs["decode"] == plain["decode"]
    assert inputs_of_methods(exports[case].prefill)
    assert inputs_of_methods(exports.plain_decode) == []


def test_the_decode_step_of_lora_and_of_decode_offsets_takes_the_tenants(exports: Exports) -> None:
    linears = ("self_attn__q_proj", "mlp__down_proj")
    weights = [f"lora.{linear}__{side}" for linear in linears for side in "AB"]
    assert inputs_of_methods(exports["LoRA"].decode) == ["lora.tenant_index", *weights]
    offsets = ["prompt", "down_weight", "down_bias", "up_weight", "up_bias"]
    adept = exports["ADePT with decode offset"]
    found = inputs_of_methods(adept.decode)
    assert found == ["adept.tenant_index", *(f"adept.{name}" for name in offsets)]


@pytest.mark.slow
def test_a_merged_adapter_leaves_no_input(exports: Exports) -> None:
    exported = exports["merged LoRA"]
    assert inputs_of_methods(exported.prefill) == inputs_of_methods(exported.decode) == []
    weights = exports.model.state_dict()
    assert torch.equal(
        weights["model.layers.0.self_attn.q_proj.weight"],
        tiny_llama(num_hidden_layers=1).state_dict()["model.layers.0.self_attn.q_proj.weight"],
    ), "the backbone itself is as before"


def test_sent_prompts_are_all_that_prefill_takes_of_lopa(exports: Exports) -> None:
    exported = exports["LoPA"]
    assert inputs_of_methods(exported.prefill) == ["lopa.prompts"]
    assert inputs_of_methods(exported.encoder)[:2] == ["lopa.tenant_index", "lopa.prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CONFIGS if case not in IN_DECODE | {"merged LoRA"}])
def test_the_plain_step_has_the_same_bytes_whatever_the_prompts(exports: Exports, case: str, tmp_path: Path) -> None:
    export_graphs(
        exports.model, exports[case].plan.installed, tmp_path, dtype="fp32", opset=23, names=("prefill", "decode")
    )
    made, wanted = (onnx.load(path) for path in (tmp_path / "decode.onnx", exports.plain_decode))
    assert made.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)
