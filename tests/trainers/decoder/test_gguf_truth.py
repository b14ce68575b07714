"""GGUF files answer as llama.cpp does, whose answers stand in tests/golden (see `tests.trainers.decoder.llama_cpp`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.thorough import default_for
from tests.tiny import VOCABULARY
from tests.trainers.decoder.gguf_cases import CASES, TOKENS
from tests.trainers.decoder.gguf_files import TinyFile, write
from tests.trainers.decoder.gguf_texts import TEXT_CASES, TEXTS
from tests.trainers.decoder.llama_cpp import EVERY, GOLDEN, last_log_probabilities, token_ids
from trainers.decoder.backbone import load_backbone, save_backbone

RECORD = json.loads(GOLDEN.read_text(encoding="utf-8"))
ROUNDING = 1e-4
"""Log-probabilities: measured up to 3e-5."""
GELU_ROUNDING = 5e-3
"""llama.cpp looks GELU up in a table of half-precision numbers: measured up to 2e-3."""
GELU = ("gemma2", "gemma3", "gpt2", "starcoder2")
MOVED = 0.05
"""What a field must move an answer by, so that dropping it would be seen."""
SAME = {
    "llama named mistral": "a name changes nothing",
    "llama lists of layers": "the lists say what the numbers say",
    "gpt2 context": "the text is shorter than either context",
}


def tolerance(name: str) -> float:
    return GELU_ROUNDING if name.startswith(GELU) else ROUNDING


COMMON_TEXTS = {
    "pre gpt-2",
    "pre llama-bpe",
    "pre qwen2",
    "pre smollm",
    "pre tekken",
    "sentencepiece llama None",
    "sentencepiece gemma3 False",
}
"""Tokenizers that the default run compares."""


@pytest.mark.parametrize("name", default_for(lambda name: " " not in name, CASES))
def test_answers_are_llama_cpps(name: str, tmp_path: Path) -> None:
    model = load_backbone(str(write(tmp_path / "tiny.gguf", CASES[name]))).model
    found = model(torch.tensor([TOKENS])).logits[0, -1].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(found[::EVERY], RECORD["models"][name], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", [name for name in CASES if " " in name])
def test_each_field_moves_the_answer(name: str) -> None:
    """Or else dropping it would pass the test above; llama.cpp's numbers alone are looked at."""
    plain, moved = RECORD["models"][name.split()[0]], RECORD["models"][name]
    distance = np.abs(np.subtract(plain, moved)).max()
    assert (distance == 0) if name in SAME else (distance > MOVED)


@pytest.mark.parametrize("name", default_for(COMMON_TEXTS.__contains__, TEXT_CASES))
def test_texts_are_llama_cpps_tokens(name: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(write(tmp_path / "tiny.gguf", TEXT_CASES[name])))
    found = [backbone.tokenizer(text)["input_ids"] for text in TEXTS]
    assert found == RECORD["texts"][name]
    save_backbone(backbone, tmp_path / "saved")
    saved = load_backbone(str(tmp_path / "saved"))
    assert [saved.tokenizer(text)["input_ids"] for text in TEXTS] == found
    assert saved.fingerprint == backbone.fingerprint


def test_ways_of_splitting_differ() -> None:
    """Or else the test above would pass with any of them."""
    ways = {json.dumps(RECORD["texts"][f"pre {pre}"]) for pre in ("gpt-2", "llama-bpe", "qwen2", "smollm", "tekken")}
    assert len(ways) == 5


def test_record_is_what_llama_cpp_says(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp; try: pip install xllamacpp")
    for name, case in CASES.items():
        said = last_log_probabilities(write(tmp_path / "tiny.gguf", case), TOKENS, VOCABULARY)
        assert abs(np.exp(said).sum() - 1) < 1e-4, name
        np.testing.assert_allclose(said[::EVERY], RECORD["models"][name], rtol=0, atol=tolerance(name), err_msg=name)
    for name, case in TEXT_CASES.items():
        assert token_ids(write(tmp_path / "tiny.gguf", case), TEXTS) == RECORD["texts"][name], name


def test_record_has_every_case() -> None:
    assert set(RECORD["models"]) == set(CASES)
    assert set(RECORD["texts"]) == set(TEXT_CASES)


def test_two_loads_are_equal(tmp_path: Path) -> None:
    path = str(write(tmp_path / "tiny.gguf", TinyFile("llama")))
    first, second = (load_backbone(path).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
