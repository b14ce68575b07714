"""Settings: defaults, ranges, sharing groups, YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from iapt_export.contract.errors import IaptError
from iapt_export.contract.settings import summary_of
from trainers.methods.configs import METHOD_CONFIGS, IAPTConfig, config_of
from trainers.training.config import TrainConfig, read_train_file


def test_defaults_are_the_papers_settled_parts() -> None:
    config = IAPTConfig()
    assert (config.prompt_length, config.pooling, config.activation, config.sharing) == (
        4,
        "attention",
        "rational",
        "all",
    )
    assert (config.numerator_degree, config.denominator_degree, config.rational_form) == (5, 4, "B")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt_length": 0}, "prompt_length=0 is not an integer from 1 to 1024"),
        ({"bottleneck": 2.5}, "bottleneck=2.5 is not an integer from 1 to 65536"),
        ({"numerator_degree": 9}, "numerator_degree=9 is not an integer from 1 to 8"),
        ({"denominator_degree": True}, "denominator_degree=True is not an integer"),
        ({"pooling": "median"}, "pooling='median' is not one of attention, mean, max"),
        ({"activation": "elu"}, "activation='elu' is not one of rational, gelu, relu, silu, tanh"),
        ({"bias": 1}, "bias=1 is not true or false"),
        ({"num_groups": 3}, "num_groups=3 needs sharing='groups', got sharing='all'"),
    ],
)
def test_method_refuses(fields: dict[str, object], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        IAPTConfig(**fields)  # type: ignore[arg-type]
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is not a number from 0 to 100"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not a number"),
        ({"batch_size": 0}, "batch_size=0 is not an integer of at least 1"),
        ({"seed": -1}, "seed=-1 is not an integer of at least 0"),
        ({"scheduler": "step"}, "scheduler='step' is not one of linear, cosine, constant"),
        ({"holdout": 0.95}, "holdout=0.95 is not a number from 0 to 0.9"),
        ({"resume": "yes"}, "resume='yes' is not true or false"),
        ({"num_epochs": 0}, "max_steps and num_epochs are both 0, so there is nothing to train"),
    ],
)
def test_run_refuses(fields: dict[str, object], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        TrainConfig(**fields)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_all_problems_are_listed_together() -> None:
    with pytest.raises(IaptError) as caught:
        TrainConfig(batch_size=0, warmup_steps=-1, precision="fp8")  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in ("batch_size", "warmup_steps", "precision"))


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (IAPTConfig(), (0, 0, 0, 0, 0)),
        (IAPTConfig(sharing="none"), (0, 1, 2, 3, 4)),
        (IAPTConfig(sharing="groups", num_groups=2), (0, 0, 0, 1, 1)),
    ],
)
def test_groups(config: IAPTConfig, groups: tuple[int, ...]) -> None:
    assert config.groups(5) == groups


def test_more_groups_than_layers() -> None:
    with pytest.raises(IaptError, match="num_groups=6 is more than the backbone's 5 layers"):
        IAPTConfig(sharing="groups", num_groups=6).groups(5)


@pytest.mark.parametrize("cls", METHOD_CONFIGS.values())
def test_no_field_name_is_in_both_configurations(cls: type) -> None:
    names = [{field.name for field in dataclasses.fields(item)} for item in (cls, TrainConfig)]
    assert not names[0] & names[1]
    others = {"model", "data", "output", "config", "method", "write_config", "json", "quiet", "verbose", "debug"}
    assert not (names[0] | names[1]) & others, "flags of the train command"


def test_every_method_is_summed_up_with_its_paper() -> None:
    for cls in METHOD_CONFIGS.values():
        assert "(arXiv 2" in summary_of(cls)
        assert summary_of(cls).endswith(".") and "\n" not in summary_of(cls) and "``" not in summary_of(cls)


def test_methods_by_name() -> None:
    assert config_of("iapt") is config_of("IAPT") is IAPTConfig
    assert config_of("prompt-tuning") is METHOD_CONFIGS["PROMPT_TUNING"]
    with pytest.raises(IaptError, match="method 'qlora' is not known; use one of iapt, adept, lopa, lamp, dept, prom"):
        config_of("qlora")


def test_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("learning_rate: 1e-3\nprompt_length: 2\n", encoding="utf-8")
    assert read_train_file(path) == {"learning_rate": "1e-3", "prompt_length": 2}
    path.write_text("eval_file:\nprompt_length: 2\n", encoding="utf-8")
    assert read_train_file(path) == {"prompt_length": 2}, "without a value it is not there"
    path.write_text("", encoding="utf-8")
    assert read_train_file(path) == {}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "does not exist"),
        ("a: [1", "is not YAML"),
        ("rank: 1\nseed: 2\nrank: 3", "gives rank twice; leave one of them out"),
        ("- 1\n", "holds a list; expected one 'field: value'"),
        ("a: 2026-13-45", "is not YAML: month must be in 1..12"),
        ("a: " + "1" * 5000, "is not YAML: Exceeds the limit"),
        ("a: " + "[" * 5000, "nested deeper than 8 levels"),
    ],
)
def test_settings_file_errors(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "train.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(IaptError) as caught:
        read_train_file(path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("method", "fields", "text"),
    [
        ("prompt-tuning", {"prompt_length": 0}, "prompt_length=0 is not an integer from 1 to 1024"),
        ("prompt-tuning", {"init": "zeros"}, "init='zeros' is not one of text, vocabulary, random"),
        ("prefix-tuning", {"projection": "yes"}, "projection='yes' is not true or false"),
        ("prefix-tuning", {"projection_width": 0}, "projection_width=0 is not an integer from 1 to 65536"),
        ("adept", {"bottleneck": 0}, "bottleneck=0 is not an integer from 1 to 65536"),
        ("dept", {"alpha": 0.0}, "alpha=0.0 is not a number above 0"),
        ("dept", {"rank": True}, "rank=True is not an integer from 1 to 65536"),
        ("lopa", {"head_width": -1}, "head_width=-1 is not an integer from 0 to 65536"),
        ("lamp", {"init_length": 100, "window": 7}, "init_length=100 is not a multiple of window=7"),
        ("lamp", {"init_length": 5, "rank": 8}, "rank=8 is more than init_length=5"),
        ("lamp", {"init_length": 2000, "window": 1}, "init_length / window is 2000, more than 1024 soft tokens"),
        ("lora", {"alpha": -1.0}, "alpha=-1.0 is not a number above 0"),
        ("lora", {"target_modules": ()}, r"target_modules=\(\) is not a list of names, for example q_proj,v_proj"),
    ],
)
def test_every_methods_fields_are_checked(method, fields, text):
    with pytest.raises(IaptError, match=text):
        config_of(method)(**fields)
