"""Training and building from Python: what the command line does, in five lines."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iapt_export.contract.errors import IaptError
from iapt_export.contract.integrity import verify_files
from tests.bundles import METHOD, TinyBuild

WAITING = "OMP_WAIT_POLICY"
RANGES = {"batch": "1:2:8", "sequence": "1:16:96", "past": "5:64:160", "tenants": "1:3:4"}
"""The tiny build's, whose graphs are found made."""


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_pytorchs_threads_sleep_while_they_wait_unless_told_otherwise(given: str | None, wanted: str) -> None:
    """Before torch is loaded, which importing the package does not do."""
    environment = {name: value for name, value in os.environ.items() if name != WAITING}
    code = f"import os, sys, iapt_export; print(os.environ[{WAITING!r}], 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({WAITING: given} if given else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [wanted, "False"]


def test_train_and_build_in_five_lines_each(tiny_build: TinyBuild, tmp_path: Path) -> None:
    model, data = str(tiny_build.model), tmp_path / "data.jsonl"
    lines = [{"instruction": f"is this positive? number {n}", "output": ("yes", "no")[n % 2]} for n in range(24)]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    from trainers import TrainConfig, TrainRequest, train

    config = TrainConfig(max_steps=2, batch_size=2, baseline=False)
    result = train(TrainRequest(model, data, tmp_path / "answers", METHOD, config))
    assert result.steps == 2 and result.adapter.config.labels == ("no", "yes")

    from iapt_export import BuildRequest, build

    places = {"model": model, "adapters": [result.output], "output": tmp_path / "bundle", "cache": tiny_build.cache}
    request = BuildRequest(**places, **RANGES, new_tokens=4)
    manifest = build(request)
    assert manifest.parity.verdict == "pass" and [tenant.name for tenant in manifest.tenants] == ["answers"]
    verify_files(tmp_path / "bundle", manifest)
    assert build(request) == manifest, "found up to date"


def test_a_bundle_without_proof_says_so_and_is_never_up_to_date(tiny_build: TinyBuild, tmp_path: Path) -> None:
    from iapt_export import BuildRequest, build

    request = BuildRequest(
        model=str(tiny_build.model),
        adapters=list(tiny_build.adapters.values()),
        output=tmp_path / "bundle",
        **RANGES,
        new_tokens=4,
        cache=tiny_build.cache,
    )
    unproved = build(dataclasses.replace(request, prove=False))
    assert unproved.parity.verdict == "not run" and "report.json" not in unproved.files
    steps: list[str] = []
    proved = build(request, lambda text, *_: steps.append(text))
    assert proved.parity.verdict == "pass" and "writing the report" in steps
    assert proved.build_key == unproved.build_key


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"adapters": "a"}, "adapters='a' is one text; expected a list of them"),
        ({"targets": "onnxruntime"}, "targets='onnxruntime' is one text; expected a list of them"),
        ({"targets": {"onnxruntime": "int8"}}, "targets is {'onnxruntime': 'int8'}; expected a list of texts"),
        ({"targets": [None]}, "targets is [None]; expected a list of texts"),
        ({"adapters": None}, "adapters is None; expected a list of texts"),
        ({"device": "tpu"}, "device='tpu' is not one of cpu, cuda"),
        ({"rational": "kernel"}, "rational='kernel' is not one of function, plugin"),
        ({"peft_prompt_format": "auto"}, "peft_prompt_format='auto' is not one of chat, plain, newline"),
        ({"new_tokens": 0}, "new_tokens=0 is not an integer from 1 to"),
        ({"merge_lora": 1}, "merge_lora=1 is not true or false"),
    ],
)
def test_a_request_that_no_build_can_have(fields: dict[str, object], text: str) -> None:
    from iapt_export import BuildRequest

    with pytest.raises(IaptError, match="build request: ") as caught:
        BuildRequest(**{"model": "m", "adapters": ["a"], "output": "o", **fields})
    assert text in str(caught.value)


def test_the_names_are_there_and_no_others() -> None:
    code = (
        "import sys, iapt_export, trainers; iapt_export.BuildRequest; trainers.TrainConfig; trainers.TrainRequest\n"
        "print(*[name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    import iapt_export
    import trainers

    for module in (iapt_export, trainers):
        assert all(hasattr(module, name) for name in module.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'export_all'"):
            _ = module.export_all
