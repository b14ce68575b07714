"""Training every method: what the loop takes from a method, and that each one goes the whole way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from iapt_export.contract.errors import IaptError
from tests.thorough import default_for
from tests.trainers.runs import (
    RUN,
    InterruptedRunError,
    interrupt_at,
    run,
    undisturbed,
    undisturbed_losses,
    weights,
)
from trainers.adapters.directory import load_adapter
from trainers.methods.configs import (
    METHOD_CONFIGS,
    ADePTConfig,
    IAPTConfig,
    LAMPConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    flag_name,
)
from trainers.methods.forms import METHODS
from trainers.methods.iapt import IAPT
from trainers.training.config import TrainRequest
from trainers.training.evaluate import ClassificationReport
from trainers.training.evaluate_adapter import evaluate_adapter
from trainers.training.loop import AdapterTrainer, PromptTuned
from trainers.training.train import train

OTHER_METHODS = [
    *(cls() for cls in METHOD_CONFIGS.values() if cls is not IAPTConfig),
    PrefixTuningConfig(projection=True),
    ADePTConfig(decode_offset=True),
]
"""All but IAPT, whose training tests stand in test_train.py."""
other_methods = pytest.mark.parametrize(
    "method",
    default_for(lambda method: isinstance(method, LoRAConfig), OTHER_METHODS),
    ids=lambda method: type(method).__name__,
)
SHORT: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.0}


@pytest.mark.parametrize("name", default_for(lambda name: name in ("IAPT", "LORA"), METHOD_CONFIGS))
def test_every_method(backbone: str, data: Path, tmp_path: Path, name: str) -> None:
    """It trains, saves, loads and evaluates; another seed gives other bytes, and `test_every_method_resumes` shows
    that the same seed gives the same.
    """
    method = METHOD_CONFIGS[name]()
    result = run(backbone, data, tmp_path / "a", method, seed=1, **SHORT)
    assert weights(tmp_path / "a") != undisturbed(backbone, data, method, **SHORT)
    adapter = load_adapter(tmp_path / "a")
    assert (adapter.config.method, adapter.config.peft_type) == (method, name)
    assert adapter.config.num_kv_heads * adapter.config.head_dim == 16
    assert bool(adapter.config.linears) == (name == "LORA")
    assert isinstance(result.report, ClassificationReport)
    assert isinstance(evaluate_adapter(backbone, tmp_path / "a", data, RUN), ClassificationReport)
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert f"--learning-rate {METHODS[name].learning_rate} " in card, "the method's own rate, not 0"
    assert (f"--method {flag_name(name)} " in card) == (name != "IAPT")
    assert "(arXiv 2" in card


@other_methods
def test_two_steps_move_every_tensor(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """Two, since some tensors stand behind one that starts at zero. No step of the backbone is taken."""
    states: list[dict[str, torch.Tensor]] = []
    forward = PromptTuned.forward

    def watch(self: PromptTuned, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        states.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
        return forward(self, **batch)

    monkeypatch.setattr(PromptTuned, "forward", watch)
    run(backbone, data, tmp_path / "a", method, max_steps=3, warmup_steps=0)
    assert len(states) == 3
    moved = {name for name, tensor in states[0].items() if not torch.equal(tensor, states[-1][name])}
    assert moved == {name for name in states[0] if name.startswith("method.")}


@other_methods
def test_every_method_resumes(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    whole = undisturbed(backbone, data, method, **SHORT)
    torch.manual_seed(7)  # the caller's random state does not matter
    interrupt_at(monkeypatch, 3)
    with pytest.raises(InterruptedRunError):
        run(backbone, data, tmp_path / "cut", method, **SHORT)
    monkeypatch.undo()
    run(backbone, data, tmp_path / "cut", method, resume=True, **SHORT)
    assert weights(tmp_path / "cut") == whole


@other_methods
def test_every_method_in_bf16(backbone: str, data: Path, tmp_path: Path, method: Any) -> None:
    """The backbone and the products in bf16, the trained tensors in fp32; evaluation is in bf16 throughout."""
    result = run(backbone, data, tmp_path / "a", method, precision="bf16", **SHORT)
    exact = undisturbed_losses(backbone, data, method, **SHORT)
    assert [loss for _, loss in result.history] == pytest.approx(exact, rel=0.02)


def test_start_sees_the_first_instruction(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        IAPT,
        "start",
        lambda _self, _model, tokenizer, ids: seen.append(tokenizer.decode(ids, skip_special_tokens=False)),
    )
    run(backbone, data, tmp_path / "a")
    assert len(seen) == 1
    assert seen[0].startswith("<|im_start|>system\nYou help.") and seen[0].endswith("<|im_start|>assistant\n")
    run(backbone, data, tmp_path / "b", start="random")
    assert len(seen) == 1


def test_learning_rates_and_decay_per_parameter(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser has every trained tensor once, at the method's own multiple of the rate, decayed where it says."""
    made: list[dict[str, tuple[float, float]]] = []
    create = AdapterTrainer.create_optimizer

    def watch(self: AdapterTrainer, *arguments: Any) -> Any:
        optimizer = create(self, *arguments)
        names = {id(parameter): name for name, parameter in self.method.named_parameters()}
        groups = optimizer.param_groups
        settings = [(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
        assert len(settings) == len(names)
        made.append({name: (rate, decay) for name, rate, decay in settings})
        return optimizer

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", watch)
    monkeypatch.setattr(METHODS["LAMP"], "learning_rate_factors", lambda _self: {"singular": 10.0, "left": 0.5})
    fields: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1, "warmup_steps": 0, "max_steps": 1}
    lines: list[str] = []
    config = dataclasses.replace(RUN, **fields)
    train(TrainRequest(backbone, data, tmp_path / "a", LAMPConfig(), config), say=lines.append)
    assert made[-1] == {"left": (0.005, 0.1), "singular": (0.1, 0.0), "right": (0.01, 0.1)}
    assert any("learning rate 1.0e-02" in line for line in lines), "the rate that is reported is the plain one"
    run(backbone, data, tmp_path / "b", **fields)
    decayed = {name for name, setting in made[-1].items() if setting == (0.01, 0.1)}
    assert decayed == {"down_weight", "up_weight", "query"}
    assert {made[-1][name] for name in set(made[-1]) - decayed} == {(0.01, 0.0)}


@pytest.mark.thorough
def test_a_learning_rate_factor_scales_the_steps(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first step is as long as the rate, so a tenth of the rate moves a tensor a tenth as far."""
    fields: dict[str, Any] = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-3}
    moved = []
    for factor in (1.0, 0.1):
        monkeypatch.setattr(METHODS["PROMPT_TUNING"], "learning_rate_factors", lambda _self, f=factor: {"prompt": f})
        ends = []
        for rate in (1e-3, 1e-12):
            output = tmp_path / f"{factor}-{rate}"
            run(backbone, data, output, PromptTuningConfig(), **{**fields, "learning_rate": rate})
            ends.append(load_adapter(output).tensors["prompt"])
        moved.append((ends[0] - ends[1]).abs().mean())
    assert float(moved[0] / moved[1]) == pytest.approx(10, rel=0.01)


def test_a_target_that_the_backbone_lacks(backbone: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(IaptError, match="LoRA's target_modules c_attn: the backbone's layers have no linear of that"):
        run(backbone, data, tmp_path / "a", LoRAConfig(target_modules=("c_attn",)))
