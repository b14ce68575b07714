"""The programs that measure the limits: what they sum up, and that they run on a tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bundles import TinyBuild
from tests.validation import noise


def test_a_record_has_the_middle_and_the_worst_of_each_figure() -> None:
    samples = [
        ("decode logits", {"relative": 1.0, "kl": 0.5, "max_abs": 9.0}),
        ("decode logits", {"relative": 4.0, "kl": 0.1}),
        ("decode logits", {"relative": 2.0, "kl": 0.2}),
        ("top-1 agreement", {"agreement": 1.0}),
        ("top-1 agreement", {"agreement": 0.0}),
        ("greedy tokens", {"identical": 1.0}),
    ]
    assert noise.summarised(samples) == {
        "decode logits": {
            "samples": 3,
            "relative": {"median": 2.0, "worst": 4.0},
            "kl": {"median": 0.2, "worst": 0.5},
        },
        "top-1 agreement": {"samples": 2, "agreement": {"mean": 0.5, "worst": 0.0}},
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_noise_is_measured_on_a_bundle(dtype: str, tiny_build: TinyBuild, tmp_path: Path) -> None:
    words = [tiny_build.bundle, "--dtype", dtype, "--model", tiny_build.model, "--output", tmp_path]
    noise.main([str(word) for word in [*words, "--prompts", 2, "--steps", 3, "--seeds", 0]])
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text(encoding="utf-8"))
    stages = record["stages"]
    assert path.name == f"{dtype}.json" and record["seeds"] == 0
    assert {"prefill logits", "decode logits", "prefill cache", "decode cache", "module"} <= set(stages)
    assert stages["decode logits"]["samples"] == 2 * stages["prefill logits"]["samples"] > 0
    low, high = (1e-9, 1e-4) if dtype == "fp32" else (1e-4, 0.2)
    assert low < stages["decode logits"]["relative"]["worst"] < high
    assert ("generator" in stages) == (dtype == "bf16")
