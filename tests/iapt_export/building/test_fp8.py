"""A backbone in FP8 from training to served tokens, held against stock transformers with weights multiplied by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import iapt_export
from iapt_export import BuildRequest
from tests.bundles import NUM_LAYERS, RANGES
from tests.iapt_export.building.test_families import LIMIT, NEW_TOKENS, served_words, stock_words
from tests.tiny import tiny_llama
from tests.trainers.decoder.fp8_files import Fp8, save_fp8
from tests.trainers.runs import run, weights
from trainers.decoder import streamed
from trainers.decoder.stored import weights_sha256


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Blocks of 24 leave a rest in matrices of 32 and 48."""
    return save_fp8(tmp_path_factory.mktemp("models"), tiny_llama(num_hidden_layers=NUM_LAYERS), Fp8((24, 24)))


@pytest.fixture(scope="module")
def adapters(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Trained on the values and scales, and on their products."""
    root = tmp_path_factory.mktemp("adapters")
    lines = [{"instruction": f"is this positive? number {n}", "output": ("yes", "no")[n % 2]} for n in range(24)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return [run(str(model), root / "data.jsonl", root / model.name, max_steps=3).output for model in folders]


def test_training_is_that_of_the_products(adapters: list[Path]) -> None:
    assert weights(adapters[0]) == weights(adapters[1])


@pytest.mark.slow
@pytest.mark.parametrize("free", [None, 0], ids=["in-memory", "read-one-at-a-time"])
def test_it_is_built_proven_and_served(
    free: int | None,
    folders: tuple[Path, Path],
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streamed, "free_memory", lambda: free)
    places = {"model": str(folders[0]), "output": tmp_path / "out", "cache": tmp_path / "cache"}
    made = iapt_export.build(BuildRequest(**places, **RANGES, new_tokens=NEW_TOKENS, adapters=[*adapters]))
    assert made.parity.verdict == "pass"
    right = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).eval()
    assert made.backbone.weights_sha256 == weights_sha256(right)
    served = served_words(tmp_path / "out", ("", "fp8", "by-hand"))
    for ours, wanted in zip(served[""], stock_words(right), strict=True):
        assert ours.tokens == wanted.tokens and ours.distance(wanted) < LIMIT
    for one, other in zip(served["fp8"], served["by-hand"], strict=True):
        assert one.tokens == other.tokens
