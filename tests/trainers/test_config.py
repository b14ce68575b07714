"""Settings: defaults, ranges, sharing groups, YAML and text conversion, help texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trainers.config import IAPTConfig, TrainConfig, configs_from_fields, field_help, read_train_file
from trainers.errors import IaptError


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


def test_every_field_has_a_help_text_of_its_own() -> None:
    for cls in (IAPTConfig, TrainConfig):
        texts = field_help(cls)
        assert set(texts) == {field.name for field in dataclasses.fields(cls)}
        assert all(text.endswith(".") and len(text) < 140 for text in texts.values())


def test_no_field_name_is_in_both_configurations() -> None:
    names = [{field.name for field in dataclasses.fields(cls)} for cls in (IAPTConfig, TrainConfig)]
    assert not names[0] & names[1]


def test_flat_fields_are_sorted_and_converted() -> None:
    fields = {"learning_rate": "1e-3", "bottleneck": "64", "bias": "False", "pooling": "mean", "seed": 3}
    method, training = configs_from_fields(fields, "flags")
    assert method == IAPTConfig(bottleneck=64, bias=False, pooling="mean")
    assert training == TrainConfig(learning_rate=1e-3, seed=3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"learning_rat": 1}, "flags: unknown field learning_rat; known fields are activation, "),
        ({"seed": "1.5"}, "flags: seed='1.5' is not an integer"),
        ({"learning_rate": "fast"}, "flags: learning_rate='fast' is not a number"),
        ({"bias": "maybe"}, "flags: bias='maybe' is not true or false"),
    ],
)
def test_flat_fields_refuse(fields: dict[str, object], text: str) -> None:
    with pytest.raises(IaptError) as caught:
        configs_from_fields(fields, "flags")
    assert text in str(caught.value)


def test_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("learning_rate: 1e-3\nprompt_length: 2\n", encoding="utf-8")
    method, training = configs_from_fields(read_train_file(path), str(path))
    assert (method.prompt_length, training.learning_rate) == (2, 1e-3)
    path.write_text("", encoding="utf-8")
    assert read_train_file(path) == {}


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "does not exist"), ("a: [1", "is not YAML"), ("- 1\n", "holds a list; expected one 'field: value'")],
)
def test_settings_file_errors(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "train.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(IaptError) as caught:
        read_train_file(path)
    assert text in str(caught.value)
