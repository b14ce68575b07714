"""What `plan` says of memory, against the bytes of a real bundle and against sums done by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from engines.serving.session import Session
from iapt_export.building.footprint import Load, Share, model_weights, plan_memory
from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import DEQUANTISED, Rounding
from tests.bundles import TinyBuild, run
from tests.families import tiny_family
from tests.tiny import tiny_gpt2, tiny_llama
from trainers.decoder.insertion import sizes_of
from trainers.decoder.quantise import quantise
from trainers.decoder.rounded import rounded_weights
from trainers.decoder.scaled import scaled
from trainers.methods.configs import METHOD_CONFIGS, flag_name
from trainers.methods.forms import new_method

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""What the published config.json of SmolLM2-135M says."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "config.json").write_text(json.dumps(SMOLLM2), encoding="utf-8")
    return str(folder)


def by_name(shares: list[Share]) -> dict[str, int]:
    return {share.name: share.bytes for share in shares}


def test_smollm2_by_hand(smollm2: str) -> None:
    """A layer has q and o of 576², k and v of 576 · 192, an MLP of 3 · 576 · 1536, two norms of 576."""
    parameters = 49152 * 576 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) + 576
    assert parameters == 134_515_008
    expected = {
        "weights": 4 * parameters,
        "KV cache": 2 * 1024 * (2 * 30 * 3 * 64 * 4),
        "tenants of iapt": 50 * 4 * 326_764,
        "logits": 2 * 49152 * 4,
    }
    assert by_name(plan_memory(smollm2, Load(batch=2, past=1024, tenants=50))) == expected
    half = by_name(plan_memory(smollm2, Load(batch=2, past=1024, tenants=50, target="tensorrt-rtx")))
    # two engines, each with weights of its own
    assert half == {"weights": 2 * 2 * parameters, "logits": expected["logits"]} | {
        name: expected[name] // 2 for name in ("KV cache", "tenants of iapt")
    }


def test_a_cache_in_8_bits_takes_a_quarter(smollm2: str) -> None:
    load = Load(batch=2, past=1024, target="onnxruntime:int4")
    whole, rounded = (by_name(plan_memory(smollm2, dataclasses.replace(load, quantise=q))) for q in ("", "cache=8"))
    assert rounded == whole | {"KV cache": 2 * 1024 * (2 * 30 * 3 * 64)}


def test_smollm2_in_blocks_by_hand(smollm2: str) -> None:
    """32 values share a scale of 4 bytes: 36 bytes in 8 bits and 20 in 4, which embedding and down_proj never take."""
    norms = 4 * (30 * 2 * 576 + 576)
    ends, down = 49152 * 576 // 32 * 36, 30 * 1536 * 576 // 32 * 36
    others = 30 * (2 * 576**2 + 2 * 576 * 192 + 2 * 576 * 1536) // 32
    for target, block in (("onnxruntime:int8", 36), ("onnxruntime:int4", 20)):
        found = by_name(plan_memory(smollm2, Load(target=target)))
        # o_proj and q_proj are square, k_proj and v_proj have more inputs than outputs
        narrow = 30 * 2 * 576 * 192 // 32
        assert found["weights"] == norms + ends + down + narrow * 36 + (others - narrow) * block


def test_blocks_are_those_that_the_quantiser_makes() -> None:
    weight = np.random.default_rng(0).normal(size=(80, 96)).astype(np.float32)  # a block at the end is not full
    module = torch.nn.Module()
    module.inner = torch.nn.Linear(80, 96, bias=False, device="meta")
    module.get_input_embeddings = module.get_output_embeddings = lambda: None  # type: ignore[assignment]
    for bits, block in ((8, 32), (4, 32), (8, 64), (4, 64)):
        made, rounding = quantise(weight, bits, block), Rounding(bits, block=block)
        assert model_weights(module, rounding, 4) == (80 * 96, made.values.nbytes + made.scales.nbytes)


@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_floats_take_what_their_values_and_scales_take(dtype: str) -> None:
    model, rounding = tiny_llama(hidden_size=64, intermediate_size=96), DEQUANTISED[dtype]
    expected = {id(item): 2 * item.numel() for item in model.parameters()}
    for name, bits in rounded_weights(model, rounding).items():
        weight = model.get_parameter(name)
        made = scaled(weight.detach().numpy(), bits, rounding)
        expected[id(weight)] = made.values.size * bits // 8 + made.scales.nbytes
    assert model_weights(model, rounding, 2)[1] == sum(expected.values())


def test_a_table_of_positions_takes_8_bits_too() -> None:
    model = tiny_gpt2(n_layer=1)
    bits = rounded_weights(model, Rounding(4, "integers"))
    assert bits["transformer.wpe.weight"] == 8
    expected = sum(
        item.numel() // 32 * (4 * bits[name] + 2) if name in bits else 2 * item.numel()
        for name, item in model.named_parameters()
    )
    assert model_weights(model, Rounding(4, "integers"), 2)[1] == expected


def test_a_cache_that_grows_is_there_twice(tmp_path: Path) -> None:
    """As a step of portable graphs returns a longer one."""
    sizes = {}
    for name in ("falcon-7b-like", "llama"):
        model = tiny_family(name)
        model.config.save_pretrained(tmp_path / name)
        shape = sizes_of(model)
        entry = 2 * shape.num_layers * shape.num_kv_heads * shape.cache_widths[0] * 4
        sizes[name] = by_name(plan_memory(str(tmp_path / name), Load(batch=1, past=100)))["KV cache"] / (100 * entry)
    assert sizes == {"falcon-7b-like": 2, "llama": 1}


def initializers(graph: Any) -> list[Any]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.initializer, *(tensor for part in inner for tensor in initializers(part))]


def test_a_bundle_takes_what_a_session_holds(tiny_build: TinyBuild) -> None:
    found = by_name(plan_memory(str(tiny_build.bundle), Load()))
    path = tiny_build.bundle / "serve.onnx"
    sizes: dict[Any, int] = {}
    for tensor in initializers(onnx.load(path, load_external_data=False).graph):
        place = {entry.key: entry.value for entry in tensor.external_data}
        size = int(place["length"]) if place else onnx.numpy_helper.to_array(tensor).nbytes
        sizes[place.get("offset", tensor.name)] = size
    assert found["weights"] == sum(sizes.values())
    with Session.open(tiny_build.bundle) as session:
        stepper: Any = session.stepper
        assert found["KV cache"] == sum(buffer.nbytes for buffer in stepper.buffers.values())
        assert found["tenants of iapt"] == sum(stack.nbytes for stack in stepper.bank.stacks.values())
        vocabulary = session.manifest.backbone.vocab_size
    assert found["logits"] == 8 * vocabulary * 4
    one = by_name(plan_memory(str(tiny_build.bundle), Load(batch=1, past=80, tenants=4)))
    assert one["KV cache"] == found["KV cache"] // 16
    assert one["tenants of iapt"] == found["tenants of iapt"] // 3 * 4


def test_what_cannot_be_built_is_refused(tiny_build: TinyBuild) -> None:
    """The tiny backbone has 256 positions, and IAPT takes 4 of a row's entries."""
    cache = next(share for share in plan_memory(str(tiny_build.model), Load()) if share.name == "KV cache")
    assert "255 entries" in cache.formula
    for past in (2, 4, 256):
        with pytest.raises(IaptError, match=f"--past {past} cannot be built: expected 5 to 255"):
            plan_memory(str(tiny_build.model), Load(past=past))


def test_what_a_bundle_cannot_serve_is_refused(tiny_build: TinyBuild) -> None:
    for load, message in (
        (Load(batch=9), "--batch 9 is more than the bundle's 8; build it again with --batch 9"),
        (Load(tenants=5), "--tenants 5 is more than the bundle's 4"),
        (Load(target="tensorrt"), "target 'tensorrt' is not in this bundle"),
        (Load(quantise="block=64"), "--quantise is for a model, and "),
        (Load(method="lora"), "--method is for a model, and "),
        (Load(target="onnxruntime:int8"), "was built for onnxruntime:fp32, not for onnxruntime:int8"),
    ):
        with pytest.raises(IaptError, match=message):
            plan_memory(str(tiny_build.bundle), load)


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_tenants_of_a_model_take_what_is_shipped_for_them(tmp_path: Path, name: str) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    trained = new_method(METHOD_CONFIGS[name](), sizes_of(model))
    shipped = trained if trained.is_encoder else trained.deployed()
    found = by_name(plan_memory(str(tmp_path), Load(method=flag_name(name), tenants=3)))
    assert found[f"tenants of {flag_name(name)}"] == 3 * sum(item.numel() * 4 for item in shipped.parameters())


def test_the_command(smollm2: str, tiny_build: TinyBuild) -> None:
    shown = run("plan", smollm2, "--batch=1", "--tenants=50")
    assert shown.code == 0, shown.err
    for text in ("650.8 MB", "134,515,008 parameters · 4", "1 row · 1,024 entries", "46,080", "50 · 1,307,056"):
        assert text in " ".join(shown.out.split()), shown.out
    found = json.loads(run("plan", tiny_build.bundle, "--json").out)
    assert [share["name"] for share in found] == ["weights", "KV cache", "tenants of iapt", "logits"]
    missing = run("plan", "none/such/folder")
    assert missing.code == 1 and "none/such/folder" in missing.err
