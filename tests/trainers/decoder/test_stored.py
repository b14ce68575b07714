"""Weights that stay in their files: an outline says and gives what the loaded model has, and a bad file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from iapt_export.building.layout import backbone_spec
from iapt_export.contract.errors import IaptError
from tests.families import tiny_family
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder.backbone import load_backbone
from trainers.decoder.stored import is_outline, load_mapped, outline_of, stored_type, stored_weight, weights_sha256
from trainers.decoder.streamed import streamed


def saved(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    return save_tiny_backbone(folder, tiny_family(family).to(dtype))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "bloom", "gpt_oss", "phi3", "opt"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_outline_has_the_weights_of_the_loaded_model(tmp_path: Path, family: str, dtype: str) -> None:
    folder = saved(tmp_path, family)
    stored = load_mapped(str(folder))
    assert stored is not None and stored_type(str(folder)) == "bf16"
    made = outline_of(stored, dtype)
    loaded = load_backbone(str(folder), dtype=dtype)
    assert made is not None and is_outline(made.model) and not is_outline(loaded.model)
    state = loaded.model.state_dict()
    assert made.model.state_dict().keys() == state.keys()
    for name, tensor in state.items():
        read = stored_weight(made.model, name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
    buffers = dict(made.model.named_buffers())
    assert all(
        torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype
        for name, buffer in loaded.model.named_buffers()
    )
    if dtype == "fp32":
        assert backbone_spec(made) == backbone_spec(loaded)
        assert made.model.config.to_dict() == loaded.model.config.to_dict()


def test_computing_with_an_outline_is_an_error(tmp_path: Path) -> None:
    stored = load_mapped(str(saved(tmp_path, "llama")))
    assert stored is not None
    made = outline_of(stored, "fp32")
    assert made is not None
    weight = made.model.get_input_embeddings().weight
    with pytest.raises((TypeError, RuntimeError)):
        weight.numpy()
    logits = made.model(torch.tensor([[1, 2]])).logits
    with pytest.raises((TypeError, RuntimeError)):
        logits.numpy()
    tied = made.model.lm_head.weight
    assert (tied is weight) == made.model.config.tie_word_embeddings


def test_a_checkpoint_of_the_wanted_type_is_its_own_outline(tmp_path: Path) -> None:
    stored = load_mapped(str(save_tiny_backbone(tmp_path, tiny_llama())))
    assert stored is not None and outline_of(stored, "fp32") is stored
    assert weights_sha256(stored.model) == weights_sha256(tiny_llama())


def test_an_outline_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_mapped(str(saved(tmp_path, "llama")))
    assert stored is not None
    made = outline_of(stored, "fp32")
    assert made is not None
    right = weights_sha256(load_backbone(str(tmp_path)).model)
    assert weights_sha256(made.model) == right
    monkeypatch.setattr("trainers.decoder.stored.stored_weight", lambda *_: pytest.fail("it is read again"))
    assert weights_sha256(made.model) == weights_sha256(streamed(made.model)) == right
    with pytest.raises(pytest.fail.Exception, match="read again"):
        weights_sha256(load_backbone(str(tmp_path)).model)


def test_a_checkpoint_of_several_types_is_loaded_as_a_whole(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.model.norm.float()
    assert load_mapped(str(save_tiny_backbone(tmp_path, model))) is None


def sharded(folder: Path) -> Path:
    save_tiny_backbone(folder)
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_sharded_checkpoint_is_one_model(tmp_path: Path) -> None:
    stored = load_mapped(str(sharded(tmp_path)))
    assert stored is not None and weights_sha256(stored.model) == weights_sha256(tiny_llama())


def test_damaged_shards_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-5])
    second.unlink()
    with pytest.raises(IaptError) as refused:
        load_backbone(str(folder))
    assert f"{first.name} is {size - 5:,} bytes long, expected {size:,}" in str(refused.value)
    assert f"{second.name} is not there" in str(refused.value)
    first.write_bytes(b"{}")
    with pytest.raises(IaptError, match="is 2 bytes long, and its header does not fit into it"):
        load_backbone(str(folder))
    first.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(IaptError, match="has a header that safetensors does not know"):
        load_backbone(str(folder))


def test_an_index_must_fit_its_files(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    name, other = "model.norm.weight", content["weight_map"]["model.embed_tokens.weight"]
    place = content["weight_map"].pop(name)
    if place not in content["weight_map"].values():
        with pytest.raises(IaptError, match=f"these are missing and would be drawn at random: {name}"):
            load_backbone(str(folder))
    moved = next(file for file in content["weight_map"].values() if file not in (place, other))
    content["weight_map"][name] = moved
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(IaptError, match=f"{moved} has no {name}, which model.safetensors.index.json places there"):
        load_backbone(str(folder))
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(IaptError, match="has no weight_map of names to files"):
        load_backbone(str(folder))


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_one_file_counts_beside_an_older_index(tmp_path: Path, shards_are_there: bool) -> None:
    """Saved twice, in shards and then as one file, or the other way round: transformers reads the one file."""
    folder, model = sharded(tmp_path), tiny_llama(seed=1)
    tiny_llama().to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    model.save_pretrained(tmp_path / "one")
    model.config.save_pretrained(folder)
    (tmp_path / "one" / "model.safetensors").replace(folder / "model.safetensors")
    if not shards_are_there:
        for path in folder.glob("model-*"):
            path.unlink()
    ids = torch.arange(5, 20)[None]
    wanted = model(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits, wanted)
    assert torch.equal(load_backbone(str(folder)).model(ids).logits, wanted)
    assert stored_type(str(folder)) == "fp32", "the shards are in bf16"
    stored = load_mapped(str(folder))
    assert stored is not None and torch.equal(stored.model(ids).logits, wanted)


def test_weights_under_a_name_of_their_own_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path, tiny_llama())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["transformers_weights"] = "model.safetensors"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(IaptError, match=r"names its weights \(transformers_weights\), which is not followed here"):
        load_backbone(str(folder))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path, tiny_llama().to(torch.bfloat16))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:31].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IaptError, match=r"another shape than its configuration says: model.norm.weight \[31\].*\[32\]"):
        load_mapped(str(folder))
