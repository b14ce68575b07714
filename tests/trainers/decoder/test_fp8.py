"""Checkpoints in FP8: the model is the one whose weights are values times scales, multiplied out by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GenerationConfig

from iapt_export.building.layout import backbone_spec
from tests.families import tiny_family
from tests.trainers.decoder.fp8_files import Fp8, save_fp8
from trainers.decoder.backbone import load_backbone
from trainers.decoder.stored import is_outline, load_mapped, outline_of, stored_weight, weights_sha256
from trainers.decoder.streamed import streamed

IDS = torch.arange(5, 25)[None]
E8M0 = torch.float8_e8m0fnu
EVEN = {
    "blocks": ("llama", Fp8()),
    "oblong": ("qwen3", Fp8((32, 8))),
    "one-scale": ("llama", Fp8(None, static=True)),
    "bf16-scales": ("qwen3", Fp8(scale_type=torch.bfloat16)),
    "powers-of-two": ("llama", Fp8(scale_type=E8M0)),
    "experts": ("qwen3_moe", Fp8()),
    "experts-of-mixtral": ("mixtral", Fp8()),
}
"""What stock transformers reads as well."""
CASES = EVEN | {"cut-off": ("llama", Fp8((40, 24))), "larger-than-all": ("qwen3", Fp8((128, 128)))}


def stock(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model as stock transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_weights_are_values_times_scales(case: str, tmp_path: Path) -> None:
    family, kind = CASES[case]
    folder, by_hand = save_fp8(tmp_path, tiny_family(family), kind)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        ours, right = load_backbone(str(folder), dtype=name).model, stock(by_hand, dtype)
        assert ours.state_dict().keys() == right.state_dict().keys()
        for key, tensor in right.state_dict().items():
            found = ours.state_dict()[key]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), key
        assert torch.equal(logits(ours), logits(right))
        assert not hasattr(ours.config, "quantization_config") and not hasattr(ours, "hf_quantizer")


@pytest.mark.parametrize("case", EVEN)
def test_stock_transformers_reads_the_same_model(case: str, tmp_path: Path) -> None:
    family, kind = EVEN[case]
    folder, _ = save_fp8(tmp_path, tiny_family(family), kind)
    theirs = stock(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    ours = load_backbone(str(folder)).model
    fed = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(ours.generate(IDS, **fed), theirs.generate(IDS, **fed))


def test_it_is_the_backbone_of_the_weights_in_one_type(tmp_path: Path) -> None:
    folder, by_hand = save_fp8(tmp_path, tiny_family("qwen3"))
    for place in (folder, by_hand):
        GenerationConfig(eos_token_id=[1, 7]).save_pretrained(place)
    ours, right = load_backbone(str(folder)), load_backbone(str(by_hand))
    assert ours.fingerprint == right.fingerprint
    assert weights_sha256(ours.model) == weights_sha256(right.model)
    assert ours.model.generation_config.to_dict() == right.model.generation_config.to_dict()
    spec = backbone_spec(ours)
    assert spec.eos_token_ids == [1, 7] and spec.name_or_path == ours.model.config._name_or_path == str(folder)


@pytest.mark.parametrize("case", ["blocks", "one-scale", "powers-of-two", "cut-off"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_weights_stay_in_their_files(case: str, dtype: str, tmp_path: Path) -> None:
    family, kind = CASES[case]
    folder, by_hand = save_fp8(tmp_path, tiny_family(family), kind)
    stored = load_mapped(str(folder))
    assert stored is not None
    made, right = outline_of(stored, dtype), load_backbone(str(by_hand), dtype=dtype)
    assert made is not None and is_outline(made.model)
    for name, tensor in right.model.state_dict().items():
        found = stored_weight(made.model, name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert backbone_spec(made).weights_sha256 == weights_sha256(right.model)
    assert torch.equal(logits(streamed(made.model)), logits(right.model))
    shutil.copy(by_hand / "config.json", folder / "config.json")
    assert load_mapped(str(folder)) is None, "several types, and nothing says how they are scaled"


def test_experts_are_put_together_while_loading(tmp_path: Path) -> None:
    folder, _ = save_fp8(tmp_path, tiny_family("qwen3_moe"))
    assert load_mapped(str(folder)) is None


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, by_hand = save_fp8(tmp_path, tiny_family("llama"))
    kept, commit = tmp_path / "hub" / "models--some--model", "0" * 40
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(tmp_path / "fp8", kept / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = load_backbone("some/model", revision="main")
    assert torch.equal(logits(found.model), logits(stock(by_hand)))
    assert found.tokenizer is not None
