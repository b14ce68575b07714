"""Quantised checkpoints that are not read are refused from their configuration and headers, by every command alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from iapt_export.contract.errors import IaptError
from tests.bundles import run
from tests.tiny import save_tiny_backbone, tiny_llama
from tests.trainers.decoder.fp8_files import WEIGHTS, Fp8, save_fp8, set_quantisation
from trainers.decoder.backbone import load_backbone, load_outline

NAME = "model.layers.1.mlp.down_proj.weight"
SCALES = f"{NAME}_scale_inv"
NORM = "model.norm.weight"
UNREAD = "its weights in FP8 cannot be read: "
INSTEAD = "; give the model as it was before that, or a GGUF file of it"


def refusal(folder: Path) -> str:
    """What is said of a model, the same whether its weights would be read or not."""
    said = []
    for load in (load_outline, load_backbone):
        with pytest.raises(IaptError) as caught:
            load(str(folder))
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0]
    before, _, rest = said[0].partition(" is not supported: ")
    assert before == str(folder) and rest.endswith(INSTEAD)
    return rest.removesuffix(INSTEAD)


def changed(root: Path, change: Callable[[dict[str, Tensor]], Any], kind: Fp8 | None = None) -> Path:
    """A checkpoint in FP8 whose tensors were changed after it was written."""
    folder, _ = save_fp8(root, tiny_llama(), kind)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(SCALES), f"{NAME} has no {SCALES} beside it"),
        (lambda t: t.update({SCALES: t[SCALES][:1].clone()}), f"{SCALES} is [1, 3], expected [2, 3] beside [32, 48]"),
        (lambda t: t.update({SCALES: torch.tensor(1.0)}), f"{SCALES} is [], expected [2, 3] beside [32, 48]"),
        (
            lambda t: t.update({SCALES: t[SCALES].to(torch.int32)}),
            f"{SCALES} is stored as I32, expected one of F32, BF16, F16, F8_E8M0",
        ),
        (
            lambda t: t.update({NAME: t[NAME].float().to(torch.float8_e5m2)}),
            f"{NAME} is F8_E5M2 [32, 48], expected a matrix in F8_E4M3",
        ),
        (lambda t: t.update({NAME: t[NAME].float()}), f"{SCALES} belongs to no weight in FP8"),
        (lambda t: t.pop(NAME), f"{SCALES} belongs to no weight in FP8"),
        (
            lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn), f"{NORM}_scale_inv": torch.tensor(1.0)}),
            f"{NORM} is F8_E4M3 [32], expected a matrix in F8_E4M3",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Any, said: str, tmp_path: Path) -> None:
    assert refusal(changed(tmp_path, change)) == UNREAD + said


def test_rows_of_scales_where_the_checkpoint_has_no_blocks(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda t: t.update({SCALES: torch.ones(32, 1)}), Fp8(None))
    assert refusal(folder) == f"{UNREAD}{SCALES} is [32, 1], expected [1, 1] beside [32, 48]"


def test_many_are_counted(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("_scale_inv")])
    said = refusal(folder)
    assert said.count("has no ") == 8 and said.endswith("beside it and 13 more")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "its weights are quantised by gptq, which is not read"),
        ({"quant_method": "compressed-tensors"}, "its weights are quantised by compressed-tensors, which is not read"),
        ({"quant_method": "fbgemm_fp8"}, "its weights are quantised by fbgemm_fp8, which is not read"),
        ({"quant_method": "unheard-of"}, "its weights are quantised by unheard-of, which is not read"),
        ({"bits": 4}, "its weights are quantised by a method without a name, which is not read"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "its experts are stored in fp4, and FP8 alone is read"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "its weight_block_size is [128], expected two numbers above 0",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [0, 128]},
            "its weight_block_size is [0, 128], expected two numbers above 0",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": 128},
            "its weight_block_size is 128, expected two numbers above 0",
        ),
    ],
)
def test_formats_that_are_not_read(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path / "model")
    (folder / WEIGHTS).unlink()  # not needed to say it
    set_quantisation(folder, **fields)
    assert refusal(folder) == said


def test_every_command_says_it_before_it_reads_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    folder = changed(tmp_path, lambda t: t.pop(SCALES))
    said = refusal(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}", "completion": "yes"}}\n' for i in range(20)), encoding="utf-8")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    monkeypatch.setattr("safetensors.safe_open", never)
    outcomes = [
        run("train", f"--data={data}", f"--output={tmp_path / 'adapter'}", f"--model={folder}"),
        run("build", f"--output={tmp_path / 'bundle'}", f"--model={folder}"),
        run("inspect", folder, "--json"),
        run("doctor", f"--model={folder}", "--json"),
    ]
    for outcome in outcomes:
        assert said in " ".join((outcome.out + outcome.err).split())
    assert [outcome.code for outcome in outcomes[:2]] == [1, 1]
    assert json.loads(outcomes[2].out)["verdict"] == "refused"
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "bundle").exists()


def test_weights_in_one_type_whose_configuration_still_says_fp8(tmp_path: Path) -> None:
    """Somebody multiplied them out and left the mark."""
    _, by_hand = save_fp8(tmp_path, tiny_llama())
    plain = load_backbone(str(by_hand)).model.state_dict()
    set_quantisation(by_hand, quant_method="fp8", weight_block_size=[16, 16])
    found = load_backbone(str(by_hand)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
