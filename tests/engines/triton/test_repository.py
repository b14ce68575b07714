"""What ``iapt-export triton`` writes; that Triton reads it is asked in tests/doors/test_triton.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.serving.session import Session
from engines.triton.repository import INPUTS, OUTPUTS, TritonRepository, configuration, write_repository
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import TinyBuild, run


def test_the_repository_holds_a_bundle_that_opens(tiny_build: TinyBuild, tmp_path: Path) -> None:
    made = run("triton", tiny_build.bundle, "--output", tmp_path / "models", "--name=mine", "--json")
    folder = tmp_path / "models" / "mine"
    assert made.code == 0 and json.loads(made.out) == {"model": str(folder)}
    assert {path.name for path in folder.iterdir()} == {"1", "config.pbtxt"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]
    assert Session.open(folder / "1" / "bundle").tenants == Session.open(tiny_build.bundle).tenants
    config = (folder / "config.pbtxt").read_text(encoding="utf-8")
    assert 'name: "mine"\nbackend: "python"' in config and "decoupled: true" in config
    assert all(f'name: "{name}"' in config for name in (*INPUTS, *OUTPUTS))
    assert "EXECUTION_ENV_PATH" not in config and "kind: KIND_CPU" in config


def test_a_bundle_may_be_named_where_it_stands(tiny_build: TinyBuild, tmp_path: Path) -> None:
    asked = TritonRepository(output=tmp_path, refer=True, environment=tmp_path / "env", threads=2, max_waiting=7)
    folder = write_repository(tiny_build.bundle, asked)
    assert [path.name for path in (folder / "1").iterdir()] == ["model.py"]
    config = (folder / "config.pbtxt").read_text(encoding="utf-8")
    for key, value in {"bundle": tiny_build.bundle, "EXECUTION_ENV_PATH": tmp_path / "env", "threads": 2}.items():
        assert f'key: "{key}", value {{ string_value: "{value}" }}' in config
    assert 'key: "max_waiting", value { string_value: "7" }' in config


def test_a_target_of_the_gpu_chooses_its_device_itself(tiny_build: TinyBuild, tmp_path: Path) -> None:
    target = BundleManifest.load(tiny_build.bundle).target()
    config = configuration(tiny_build.bundle, target, TritonRepository(output=tmp_path, device="cuda"))
    assert "kind: KIND_MODEL" in config and 'key: "device", value { string_value: "cuda" }' in config


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "../up"}, "name='../up' is no name"),
        ({"name": ""}, "name='' is no name"),
        ({"device": "tpu"}, "device='tpu' is not one of cpu, cuda"),
        ({"max_waiting": 0}, "max_waiting=0 is not an integer from 1"),
        ({"threads": 0}, "threads=0 is not an integer from 1"),
    ],
)
def test_wrong_wishes_are_refused(tmp_path: Path, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(IaptError, match=text):
        TritonRepository(output=tmp_path, **fields)


def test_nothing_is_replaced_and_nothing_half_written(tiny_build: TinyBuild, tiny_bundle: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "iapt").mkdir(parents=True)
    found = run("triton", tiny_build.bundle, "--output", models)
    assert found.code == 1 and "exists and is not replaced" in found.err
    wrong = run("triton", tiny_build.bundle, "--output", tmp_path / "new", "--target=tensorrt")
    assert wrong.code == 1 and "'tensorrt' is not in this bundle" in wrong.err and not (tmp_path / "new").exists()
    (tiny_bundle / "weights.data").write_bytes(b"damaged")
    damaged = run("triton", tiny_bundle, "--output", tmp_path / "new")
    assert damaged.code == 1 and "weights.data" in damaged.err and not (tmp_path / "new").exists()
