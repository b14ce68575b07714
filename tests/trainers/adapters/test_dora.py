"""DoRA, which PEFT trains: beside other LoRA tenants, merged, and where the backbone's weights stay in their files.

That it computes what PEFT computes stands in ``test_peft_format.py``, with the other kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from iapt_export.contract.errors import IaptError
from tests.tiny import padded, save_tiny_backbone, tiny_gpt2, tiny_llama, tiny_qwen2
from tests.trainers.adapters.test_peft_format import LORA, backbone_of, stock
from tests.trainers.methods_tiny import LENGTHS, stacked, trained
from trainers.adapters.adapter import Adapter
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_outline
from trainers.decoder.insertion import read_instruction, sizes_of
from trainers.decoder.method import rows_of
from trainers.decoder.stored import is_outline, load_mapped, outline_of
from trainers.methods.configs import DoRAConfig, LoRAConfig
from trainers.methods.lora import LoRA
from trainers.training.config import TrainRequest
from trainers.training.train import train

DORA = {**LORA, "use_dora": True}


def read(make: Any, folder: Path, **options: Any) -> tuple[Any, Adapter]:
    """A backbone, and a DoRA adapter of stock PEFT for it."""
    stock(make, "LoraConfig", DORA | options).save_pretrained(folder)
    model = make()
    return model, load_adapter(folder, backbone_of(model), peft_prompt_format="plain")


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny_qwen2, {"target_modules": "all-linear"}), (tiny_gpt2, {"fan_in_fan_out": True})],
    ids=["qwen2", "gpt2"],
)
def test_merged_equals_unmerged(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Biases, which a length does not scale, and weights that stand transposed among them."""
    model, adapter = read(make, tmp_path, **options)
    method: Any = adapter.module()
    ids, mask = padded(LENGTHS)
    expected = read_instruction(model, rows_of(method), ids, mask).logits[mask == 1]
    with method.merged(model):
        got = read_instruction(model, rows_of(None), ids, mask).logits[mask == 1]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    plain = read_instruction(model, rows_of(None), ids, mask).logits[mask == 1]
    assert (plain - expected).abs().max() > 0.1


def test_a_row_beside_other_lora_tenants_computes_what_it_computes_alone(tmp_path: Path) -> None:
    model, adapter = read(tiny_qwen2, tmp_path)
    others = [trained(LoRA, LoRAConfig(rank=rank, target_modules=("up_proj", "v_proj")), model) for rank in (2, 6)]
    methods: list[Any] = [adapter.module(), *others]
    sizes = sizes_of(model)
    config = LoRA.stack_config([method.config for method in methods], sizes)
    assert isinstance(config, DoRAConfig) and config.rank == 6
    ids, mask = padded([5, 7, 4])
    together = read_instruction(model, stacked([method.in_stack(config, sizes) for method in methods]), ids, mask)
    for row, method in enumerate(methods):
        alone = read_instruction(model, rows_of(method), ids[row : row + 1], mask[row : row + 1]).logits
        real = mask[row] == 1
        torch.testing.assert_close(together.logits[row][real], alone[0][real], atol=1e-4, rtol=1e-4)


def test_a_stack_without_gains_does_not_take_it(tmp_path: Path) -> None:
    model, adapter = read(tiny_llama, tmp_path)
    method: Any = adapter.module()
    assert method.in_stack(LoRAConfig(rank=8), sizes_of(model)) is method


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_weights_that_stay_in_their_files_give_the_same(dtype: str, tmp_path: Path) -> None:
    model, adapter = read(tiny_qwen2, tmp_path / "adapter")
    folder = str(save_tiny_backbone(tmp_path / "model", model.half() if dtype == "fp16" else model, chat=False))
    mapped = load_mapped(folder)
    assert mapped is not None
    outline = outline_of(mapped, "fp16" if dtype == "fp32" else "fp32")
    assert outline is not None and is_outline(outline.model)
    again = load_adapter(tmp_path / "adapter", outline, peft_prompt_format="plain")
    assert again.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, atol=2e-3, rtol=2e-3)
    assert max(tensor.abs().max() for name, tensor in again.tensors.items() if name.endswith("gain")) > 0.1
    # what only describes reads no weights
    described = load_adapter(tmp_path / "adapter", backbone_of(load_outline(folder)), peft_prompt_format="plain")
    assert {name: tensor.shape for name, tensor in described.tensors.items()} == {
        name: tensor.shape for name, tensor in adapter.tensors.items()
    }


def test_lengths_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    for options, trained_with in (({"use_dora": True}, {}), ({}, {"use_dora": True})):
        folder = tmp_path / str(len(options))
        stock(tiny_llama, "LoraConfig", LORA | trained_with).save_pretrained(folder)
        path = folder / "adapter_config.json"
        wrong = path.read_text("utf-8").replace('"use_dora": true', '"use_dora": false')
        path.write_text(wrong.replace('"use_dora": false', '"use_dora": true') if options else wrong, "utf-8")
        with pytest.raises(IaptError, match=r"the tensors do not fit .*lora_magnitude_vector"):
            load_adapter(folder, backbone_of(tiny_llama()), peft_prompt_format="plain")


def test_training_is_refused(tmp_path: Path) -> None:
    wanted = TrainRequest(model="none", data="none", output=tmp_path / "out", method=DoRAConfig())
    with pytest.raises(IaptError, match="DoRA is not trained here; train it with PEFT, whose adapters build takes"):
        train(wanted, say=lambda line: None)
    assert not (tmp_path / "out").exists()
