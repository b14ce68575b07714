"""What a build says before it works: stages, what is made already, disk and memory, and refusals with figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import iapt_export
from iapt_export import build
from iapt_export.building import build as building
from iapt_export.building import outlook
from iapt_export.building.build import foresee
from iapt_export.building.jobs import GraphJob
from iapt_export.building.outlook import graph_bytes
from iapt_export.building.plan import TargetPlan
from iapt_export.contract.errors import IaptError
from iapt_export.graphs.export import Serving
from tests.bundles import TinyBuild, run, save_tiny_adapter
from trainers.adapters.directory import load_adapter
from trainers.decoder import streamed
from trainers.decoder.backbone import load_backbone
from trainers.methods.configs import ADePTConfig

SMALL = {"free_disk": lambda _: 5000, "free_memory": lambda: 400 * 10**6}


def files_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_dry_run_tells_the_plan_and_writes_nothing(tiny_build: TinyBuild, tmp_path: Path) -> None:
    arguments = tiny_build.arguments(tmp_path / "bundle", cache=tmp_path / "cache")
    outcome = run(*arguments, "--target=onnxruntime:int4", "--dry-run")
    assert outcome.code == 0 and not files_of(tmp_path)
    assert outcome.out.startswith("importance: to do\n") and "graphs-int4-opset23: to do, about 0." in outcome.out
    assert f"disk for {tmp_path / 'cache'} and {tmp_path / 'bundle'}: about " in outcome.out
    assert "comparison with PyTorch: standard; PyTorch has the backbone in memory" in outcome.out
    told = json.loads(run(*arguments, "--dry-run", "--json").out)
    assert [stage["name"] for stage in told["stages"]] == ["graphs-fp32-opset23"] and not files_of(tmp_path)


def test_a_dry_run_knows_what_is_made(tiny_build: TinyBuild, tmp_path: Path) -> None:
    again = run(*tiny_build.arguments(tmp_path / "other"), "--dry-run").out
    assert "graphs-fp32-opset23: made already" in again
    assert run(*tiny_build.arguments(tiny_build.bundle), "--dry-run").out == (
        f"{tiny_build.bundle} is up to date: nothing to do\n"
    )
    other = building.foresee(tiny_build.request(tmp_path / "other", "alpha", past="1:8:140"))
    (stage,) = other.stages
    assert not stage.is_made and stage.bytes is not None and stage.seconds is not None, "as quickly as the one before"


def test_folded_tables_are_foreseen(tiny_build: TinyBuild, tmp_path: Path) -> None:
    fingerprint = load_backbone(str(tiny_build.model)).fingerprint
    adapters = {f"a{n}": save_tiny_adapter(tmp_path / f"a{n}", n, fingerprint, ADePTConfig()) for n in range(8)}
    made = TinyBuild(tiny_build.model, adapters, tmp_path / "cache", tmp_path / "bundle")
    request = made.request(made.bundle, tenants="1:8:8", fold_embeddings=True, prove=False)
    (disk,) = (need.needed for need in foresee(request).needs if need.what.startswith("disk"))
    build(request)
    kept = [path for folder in (made.bundle, made.cache) for path in folder.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in kept if path.suffix in (".safetensors", ".data"))
    assert disk == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("short", SMALL)
def test_too_little_is_refused_before_the_work(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    monkeypatch.setattr(outlook, short, SMALL[short])
    monkeypatch.setattr(building, "run_stage", lambda *_: pytest.fail("it began to work"))
    request = tiny_build.request(tmp_path / "bundle", cache=tmp_path / "cache")
    with pytest.raises(IaptError) as refused:
        iapt_export.build(request)
    said = {
        "free_disk": rf"disk for {tmp_path}/cache and {tmp_path}/bundle: about [0-9.]+ MB is needed, 0.0 MB is free; "
        "free some, or choose another place with --cache or --output",
        "free_memory": r"memory: about 0.5 GB is needed, 0.4 GB is free; stop other programs, take a smaller type",
    }[short]
    assert re.search(said, str(refused.value))
    assert not (tmp_path / "bundle").exists()
    told = building.foresee(request)
    assert [need.is_met for need in told.needs] == [short != "free_disk", short != "free_memory"]
    assert "— too little: " in told.text()


def test_places_on_two_file_systems_are_counted_apart(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlook, "file_system", lambda folder: folder.name == "cache")
    monkeypatch.setattr(streamed, "free_memory", lambda: 0)
    asked = tiny_build.request(tmp_path / "bundle", cache=tmp_path / "cache", targets=["onnxruntime:int8"])
    told = building.foresee(asked)
    cache, rest, memory = told.needs
    assert (cache.what, memory.what) == (f"disk for {tmp_path / 'cache'}", "memory")
    assert rest.what.startswith(f"disk for {tmp_path / 'bundle'} and /"), "rounded weights lie in the temporary folder"
    assert rest.needed > 2 * cache.needed and told.proof.endswith("reads the weights layer by layer")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_graphs_with_rounded_weights_take_what_is_restored_of_them(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    """Where no GPU runs the engines; a build that would not fit is refused before the work."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setattr(building, "find_driver", lambda: SimpleNamespace(problem="" if has_gpu else "none"))
    (*_, memory) = building.foresee(tiny_build.request(tmp_path / "out", targets=["tensorrt-rtx:int4"])).needs
    sizes = [item.numel() for item in AutoModelForCausalLM.from_pretrained(tiny_build.model).parameters()]
    expected = int(outlook.IN_HAND * 4 * max(sizes)) if has_gpu else 13 * sum(sizes)
    tenants = [tensor for path in tiny_build.adapters.values() for tensor in load_adapter(path).tensors.values()]
    assert memory.needed == outlook.RUNTIME_BYTES + expected + sum(tensor.nbytes for tensor in tenants)


def test_what_graphs_take_is_what_was_written_for_that_shape() -> None:
    """Four layers of Llama-2-7B's width: 891,572,480 bytes of weights were written in int4."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan: Any = SimpleNamespace(backbone=SimpleNamespace(num_layers=4))
    quantised = GraphJob("int4", TargetPlan("onnxruntime", "int4", 23), ("serve",), Serving())
    assert graph_bytes(quantised, plan, model) == pytest.approx(891_572_480, rel=1e-3)
    half = GraphJob("fp16", TargetPlan("onnxruntime", "fp16", 23), ("serve",), Serving())
    both = GraphJob("fp16", TargetPlan("onnxruntime", "fp16", 23), ("prefill", "decode", "serve"), Serving())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert graph_bytes(half, plan, model) == 2 * count
    assert graph_bytes(both, plan, model) == 2 * count + 2 * 4 * 3 * 4096**2, "q, k and v also side by side"
